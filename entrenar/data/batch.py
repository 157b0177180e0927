"""Samples as arrays: packed rows, padded rows, and windows of running text.

Labels follow Hugging Face's convention: they stand at the positions of the ids and the model shifts them, so
the first token of every sequence has label -100. In a packed row `starts` tells each position where its
sequence begins; attention looks no further back. Positions need no restart, since rotary embeddings depend on
distance alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from entrenar.data.files import Source
from entrenar.data.render import IGNORE, Sample, render
from entrenar.errors import ConfigError, DataError, UsageError
from entrenar.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step of the model takes.

    Attributes:
        ids: (B, T) int64. labels: (B, T) int64, -100 where nothing is learned.
        starts: (B, T) int32, first position of the sequence at each position, or None where a row is one
        sequence.
    """

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int32] | None = None

    @property
    def tokens(self) -> int:
        """Number of labels that the shifted loss uses."""
        return int(np.count_nonzero(self.labels[:, 1:] != IGNORE))


class Dataset(Protocol):
    """Rows that a sampler numbers.

    Attributes:
        truncated: number of samples that lost tokens to seq_len.
    """

    truncated: int

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """The rows of these numbers, as wide as the longest of them."""
        ...

    def sample(self, row: int) -> Sample:
        """The first sequence of a row, to be shown."""
        ...


class Rows:
    """Samples in rows of at most `seq_len` tokens: several to a row where `packing`, else one."""

    def __init__(self, samples: Sequence[Sample], seq_len: int, pad_id: int = 0, packing: bool = True) -> None:
        _check_seq_len(seq_len)
        self.samples, self.seq_len, self.pad_id, self.packing = samples, seq_len, pad_id, packing
        self.truncated = sum(sample.truncated for sample in samples)
        lengths = [len(sample.ids) for sample in samples]
        self.rows = pack(lengths, seq_len) if packing else [[i] for i in range(len(samples))]

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, row: int) -> Sample:
        return self.samples[self.rows[row][0]]

    def batch(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        content = [[self.samples[i] for i in self.rows[row]] for row in rows]
        width = max(sum(len(sample.ids) for sample in row) for row in content)
        ids = np.full((len(content), width), self.pad_id, np.int64)
        labels = np.full((len(content), width), IGNORE, np.int64)
        starts = np.zeros((len(content), width), np.int32)
        for r, row in enumerate(content):
            at = 0
            for sample in row:
                end = at + len(sample.ids)
                ids[r, at:end], labels[r, at:end], starts[r, at:end] = sample.ids, sample.labels, at
                labels[r, at] = IGNORE
                at = end
            starts[r, at:] = at  # padding sees padding only
        return Batch(ids, labels, starts if self.packing else None)


class Windows:
    """Running text (N,) in windows of `seq_len` tokens, every `stride`-th; the last one may be shorter.

    The default stride of seq_len - 1 predicts every token but the first exactly once. Stride 1 offers every
    crop, to be drawn at random.
    """

    truncated = 0

    def __init__(
        self,
        ids: npt.ArrayLike,
        seq_len: int,
        stride: int | None = None,
        pad_id: int = 0,
        where: str = "text",
    ) -> None:
        _check_seq_len(seq_len)
        self.ids = np.asarray(ids, np.int32)
        self.seq_len, self.stride, self.pad_id, self.where = seq_len, stride or seq_len - 1, pad_id, where
        if len(self.ids) < 2:
            raise DataError(f"{where}: {len(self.ids)} tokens; two are the least that predict anything")

    def __len__(self) -> int:
        return max(1, -(-(len(self.ids) - self.seq_len) // self.stride) + 1)

    def sample(self, row: int) -> Sample:
        window = self.ids[row * self.stride : row * self.stride + self.seq_len]
        return Sample(window, window, self.where)

    def batch(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        windows = [self.sample(int(row)).ids for row in rows]
        width = max(map(len, windows))
        ids = np.full((len(windows), width), self.pad_id, np.int64)
        labels = np.full((len(windows), width), IGNORE, np.int64)
        for r, window in enumerate(windows):
            ids[r, : len(window)] = labels[r, : len(window)] = window
        labels[:, 0] = IGNORE
        return Batch(ids, labels)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices whose lengths fit into `capacity`: each goes, in order, where it leaves the least room.

    Of equally full rows the one opened last takes it, so the outcome depends on the lengths alone.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where some row has r free places: the tightest fit is one bit operation away
    for i, length in enumerate(lengths):
        if length > capacity:
            raise UsageError(f"pack: sequence {i} has {length} tokens, a row takes {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def build(
    source: Source,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    mask_prompt: bool = True,
    packing: bool = True,
    crops: bool = False,
) -> Rows | Windows:
    """The rows of a source: windows of plain text (every crop with `crops`), else packed or padded samples.

    Raises DataError naming the sample that can't be used.
    """
    _check_seq_len(seq_len)
    pad = next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
    if source.plain:
        parts = [render(record, tokenizer).ids for record in source.records]
        where = source.records[0].where
        return Windows(np.concatenate(parts), seq_len, 1 if crops else None, pad, where)
    samples = [render(record, tokenizer, seq_len, mask_prompt) for record in source.records]
    return Rows(samples, seq_len, pad, packing)


def batches(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Every row once, in order: for evaluation."""
    if batch_size < 1:
        raise ConfigError("batch_size", f"is {batch_size}; one sequence at a time is the least")
    for first in range(0, len(dataset), batch_size):
        yield dataset.batch(range(first, min(first + batch_size, len(dataset))))


def _check_seq_len(seq_len: int) -> None:
    if seq_len < 2:
        raise ConfigError("seq_len", f"is {seq_len}; two tokens are the least that predict anything")
