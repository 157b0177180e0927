"""Dropout."""

from __future__ import annotations

from entrenar.backend import cpu
from entrenar.errors import UsageError
from entrenar.ops._arrays import contiguous
from entrenar.tensor import Array, Tensor, Vjp, default_rng, op


@op(flow=("x",))
def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> tuple[Array, Vjp]:
    """Zero each value with probability p in [0, 1) and divide the others by 1 - p; x itself outside training.

    Draws from `default_rng`, one number an element in the order of the elements.
    """
    if not 0 <= p < 1:
        raise UsageError(f"dropout: p={p}; give 0 ≤ p < 1")
    if p == 0 or not training:
        return x.data.view(), lambda g: (g,)
    seed, offset = default_rng.take(x.size)
    out = cpu.dropout(contiguous(x.data), p, seed, offset)
    return out, lambda g: (cpu.dropout(contiguous(g), p, seed, offset),)
