"""A factor and a shift for each column."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from entrenar.backend import cpu
from entrenar.errors import ShapeError
from entrenar.ops._arrays import like, rows
from entrenar.tensor import FLOAT32, Array, Tensor, Vjp, op

AT_ONCE = 1 << 18  # elements that are in f32 at a time


@op(flow=("x",))
def affine(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> tuple[Array, Vjp]:
    """x ⊙ scale + shift, in f32 and rounded once to x's type. x (..., d), scale and shift (d,).

    Kept for the way back of the scale: the result where that tells x, as it does without a shift and a 0 in the scale,
    and which the next operation may hold anyway; else x.
    """
    for what, vector in (("scale", scale), ("shift", shift)):
        if vector is not None and (x.ndim < 1 or vector.shape != x.shape[-1:]):
            raise ShapeError(f"affine: {what} {vector.shape} for x {x.shape}; it must match x's last axis")
    factor, data = scale.data, rows(x.data)
    out = like(data)
    for some in _chunks(data):
        scaled = cpu.binary("mul", cpu.convert(data[some], FLOAT32), factor)
        out[some] = cpu.convert(scaled if shift is None else cpu.binary("add", scaled, shift.data), x.dtype)
    shape, need_x, need_scale = x.shape, x.requires_grad, scale.requires_grad
    has_shift, need_shift = shift is not None, shift is not None and shift.requires_grad
    from_out = not has_shift and bool(np.all(factor))
    kept = (out if from_out else data) if need_scale else None

    def vjp(g: Array) -> list[Array | None]:
        g = rows(g)
        dx = like(g) if need_x else None
        dscale, dshift = np.zeros(len(factor)), np.zeros(len(factor))
        for some in _chunks(g):
            part = cpu.convert(g[some], FLOAT32)
            if dx is not None:
                dx[some] = cpu.convert(cpu.binary("mul", part, factor), g.dtype)
            if kept is not None:
                dscale += cpu.sum(cpu.binary("mul", part, cpu.convert(kept[some], FLOAT32)), (0,))
            if need_shift:
                dshift += cpu.sum(part, (0,))
        if from_out:
            dscale /= factor
        found: list[Array | None] = [dx if dx is None else dx.reshape(shape)]
        found.append(dscale.astype(FLOAT32) if need_scale else None)
        return [*found, dshift.astype(FLOAT32) if need_shift else None] if has_shift else found

    return out.reshape(shape), vjp


def _chunks(x: Array) -> Iterator[slice]:
    """Rows of x, as many as come to AT_ONCE elements at a time."""
    step = max(1, AT_ONCE // max(1, x.shape[1]))
    return (slice(begin, begin + step) for begin in range(0, len(x), step))
