"""Normalisation over the last axis."""

from __future__ import annotations

from entrenar.backend import cpu
from entrenar.errors import ShapeError
from entrenar.ops._arrays import contiguous
from entrenar.tensor import Array, Tensor, Vjp, op


def _check(name: str, x: Tensor, **vectors: Tensor) -> None:
    for what, vector in vectors.items():
        if x.ndim < 1 or vector.shape != x.shape[-1:]:
            raise ShapeError(f"{name}: {what} {vector.shape} for x {x.shape}; it must match x's last axis")


@op(flow=("x",))
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Array, Vjp]:
    """weight * x / sqrt(mean(x²) + eps). x (..., d), weight (d,)."""
    _check("rms_norm", x, weight=weight)
    data, w, need_w = contiguous(x.data), contiguous(weight.data), weight.requires_grad
    y, rstd = cpu.rms_norm(data, w, eps)
    return y, lambda g: cpu.rms_norm_backward(contiguous(g), data, w, rstd, need_w)


@op()
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Array, Vjp]:
    """weight * (x - mean) / sqrt(variance + eps) + bias. x (..., d), weight and bias (d,)."""
    _check("layer_norm", x, weight=weight, bias=bias)
    data, w = contiguous(x.data), contiguous(weight.data)
    y, mean, rstd = cpu.layer_norm(data, w, contiguous(bias.data), eps)
    return y, lambda g: cpu.layer_norm_backward(contiguous(g), data, w, mean, rstd)
