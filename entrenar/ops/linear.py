"""Linear layers as fused operations: a product with what stands before and behind it.

A layer of a decoder has four: q, k and v of a norm; the attention's output and a residual; gate and up of a norm; down
of silu(gate)·up and a residual. What stands before the product is built again in the way back instead of kept; what
stands behind it is part of the product, as the low-rank parts are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from entrenar.backend import cpu
from entrenar.errors import ShapeError, UsageError
from entrenar.ops._arrays import contiguous, like, rows
from entrenar.ops.parts import Lora, LowInputs, Maybe, Part, Weight, Weights
from entrenar.tensor import Array, Tensor, Vjp, default_rng, op

__all__ = ["Lora", "Part", "linear", "projection"]


@op(half=("parts",), flow=("x", "residual"))
def projection(
    x: Tensor,
    parts: Sequence[Part],
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Array, Vjp]:
    """The parts' x Wᵀ + b + s (x Aᵀ) Bᵀ side by side, (..., Σout) of x's type, and the residual of that shape added.

    x (..., in), float32 or bfloat16; up to four parts, whose weights are one product where they are consecutive rows of
        one array.
    norm: (weight (in,), eps); the parts read rms_norm(x, weight, eps).
    gated: x is (..., 2·in), gate beside up; the parts read swiglu(gate, up).
    dropout: the chance that an element of a part's low-rank input is dropped, drawn for each such part by itself.

    Kept for the way back, as far as a gradient needs it: x, the norm's rstd (N,) and s · x Aᵀ (N, Σr).
    """
    if norm is not None and gated:
        raise UsageError("projection: the input is normed or gated, not both")
    if not 0 <= dropout < 1:
        raise UsageError(f"projection: dropout={dropout}; give 0 ≤ dropout < 1")
    return _project("projection", x, parts, norm, gated, residual, dropout)


@op(half=("weight", "lora"), flow=("x",))
def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | tuple[Tensor, Tensor, float, Tensor] | None = None,
) -> tuple[Array, Vjp]:
    """x Wᵀ + b + s (x Aᵀ) Bᵀ, one node with a fused way back.

    x (..., in), float32 or bfloat16, as is the result; weight (out, in), float16 or packed where frozen, bias (out,).
    lora: (A (r, in), B (out, r), s), or (A, B, s, x_lora) where x_lora (..., in) stands for x in the low-rank
        part (x after dropout).
    """
    if lora is None:
        return _project("linear", x, [Part(weight, bias)])
    return _project("linear", x, [Part(weight, bias, Lora(*lora[:3]))], x_lora=lora[3] if len(lora) == 4 else None)


def _project(
    name: str,
    x: Tensor,
    parts: Sequence[Part],
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    dropout: float = 0.0,
    x_lora: Tensor | None = None,
) -> tuple[Array, Vjp]:
    """Gradients come in this order: x, each part's weight, bias, a and b, the norm's weight, residual, x_lora."""
    if x.ndim < 1 or (gated and x.shape[-1] % 2):
        raise ShapeError(f"{name}: x {x.shape}; needed is (..., {'2·in' if gated else 'in'})")
    before = _Gate(x) if gated else _Norm(name, x, *norm) if norm is not None else _Plain(x)
    weights = Weights(name, parts, before.width)
    shape, out_shape = x.shape, (*x.shape[:-1], weights.d_out)
    if residual is not None and residual.shape != out_shape:
        raise ShapeError(f"{name}: residual {residual.shape} for a result {out_shape}")
    if x_lora is not None and (x_lora.shape, x_lora.dtype) != (shape, x.dtype):
        raise ShapeError(f"{name}: lora input {x_lora.shape} {x_lora.dtype} for x {shape} {x.dtype}")

    h = before.forward()
    inputs_of: Callable[[Array], LowInputs] | None = None  # of the low-rank parts, where it is not h for all
    drop = None
    x_low: Maybe = None if x_lora is None else rows(x_lora.data)
    if x_lora is not None:
        inputs_of = lambda h: lambda i: x_low  # noqa: E731
    elif dropout and weights.factors:
        drop = _Dropout(dropout, h.size, len(weights.factors))
        inputs_of = drop.of
    low: Maybe = weights.low(h, inputs_of and inputs_of(h))
    out = cpu.buffer((len(h), weights.d_out), h.dtype)
    weights.forward(h, low, out, None if residual is None else rows(residual.data))

    need_dh = before.need_gradient
    need_h = weights.need_w or (weights.need_a and x_lora is None)
    kept = before if need_h or (need_dh and before.reads_x) else None
    low = low if weights.need_b else None
    need_x_lora = x_lora is not None and x_lora.requires_grad
    need_dlow = need_dh or need_x_lora or weights.need_a
    has_norm, has_residual, has_x_lora = norm is not None, residual is not None, x_lora is not None
    need_residual = residual is not None and residual.requires_grad

    def vjp(g: Array) -> list[Array | None]:
        g2 = rows(g)
        dlow: Maybe = weights.low_backward(g2) if need_dlow else None
        dx: Maybe = None
        dnorm: Maybe = None
        h: Maybe = None
        if need_dh:
            dx = weights.input_gradient(g2, dlow if inputs_of is None else None)
            if drop is not None:
                drop.backward(weights, dlow, dx)
            if kept is not None:
                dx, dnorm, h = kept.backward(dx, need_h)
        elif need_h and kept is not None:
            h = kept.forward()
        grads = weights.gradients(g2, h, inputs_of and inputs_of(h), low, dlow)
        found = [dx if dx is None else dx.reshape(shape), *weights.in_order(grads)]
        if has_norm:
            found.append(dnorm)
        if has_residual:
            found.append(g if need_residual else None)
        if has_x_lora:
            found.append(cpu.product([(dlow, weights.a())], like(x_low)).reshape(shape) if need_x_lora else None)
        return found

    return out.reshape(out_shape), vjp


# ---- what stands before the product: x -> h (N, width), and back


class _Plain:
    """h = x."""

    reads_x = False  # on its way back

    def __init__(self, x: Tensor) -> None:
        self.x = rows(x.data)
        self.width = self.x.shape[1]
        self.need_gradient = x.requires_grad

    def forward(self) -> Array:
        return self.x

    def backward(self, dh: Array, need_h: bool) -> tuple[Maybe, Maybe, Maybe]:
        """dx, the gradient of a norm's weight, and h again if it is needed; dh may be overwritten."""
        return dh, None, self.x


