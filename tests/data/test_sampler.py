"""Data order: a shuffle each epoch, the same on every platform, resumed inside an epoch."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data import Sampler
from entrenar.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.tier1


def take(sampler: Sampler, count: int) -> list[list[int]]:
    return [next(sampler).tolist() for _ in range(count)]


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 2**63))
def test_an_epoch_has_every_row_once(rows: int, batch_size: int, seed: int) -> None:
    sampler = Sampler(rows, batch_size, seed)
    for epoch in range(3):
        assert sampler.epoch == epoch
        seen = [row for batch in take(sampler, sampler.batches_per_epoch) for row in batch]
        assert sorted(seen) == list(range(rows))
    assert sampler.progress == 3


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 40), st.booleans(), st.booleans())
def test_resumes_exactly(rows: int, batch_size: int, done: int, shuffle: bool, replacement: bool) -> None:
    first = Sampler(rows, batch_size, 5, shuffle, replacement)
    take(first, done)
    state = json.loads(json.dumps(first.state_dict()))
    second = Sampler(rows, batch_size, 5, shuffle, replacement)
    second.load_state_dict(state)
    assert second.progress == first.progress
    assert take(first, 20) == take(second, 20)


def test_order_is_the_same_everywhere() -> None:
    """Recorded once; PCG64's raw stream is stable across NumPy's versions and platforms."""
    assert take(Sampler(8, 4, seed=42), 4) == [[4, 1, 3, 6], [0, 7, 2, 5], [1, 2, 5, 3], [6, 0, 4, 7]]


def test_seeds_and_epochs_differ() -> None:
    a, b = (take(Sampler(100, 100, seed), 2) for seed in (0, 1))
    assert len({tuple(order) for order in (*a, *b)}) == 4
    assert a == take(Sampler(100, 100, 0), 2)


def test_without_shuffle_the_file_order() -> None:
    assert take(Sampler(5, 2, shuffle=False), 4) == [[0, 1], [2, 3], [4], [0, 1]]


def test_replacement_is_uniform_and_full() -> None:
    sampler = Sampler(10, 7, seed=1, replacement=True)
    drawn = np.array(take(sampler, 1000))
    assert drawn.shape == (1000, 7)
    counts = np.bincount(drawn.ravel(), minlength=10)
    assert len(counts) == 10
    # chi-square, 9 degrees of freedom: 33.7 is exceeded with probability 1e-4
    assert ((counts - 700) ** 2 / 700).sum() < 33.7


def test_state_of_another_run_is_refused() -> None:
    state = Sampler(10, 2).state_dict()
    with pytest.raises(CheckpointError, match="rows 10, this run 11"):
        Sampler(11, 2).load_state_dict(state)
    with pytest.raises(CheckpointError, match="position 10"):
        Sampler(10, 2).load_state_dict({**state, "position": 10})
    with pytest.raises(CheckpointError, match="epoch None"):
        Sampler(10, 2).load_state_dict({**state, "epoch": None})


@pytest.mark.parametrize("field", ["rows", "batch_size", "seed"])
def test_impossible_settings(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Sampler(**{"rows": 4, "batch_size": 2, "seed": 0, field: -1})
