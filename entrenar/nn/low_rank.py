"""What an adapter adds to one layer: two low-rank factors beside a matrix or a table, and DoRA's magnitude."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from entrenar import ops
from entrenar.errors import AdapterError
from entrenar.nn import dora
from entrenar.ops.parts import Weight
from entrenar.tensor import Tensor

Matrix: TypeAlias = NDArray[np.float32]


class LowRank:
    """The adapter of one linear layer: scale · (dropout(x) · Aᵀ) · Bᵀ, with A (r, in) and B (out, r) in f32.

    `magnitude` (out,) f32 makes it DoRA, see `entrenar.nn.dora`.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float, magnitude: Tensor | None = None) -> None:
        self.a = a
        self.b = b
        self.scale = scale
        self.dropout = dropout
        self.magnitude = magnitude
        self.training = True
        self._norms = dora.Norms()
        self._held: tuple[tuple[int, ...], Matrix] | None = None

    @classmethod
    def init(cls, out: int, in_: int, rank: int, scale: float, dropout: float, rng: np.random.Generator) -> LowRank:
        """A uniform in ±1/√in (Kaiming with a = √5, as PEFT), B zero: the layer starts as it was."""
        a = (rng.random((rank, in_), dtype=np.float32) * 2 - 1) * np.float32(1 / math.sqrt(in_))
        b = np.zeros((out, rank), np.float32)
        return cls(Tensor(a, requires_grad=True), Tensor(b, requires_grad=True), scale, dropout)

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained, under PEFT's names."""
        yield "lora_A.weight", self.a
        yield "lora_B.weight", self.b
        if self.magnitude is not None:
            yield "lora_magnitude_vector", self.magnitude

    def times(self, factor: float) -> LowRank:
        """The same tensors, counting `factor` times as much."""
        if factor == 1:
            return self
        return LowRank(self.a, self.b, self.scale * factor, self.dropout, self.magnitude)

    def factors(self) -> ops.Lora:
        return ops.Lora(self.a, self.b, self.scale)

    @property
    def active_dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def row_norms(self, weight: Weight) -> Matrix:
        """‖W + scale·B·A‖ of each row, (out,) f32, of the layer's own weight; while training always computed anew."""
        now = (weight.version, self.a.version, self.b.version)
        if self.training or self._held is None or self._held[0] != now:
            self._held = now, self._norms(weight, self.a, self.b, self.scale)
        return self._held[1]

    def delta(self) -> Matrix:
        """scale · B·A, (out, in) f32: what LoRA adds to the weight."""
        with_scale: Matrix = self.b.backend.matmul(self.b.data, self.a.data)
        with_scale *= np.float32(self.scale)
        return with_scale

    def merged(self, weight: Matrix) -> Matrix:
        """The weight (out, in) f32 with the adapter in it, as a new array."""
        changed = self.delta()
        changed += weight
        if self.magnitude is not None:
            changed *= (self.magnitude.data / np.linalg.norm(changed, axis=1))[:, None]
        return changed


class LowRankTable:
    """The adapter of an embedding: scale · A[ids] · Bᵀ, with A (vocab, r) and B (d, r) in f32.

    A lies as it is read, row by row; PEFT's files have it the other way round.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self.a = a
        self.b = b
        self.scale = scale

    @classmethod
    def init(cls, vocab: int, width: int, rank: int, scale: float, rng: np.random.Generator) -> LowRankTable:
        """A zero and B normal, as PEFT: the embedding starts as it was."""
        a, b = np.zeros((vocab, rank), np.float32), rng.standard_normal((width, rank), np.float32)
        return cls(Tensor(a, requires_grad=True), Tensor(b, requires_grad=True), scale)

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        yield "lora_embedding_A", self.a
        yield "lora_embedding_B", self.b

    def times(self, factor: float) -> LowRankTable:
        return self if factor == 1 else LowRankTable(self.a, self.b, self.scale * factor)

    def __call__(self, ids: NDArray[np.int64], compute: str) -> Tensor:
        """What it adds to the embedding's rows, (…, d) of type `compute`."""
        low = ops.embedding(self.a, ids) * np.float32(self.scale)
        return ops.cast(ops.linear(low, self.b), compute)

    def merged(self, weight: Matrix) -> Matrix:
        """The table (vocab, d) f32 with the adapter in it, as a new array."""
        changed: Matrix = self.a.backend.matmul(self.a.data, self.b.data, trans_b=True)
        changed *= np.float32(self.scale)
        changed += weight
        return changed


Factors: TypeAlias = LowRank | LowRankTable


def combined(path: str, terms: Sequence[tuple[Factors, float]]) -> Factors:
    """The frozen sum of adapters of one layer, each counting its factor times (DoRA once): ranks side by side.

    Raises:
        AdapterError: one of several is DoRA, whose magnitudes have no sum.
    """
    (first, _), *more = terms
    if isinstance(first, LowRank) and first.magnitude is not None and not more:
        return LowRank(first.a.detach(), first.b.detach(), first.scale, 0.0, first.magnitude.detach())
    if any(isinstance(term, LowRank) and term.magnitude is not None for term, _ in terms):
        raise AdapterError(f"{path}: DoRA adapters have no sum; set one at a time, or merge one into the weights")
    axis = 0 if isinstance(first, LowRank) else 1
    a = Tensor(np.concatenate([term.a.data for term, _ in terms], axis))
    b = Tensor(np.concatenate([term.b.data * np.float32(term.scale * factor) for term, factor in terms], 1))
    return LowRank(a, b, 1.0, 0.0) if axis == 0 else LowRankTable(a, b, 1.0)