class _Gate(_Plain):
    """h = silu(gate)·up of x = gate beside up."""

    reads_x = True

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self.width //= 2

    def _halves(self, x: Array) -> tuple[Array, Array]:
        return x[:, : self.width], x[:, self.width :]

    def forward(self) -> Array:
        return cpu.swiglu(*self._halves(self.x))

    def backward(self, dh: Array, need_h: bool) -> tuple[Maybe, Maybe, Maybe]:
        dx, h = like(self.x), dh if need_h else None
        cpu.swiglu_backward(dh, *self._halves(self.x), into=self._halves(dx), h=h)
        return dx, None, h


class _Norm(_Plain):
    """h = rms_norm(x)·weight."""

    reads_x = True

    def __init__(self, name: str, x: Tensor, weight: Tensor, eps: float) -> None:
        super().__init__(x)
        if weight.shape != (self.width,):
            raise ShapeError(f"{name}: norm weight {weight.shape} for x {x.shape}; it must match x's last axis")
        self.weight, self.eps = contiguous(weight.data), eps
        self.rstd: Maybe = None  # (N,), from forward
        self.need_x, self.need_weight = x.requires_grad, weight.requires_grad
        self.need_gradient = self.need_x or self.need_weight

    def forward(self) -> Array:
        h, self.rstd = cpu.rms_norm(self.x, self.weight, self.eps)
        return h

    def backward(self, dh: Array, need_h: bool) -> tuple[Maybe, Maybe, Maybe]:
        h = like(self.x) if need_h else None
        dx, dweight = cpu.rms_norm_backward(dh, self.x, self.weight, self.rstd, self.need_weight, normed=h)
        return dx if self.need_x else None, dweight, h


class _Dropout:
    """The low-rank parts' inputs after dropout, a mask each, drawn again wherever it is needed."""

    def __init__(self, p: float, size: int, count: int) -> None:
        self.p = p
        self.places = [default_rng.take(size) for _ in range(count)]  # seed and offset

    def of(self, h: Array) -> LowInputs:
        return lambda i: cpu.dropout(h, self.p, *self.places[i])

    def backward(self, weights: Weights, dlow: Array, dh: Array) -> None:
        """dh += what comes through the low-rank parts."""
        a = weights.a()
        for i, factor in enumerate(weights.factors):
            d = cpu.product([(dlow[:, factor.ranks], a[factor.ranks])], like(dh))
            cpu.add_(dh, cpu.dropout(d, self.p, *self.places[i]))
