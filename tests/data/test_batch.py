"""Packing, padding and windows: every token once, no sequence learns from another or from padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar import data
from entrenar.data import IGNORE, Rows, Sample, Windows
from entrenar.errors import ConfigError, DataError, UsageError
from entrenar.tokenizer import from_characters

pytestmark = pytest.mark.tier1
PAD = 999


def make(lengths: list[int], masked: int = 0) -> list[Sample]:
    """Samples whose tokens are all distinct, so that a token tells where it came from."""
    samples, first = [], 1000
    for n in lengths:
        ids = np.arange(first, first + n, dtype=np.int32)
        labels = ids.copy()
        labels[: min(masked, n)] = IGNORE
        samples.append(Sample(ids, labels, "memory"))
        first += n
    return samples


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 90))
def test_pack_places_each_once_and_within_capacity(lengths: list[int], capacity: int) -> None:
    rows = data.pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert rows == data.pack(lengths, capacity)
    # no two rows of a best-fit packing fit into one
    loads = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > capacity


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=30),
    st.integers(20, 40),
    st.booleans(),
    st.integers(0, 3),
)
def test_rows_hold_every_token_and_label_once(lengths: list[int], seq_len: int, packing: bool, masked: int) -> None:
    samples = make(lengths, masked)
    rows = Rows(samples, seq_len, PAD, packing)
    batch = rows.batch(range(len(rows)))
    assert batch.ids.dtype == batch.labels.dtype == np.int64
    assert batch.ids.shape[1] <= seq_len
    assert sorted(batch.ids[batch.ids != PAD]) == sorted(np.concatenate([s.ids for s in samples]))
    kept = batch.labels != IGNORE
    assert (batch.labels[kept] == batch.ids[kept]).all()
    learned = [label for s in samples for label in s.labels[1:] if label != IGNORE]
    assert sorted(batch.labels[kept]) == sorted(learned)
    assert batch.tokens == len(learned)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
def test_packed_sequences_never_see_each_other(lengths: list[int]) -> None:
    samples = make(lengths)
    owner = {int(t): i for i, s in enumerate(samples) for t in s.ids}
    batch = Rows(samples, 50, PAD).batch(range(len(Rows(samples, 50, PAD))))
    assert batch.starts is not None
    assert batch.starts.dtype == np.int32
    for ids, labels, starts in zip(batch.ids, batch.labels, batch.starts, strict=True):
        for t, token in enumerate(ids):
            seen = set(ids[starts[t] : t + 1])
            if token == PAD:
                assert seen == {PAD}
            else:
                assert {owner[int(s)] for s in seen} == {owner[int(token)]}
                assert token - ids[starts[t]] == t - starts[t]
                assert ids[starts[t]] == samples[owner[int(token)]].ids[0]
                assert (labels[t] == IGNORE) == (t == starts[t])


def test_padded_rows_need_no_starts() -> None:
    batch = Rows(make([3, 5]), 8, PAD, packing=False).batch([1, 0])
    assert batch.starts is None
    assert batch.ids.tolist() == [[1003, 1004, 1005, 1006, 1007], [1000, 1001, 1002, PAD, PAD]]
    assert batch.labels[1].tolist() == [IGNORE, 1001, 1002, IGNORE, IGNORE]


@given(st.integers(2, 300), st.integers(2, 50), st.integers(1, 7))
def test_windows_predict_every_token_but_the_first_once(n: int, seq_len: int, batch_size: int) -> None:
    windows = Windows(np.arange(n), seq_len, pad_id=PAD)
    learned: list[int] = []
    for batch in data.batches(windows, batch_size):
        assert batch.ids.shape[1] <= seq_len
        assert batch.starts is None
        shifted = batch.labels[:, 1:]
        learned += shifted[shifted != IGNORE].tolist()
        assert batch.tokens == (shifted != IGNORE).sum()
        assert (batch.ids[:, :-1][shifted != IGNORE] + 1 == shifted[shifted != IGNORE]).all()
    assert learned == list(range(1, n))


@given(st.integers(2, 60), st.integers(2, 20))
def test_crops_are_all_windows(n: int, seq_len: int) -> None:
    crops = Windows(np.arange(n), seq_len, stride=1)
    got = [crops.batch([i]).ids[0].tolist() for i in range(len(crops))]
    assert got == [list(range(i, min(i + seq_len, n))) for i in range(max(1, n - seq_len + 1))]


def test_limits() -> None:
    with pytest.raises(ConfigError, match="seq_len"):
        Windows(np.arange(9), 1)
    with pytest.raises(ConfigError, match="seq_len"):
        Rows(make([2]), 0)
    with pytest.raises(DataError, match="two are the least"):
        Windows([5], 4, where="tiny.txt")
    with pytest.raises(UsageError, match="sequence 0 has 9 tokens"):
        data.pack([9], 8)


def test_build_plain_text_and_samples(tmp_path: Path) -> None:
    tokenizer = from_characters("abcdefgh \n")
    (tmp_path / "train.txt").write_text("abc defgh" * 10)
    (tmp_path / "valid.jsonl").write_text('{"text": "abc"}\n{"text": "' + "d" * 50 + '"}\n')
    train = data.build(data.read(tmp_path), tokenizer, 8)
    stream = [tokenizer.bos_id, *tokenizer.encode("abc defgh" * 10, add_special=False), tokenizer.eos_id]
    assert isinstance(train, Windows)
    assert train.ids.tolist() == stream
    assert len(data.build(data.read(tmp_path), tokenizer, 8, crops=True)) == len(stream) - 8 + 1
    valid = data.build(data.read(tmp_path, "valid"), tokenizer, 8)
    assert valid.truncated == 1
    assert [len(valid.batch([i]).ids[0]) for i in range(len(valid))] == [5, 8]
