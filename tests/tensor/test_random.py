"""Dropout's random numbers: seeded, saved, never drawn twice."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from entrenar import ops
from entrenar.errors import UsageError
from entrenar.random import Rng
from entrenar.tensor import Tensor, default_rng, manual_seed

pytestmark = pytest.mark.tier1


def draw(n: int = 100) -> np.ndarray:
    return ops.dropout(Tensor(np.ones(n)), 0.5).numpy()


def test_a_seed_starts_over() -> None:
    manual_seed(4)
    first, second = draw(), draw()
    manual_seed(4)
    np.testing.assert_array_equal(draw(), first)
    np.testing.assert_array_equal(draw(), second)
    assert (first != second).any()
    manual_seed(5)
    assert (draw() != first).any()


def test_the_state_goes_on_where_it_was_saved() -> None:
    manual_seed(4)
    draw()
    state = default_rng.state_dict()
    expected = draw()
    manual_seed(99)
    default_rng.load_state_dict(state)
    np.testing.assert_array_equal(draw(), expected)


def test_the_offset_advances_by_four_numbers_a_step() -> None:
    manual_seed(1)
    for n, offset in ((1, 1), (4, 2), (5, 4), (0, 4), (100, 29)):
        draw(n)
        assert default_rng.offset == offset


def test_one_long_draw_is_two_short_ones() -> None:
    """Element i depends on seed and offset + i / 4 only."""
    manual_seed(2)
    whole = draw(48)
    manual_seed(2)
    np.testing.assert_array_equal(np.concatenate([draw(20), draw(28)]), whole)


def test_threads_never_draw_the_same_numbers() -> None:
    rng, taken = Rng(), []

    def take() -> None:
        taken.extend(rng.take(4) for _ in range(500))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(offset for _, offset in taken) == list(range(2000))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1", None, True])
def test_seeds_that_are_none(seed: object) -> None:
    before = default_rng.state_dict()
    with pytest.raises(UsageError, match="from 0 to 2"):
        manual_seed(seed)  # type: ignore[arg-type]
    assert default_rng.state_dict() == before
    with pytest.raises(UsageError, match="offset"):
        default_rng.load_state_dict({"seed": 1})
