"""Activation functions."""

from __future__ import annotations

from entrenar.backend import cpu
from entrenar.errors import ShapeError, UsageError
from entrenar.ops._arrays import contiguous, like, normal_axes, rows
from entrenar.tensor import Array, Tensor, Vjp, op


def _elementwise(name: str, x: Tensor) -> tuple[Array, Vjp]:
    data = contiguous(x.data)
    return cpu.unary(name, data), lambda g: (cpu.unary_backward(name, data, contiguous(g)),)


@op()
def relu(x: Tensor) -> tuple[Array, Vjp]:
    """max(x, 0); the gradient at 0 is 0."""
    return _elementwise("relu", x)


@op()
def gelu(x: Tensor, approximate: str = "none") -> tuple[Array, Vjp]:
    """x Φ(x), with the normal distribution Φ by erf, or by tanh where approximate="tanh" (as GPT-2)."""
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    if approximate not in names:
        raise UsageError(f"gelu: approximate={approximate!r}; give 'none' or 'tanh'")
    return _elementwise(names[approximate], x)


@op()
def silu(x: Tensor) -> tuple[Array, Vjp]:
    """x sigmoid(x), also called swish."""
    return _elementwise("silu", x)


swish = silu


@op(flow=("gate", "up"))
def swiglu(gate: Tensor, up: Tensor) -> tuple[Array, Vjp]:
    """silu(gate) * up, both of one shape: the middle of a gated MLP."""
    if gate.shape != up.shape:
        raise ShapeError(f"swiglu: gate {gate.shape} and up {up.shape} differ")
    a, b = contiguous(gate.data), contiguous(up.data)
    return cpu.swiglu(a, b), lambda g: cpu.swiglu_backward(contiguous(g), a, b)


@op(flow=("x",))
def gated(x: Tensor) -> tuple[Array, Vjp]:
    """silu(gate) * up of x (..., 2·d), gate beside up: `swiglu` of its halves, of which no copy is made."""
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ShapeError(f"gated: x {x.shape}; needed is (..., 2·d)")
    data, width, shape = rows(x.data), x.shape[-1] // 2, x.shape

    def halves(x: Array) -> tuple[Array, Array]:
        return x[:, :width], x[:, width:]

    def vjp(g: Array) -> tuple[Array]:
        dx = like(data)
        cpu.swiglu_backward(rows(g), *halves(data), into=halves(dx))
        return (dx.reshape(shape),)

    return cpu.swiglu(*halves(data)).reshape(*shape[:-1], width), vjp


@op()
def softmax(x: Tensor, axis: int = -1) -> tuple[Array, Vjp]:
    """exp(x) / sum(exp(x)) along `axis`."""
    (normal,) = normal_axes("softmax", axis, x.ndim)
    y = cpu.softmax(contiguous(x.data.swapaxes(normal, -1)))

    def vjp(g: Array) -> tuple[Array]:
        return (cpu.softmax_backward(y, contiguous(g.swapaxes(normal, -1))).swapaxes(normal, -1),)

    return y.swapaxes(normal, -1), vjp
