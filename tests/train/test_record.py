"""What identifies a run: large weights are sampled, and each difference is named."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from entrenar import Tensor
from entrenar.errors import CheckpointError
from entrenar.train.record import SAMPLED, frozen_digest, require_same

pytestmark = pytest.mark.tier1


def digest(*weights: np.ndarray, trainable: bool = False) -> str:
    named = [(f"w{i}", Tensor(w, requires_grad=trainable)) for i, w in enumerate(weights)]
    return frozen_digest(SimpleNamespace(named_weights=lambda: named))


@pytest.mark.parametrize("place", [0, SAMPLED // 4 - 1, 2 * SAMPLED, -SAMPLED // 4, -1])
def test_a_changed_bit_at_the_sampled_places_is_seen(place: int) -> None:
    large = np.zeros(4 * SAMPLED, np.float32)
    changed = large.copy()
    changed[place] = 1e-45
    assert digest(large) == digest(large.copy())
    assert digest(large) != digest(changed)


def test_shape_type_and_order_count_and_trained_weights_do_not() -> None:
    a, b = np.arange(6, dtype=np.float32), np.ones(6, np.float32)
    digests = [digest(a, b), digest(b, a), digest(a.reshape(2, 3), b), digest(a.astype(np.float16), b), digest(a)]
    assert len(set(digests)) == len(digests)
    assert digest(a, trainable=True) == digest()


def test_a_setting_that_only_the_saved_run_has_is_named() -> None:
    now = {"config": {"a": 1}, "model": {}, "data": "x"}
    require_same(now, now, "here")
    with pytest.raises(CheckpointError, match="max_steps counted"):
        require_same({**now, "config": {"a": 1, "max_steps": 5}}, now, "here")
    with pytest.raises(CheckpointError, match="a was None and is 1 now"):
        require_same({**now, "config": {}}, now, "here")


def test_the_cause_is_named_before_the_rate_that_follows_from_it() -> None:
    saved = {"config": {"learning_rate": 1e-3, "loraplus_lr_ratio": None}, "model": {"scales": {"q": 2.0}}, "data": "x"}
    rate = {"learning_rate": 2e-3}
    for changed, words in (
        ({"config": {**saved["config"], **rate}, "model": {"scales": {"q": 8.0}}}, "scales"),
        ({"config": {**rate, "loraplus_lr_ratio": 16.0}}, "loraplus_lr_ratio was None"),
        ({"config": {**saved["config"], **rate}}, "learning_rate was 0.001"),
    ):
        with pytest.raises(CheckpointError, match=words):
            require_same(saved, {**saved, **changed}, "here")
