"""The small layers: a norm, an embedding, and the linear layer that an adapter may extend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from entrenar import ops
from entrenar.nn import dora
from entrenar.nn.low_rank import LowRank, LowRankTable
from entrenar.nn.module import Module
from entrenar.ops.parts import Weight
from entrenar.tensor import Tensor


class RMSNorm(Module):
    """x (…, d) · weight (d,) / rms(x); arXiv 1910.07467."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Embedding(Module):
    """Rows of weight (vocab, d), f32, 16 bit or packed, as type `compute`: "f32" or "bf16"."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        self.lora: LowRankTable | None = None

    def __call__(self, ids: NDArray[np.int64], compute: str) -> Tensor:
        x = ops.embedding(self.weight, ids, compute)
        return x if self.lora is None else x + self.lora(ids, compute)


class Linear(Module):
    """x (…, in) · weight (out, in)ᵀ + bias (out,), plus the adapter's low-rank product where there is one.

    `weight` is f32 or bf16, trainable or frozen, frozen f16, or packed.
    """

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.lora: LowRank | None = None

    def part(self) -> ops.Part:
        """What a fused operation takes of it."""
        return ops.Part(self.weight, self.bias, None if self.lora is None else self.lora.factors())

    def __call__(self, x: Tensor) -> Tensor:
        return project(x, [self])


def project(
    x: Tensor,
    linears: Sequence[Linear],
    *,
    norm: RMSNorm | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """The layers' results side by side, of one input: x, or its norm, or silu(gate)·up of x = gate beside up."""
    if any(has_magnitude(linear) for linear in linears):
        out = dora.project(x, linears, norm, gated, dropout_of(linears))
        return out if residual is None else out + residual
    return ops.projection(
        x,
        [linear.part() for linear in linears],
        norm=None if norm is None else (norm.weight, norm.eps),
        gated=gated,
        residual=residual,
        dropout=dropout_of(linears),
    )


def dropout_of(linears: Sequence[Linear]) -> float:
    """The chance that an element of their adapters' input is dropped now. An adapter has one for all its layers."""
    return max((linear.lora.active_dropout for linear in linears if linear.lora is not None), default=0.0)


def has_magnitude(linear: Linear) -> bool:
    """Whether its adapter is DoRA's."""
    return linear.lora is not None and linear.lora.magnitude is not None
