"""DoRA (arXiv 2402.09353): the weight's direction is W + s·B·A, and the length of each of its rows is trained apart.

The layer computes m/‖W + s·B·A‖ ⊙ (W + s·B·A)·x + bias, with m (out,) and the norm of each row. As PEFT has it, the
norm is a constant in the gradient, and dropout acts on all but W·x alone.

The norm never needs W + s·B·A as a matrix: ‖w + s·b·A‖² = ‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·b for a row w of W, b of B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from entrenar import ops
from entrenar.ops.parts import Weight
from entrenar.tensor import Tensor

if TYPE_CHECKING:
    from entrenar.nn.layers import Linear

ROWS = 1 << 20  # elements of a weight that are squared at a time


class Norms:
    """Row norms of one layer's W + s·B·A."""

    def __init__(self) -> None:
        self._squares: NDArray[np.float64] | None = None  # ‖w‖² of each row
        self._weight: tuple[Weight, int] | None = None  # of that weight, at that version

    def __call__(self, weight: Weight, a: Tensor, b: Tensor, scale: float) -> NDArray[np.float32]:
        """(out,) f32."""
        if self._squares is None or self._weight != (weight, weight.version):
            self._squares, self._weight = squared_rows(weight), (weight, weight.version)
        squares = self._squares + _change(weight, a, b, scale)
        return np.sqrt(np.maximum(squares, 0)).astype(np.float32)


def squared_rows(weight: Weight) -> NDArray[np.float64]:
    """‖w‖² of each row of weight (out, in), a few rows in f32 at a time."""
    out, in_ = weight.shape
    squares = np.empty(out)
    step = max(1, ROWS // in_)
    for begin in range(0, out, step):
        rows = weight.rows(np.arange(begin, min(out, begin + step)))
        squares[begin : begin + step] = np.einsum("ij,ij->i", rows, rows)
    return squares


def _change(weight: Weight, a: Tensor, b: Tensor, scale: float) -> NDArray[np.float64]:
    """2s·b·(A·w) + s²·b·(A·Aᵀ)·b for each row w, b."""
    cpu = a.backend
    aw = cpu.product([(a.data, weight.data.T)], cpu.buffer((a.shape[0], weight.shape[0])))
    gram = cpu.matmul(a.data, a.data, trans_b=True)
    rows = b.data.astype(np.float64)
    change: NDArray[np.float64] = 2 * scale * np.einsum("or,ro->o", rows, aw)
    change += scale * scale * np.einsum("or,rs,os->o", rows, gram, rows, optimize=True)
    return change


def forward(h: Tensor, linear: Linear) -> Tensor:
    """The layer's result (…, out) of its input h (…, in), of h's type."""
    lora, kind = linear.lora, "bf16" if h.dtype.itemsize == 2 else "f32"
    assert lora is not None
    assert lora.magnitude is not None
    gain = lora.magnitude / Tensor(lora.row_norms(linear.weight))
    if lora.active_dropout:
        dropped = ops.dropout(h, lora.active_dropout)
        rest = ops.cast(ops.cast(h, "f32") - ops.cast(dropped, "f32"), kind)
        out = ops.cast(ops.linear(dropped, linear.weight, None, lora.factors()), "f32") * gain
        out = out + ops.cast(ops.linear(rest, linear.weight), "f32")
    else:
        out = ops.cast(ops.linear(h, linear.weight, None, lora.factors()), "f32") * gain
    return ops.cast(out if linear.bias is None else out + linear.bias, kind)
