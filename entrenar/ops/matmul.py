"""Matrix products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from entrenar.backend import cpu
from entrenar.errors import DTypeError, ShapeError
from entrenar.ops._arrays import contiguous, rows, unbroadcast
from entrenar.tensor import FLOAT32, Array, Tensor, Vjp, op


@op(method="__matmul__", reflected="__rmatmul__", half="b")
def matmul(a: Tensor, b: Tensor) -> tuple[Array, Vjp]:
    """a (..., M, K) @ b (..., K, N) -> (..., M, N), as NumPy's: batch dimensions broadcast, a vector is a row
    or column.

    b may be frozen float16 or bfloat16 storage.
    """
    sa, sb = a.shape, b.shape
    if not sa or not sb or sa[-1] != sb[-2 if len(sb) > 1 else 0]:
        raise ShapeError(f"matmul: {sa} @ {sb}; needed are (..., M, K) @ (..., K, N)")
    x = a.data if a.ndim > 1 else a.data[None, :]
    y = b.data if b.ndim > 1 else b.data[:, None]
    if y.ndim > 2:
        try:
            batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        except ValueError:
            raise ShapeError(f"matmul: {sa} @ {sb}: the batch axes do not broadcast") from None
        x = np.broadcast_to(x, (*batch, *x.shape[-2:]))
        y = np.broadcast_to(y, (*batch, *y.shape[-2:]))
    need_a, need_b = a.requires_grad, b.requires_grad
    if need_b and y.dtype != FLOAT32:
        raise DTypeError(f"matmul: {y.dtype} storage {sb} is for frozen weights and has no gradient")
    product = cpu.matmul(x, y)
    matrices, sx, sy = product.shape, (1, *sa)[-max(2, len(sa)) :], sb if len(sb) > 1 else (*sb, 1)

    def vjp(g: Array) -> tuple[Array | None, ...]:
        g = g.reshape(matrices)
        da = db = None
        if need_a:
            da = unbroadcast(cpu.matmul(g, y, trans_b=True), sx).reshape(sa)
        if need_b and y.ndim == 2:
            db = cpu.matmul(rows(x), rows(g), trans_a=True).reshape(sb)
        elif need_b:
            db = unbroadcast(cpu.matmul(x, g, trans_a=True), sy).reshape(sb)
        return da, db

    return product.reshape((*matrices[:-2], *sa[-2:-1], *(sb[-1:] if len(sb) > 1 else ()))), vjp


Lora = tuple[Tensor, Tensor, float] | tuple[Tensor, Tensor, float, Tensor]


@op(half="weight")
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, lora: Lora | None = None
) -> tuple[Array, Vjp]:
    """x Wᵀ + b + s (x Aᵀ) Bᵀ, one node with a fused way back.

    x (..., in), weight (out, in), float16 or bfloat16 where frozen, bias (out,).
    lora: (A (r, in), B (out, r), s), or (A, B, s, x_lora) where x_lora (..., in) stands for x in the low-rank
        part (x after dropout).
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"linear: x {x.shape}, weight {weight.shape}; needed are (..., in) and (out, in)")
    d_out = weight.shape[0]
    if bias is not None and bias.shape != (d_out,):
        raise ShapeError(f"linear: bias {bias.shape} with a weight {weight.shape}; needed is ({d_out},)")
    if weight.requires_grad and weight.dtype != FLOAT32:
        raise DTypeError(f"linear: a {weight.dtype} weight is frozen storage and has no gradient")
    w = weight.data
    x2 = rows(x.data)
    out = cpu.matmul(x2, w, trans_b=True)
    if bias is not None:
        out = cpu.binary("add", out, bias.data)
    need_x, need_w, need_bias = x.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
    shape, has_bias, x_kept = x.shape, bias is not None, x2 if need_w else None
    low_back = None
    if lora is not None:
        low_back = _low_rank(x, x2, out, lora)

    def vjp(g: Array) -> list[Array | None]:
        g2 = rows(g)
        dx = cpu.matmul(g2, w) if need_x else None
        grads = [dx, cpu.matmul(g2, x_kept, trans_a=True) if x_kept is not None else None]
        if has_bias:
            grads.append(cpu.sum(g2, (0,)) if need_bias else None)
        if low_back is not None:
            grads += low_back(g2, dx)
        if dx is not None:
            grads[0] = dx.reshape(shape)
        return grads

    return out.reshape(*shape[:-1], d_out), vjp


def _low_rank(
    x: Tensor, x2: Array, out: Array, lora: Lora
) -> Callable[[Array, Array | None], list[Array | None]]:
    """out += s (x Aᵀ) Bᵀ in place.

    Returns the way back: g (N, out) and dx, into which it adds -> [dA, dB]; with x_lora [dA, dB, dx_lora].
    """
    (a, b), scale = lora[:2], lora[2]
    x_lora = lora[3] if len(lora) == 4 else None
    d_in, d_out = x2.shape[1], out.shape[1]
    if a.ndim != 2 or a.shape[1] != d_in or b.shape != (d_out, a.shape[0]):
        raise ShapeError(f"linear: lora A {a.shape} and B {b.shape}; needed are (r, {d_in}) and ({d_out}, r)")
    if x_lora is not None and x_lora.shape != x.shape:
        raise ShapeError(f"linear: lora input {x_lora.shape} for x {x.shape}")
    x_low = x2 if x_lora is None else rows(x_lora.data)
    wa, wb = contiguous(a.data), contiguous(b.data)
    low = cpu.matmul(x_low, wa, trans_b=True)  # (N, r), with s in it
    cpu.scale_(low, scale)
    cpu.matmul(low, wb, trans_b=True, out=out, accumulate=True)
    need_a, need_b = a.requires_grad, b.requires_grad
    own_input, need_input = x_lora is not None, x_lora is not None and x_lora.requires_grad
    shape = x.shape

    def back(g: Array, dx: Array | None) -> list[Array | None]:
        dlow = cpu.matmul(g, wb)  # (N, r)
        cpu.scale_(dlow, scale)
        grads = [
            cpu.matmul(dlow, x_low, trans_a=True) if need_a else None,
            cpu.matmul(g, low, trans_a=True) if need_b else None,
        ]
        if own_input:
            grads.append(cpu.matmul(dlow, wa).reshape(shape) if need_input else None)
        elif dx is not None:
            cpu.matmul(dlow, wa, out=dx, accumulate=True)
        return grads

    return back
