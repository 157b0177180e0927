"""The small layers: a norm, an embedding, and the linear layer that an adapter may extend."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar import ops
from entrenar.nn.lora import LowRank
from entrenar.nn.module import Module
from entrenar.tensor import Tensor


class RMSNorm(Module):
    """x (…, d) · weight (d,) / rms(x); arXiv 1910.07467."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Embedding(Module):
    """Rows of weight (vocab, d), f32 or 16 bit."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, ids: NDArray[np.int64]) -> Tensor:
        return ops.embedding(self.weight, ids)


class Linear(Module):
    """x (…, in) · weight (out, in)ᵀ + bias (out,), plus the adapter's low-rank product where there is one.

    `weight` is f32 or bf16, trainable or frozen, or frozen f16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.lora: LowRank | None = None

    def __call__(self, x: Tensor) -> Tensor:
        lora: tuple[Any, ...] | None = None if self.lora is None else self.lora.operands(x)
        return ops.linear(x, self.weight, self.bias, lora=lora)
