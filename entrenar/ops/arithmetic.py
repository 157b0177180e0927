"""Elementwise arithmetic with NumPy's broadcasting, and the reductions sum and mean."""

from __future__ import annotations

import math

import numpy as np

from entrenar.backend import cpu
from entrenar.ops._arrays import contiguous, normal_axes, unbroadcast
from entrenar.tensor import FLOAT32, Array, Tensor, Vjp, op


@op(method="__add__", reflected="__radd__", flow=("a", "b"))
def add(a: Tensor, b: Tensor) -> tuple[Array, Vjp]:
    sa, sb, need_a, need_b = a.shape, b.shape, a.requires_grad, b.requires_grad

    def vjp(g: Array) -> tuple[Array | None, ...]:
        return unbroadcast(g, sa) if need_a else None, unbroadcast(g, sb) if need_b else None

    return cpu.binary("add", a.data, b.data), vjp


@op(method="__sub__", reflected="__rsub__")
def sub(a: Tensor, b: Tensor) -> tuple[Array, Vjp]:
    sa, sb, need_a, need_b = a.shape, b.shape, a.requires_grad, b.requires_grad

    def vjp(g: Array) -> tuple[Array | None, ...]:
        db = cpu.unary("neg", unbroadcast(g, sb)) if need_b else None
        return unbroadcast(g, sa) if need_a else None, db

    return cpu.binary("sub", a.data, b.data), vjp


@op(method="__mul__", reflected="__rmul__")
def mul(a: Tensor, b: Tensor) -> tuple[Array, Vjp]:
    x, y, need_a, need_b = a.data, b.data, a.requires_grad, b.requires_grad

    def vjp(g: Array) -> tuple[Array | None, ...]:
        return (
            unbroadcast(cpu.binary("mul", g, y), x.shape) if need_a else None,
            unbroadcast(cpu.binary("mul", g, x), y.shape) if need_b else None,
        )

    return cpu.binary("mul", x, y), vjp


@op(method="__truediv__", reflected="__rtruediv__")
def div(a: Tensor, b: Tensor) -> tuple[Array, Vjp]:
    x, y, need_a, need_b = a.data, b.data, a.requires_grad, b.requires_grad
    out = cpu.binary("div", x, y)

    def vjp(g: Array) -> tuple[Array | None, ...]:
        by_y = cpu.binary("div", g, y)
        return (
            unbroadcast(by_y, x.shape) if need_a else None,
            cpu.unary("neg", unbroadcast(cpu.binary("mul", by_y, out), y.shape)) if need_b else None,
        )

    return out, vjp


@op(method="__neg__")
def neg(x: Tensor) -> tuple[Array, Vjp]:
    return cpu.unary("neg", x.data), lambda g: (cpu.unary("neg", g),)


@op(method="exp")
def exp(x: Tensor) -> tuple[Array, Vjp]:
    out = cpu.unary("exp", x.data)
    return out, lambda g: (cpu.binary("mul", g, out),)


@op(method="log")
def log(x: Tensor) -> tuple[Array, Vjp]:
    """Natural logarithm; -inf at 0 and NaN below."""
    data = x.data
    return cpu.unary("log", data), lambda g: (cpu.binary("div", g, data),)


@op(method="__pow__", reflected="__rpow__")
def pow(a: Tensor, b: Tensor) -> tuple[Array, Vjp]:
    """a to the power of b. As in the limit, the gradient is 0 for a where b = 0 and for b where a = 0 ≤ b."""
    x, y, need_a, need_b = a.data, b.data, a.requires_grad, b.requires_grad
    out = cpu.binary("pow", x, y)

    def vjp(g: Array) -> tuple[Array | None, ...]:
        da = db = None
        if need_a:
            slope = cpu.binary("mul", y, cpu.binary("pow", x, cpu.binary("sub", y, np.array(1, FLOAT32))))
            slope[np.broadcast_to(y == 0, slope.shape)] = 0
            da = unbroadcast(cpu.binary("mul", g, slope), x.shape)
        if need_b:
            slope = cpu.binary("mul", out, cpu.unary("log", x))
            slope[np.broadcast_to((x == 0) & (y >= 0), slope.shape)] = 0
            db = unbroadcast(cpu.binary("mul", g, slope), y.shape)
        return da, db

    return out, vjp


@op(method="sum")
def sum(x: Tensor, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> tuple[Array, Vjp]:
    """Sum over `axis` (all of them for None)."""
    return _reduce("sum", x.data, axis, keepdims, 1.0)


@op(method="mean")
def mean(x: Tensor, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> tuple[Array, Vjp]:
    """Mean over `axis` (all of them for None); NaN over nothing."""
    count = math.prod(x.shape[a] for a in normal_axes("mean", axis, x.ndim))
    return _reduce("mean", x.data, axis, keepdims, 1 / count if count else math.nan)


def _reduce(
    name: str, x: Array, axis: int | tuple[int, ...] | None, keepdims: bool, scale: float
) -> tuple[Array, Vjp]:
    axes = normal_axes(name, axis, x.ndim)
    shape = x.shape
    kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
    out = cpu.sum(contiguous(x), axes, keepdims)
    if scale != 1:
        cpu.scale_(out, scale)

    def vjp(g: Array) -> tuple[Array]:
        g = g.reshape(kept)
        return (np.broadcast_to(g if scale == 1 else cpu.binary("mul", g, np.array(scale, FLOAT32)), shape),)

    return out, vjp
