"""DoRA (arXiv 2402.09353): the weight's direction is W + s·B·A, and the length of each of its rows is trained apart.

The layer computes m/‖W + s·B·A‖ ⊙ (W + s·B·A)·x + bias, with m (out,) and the norm of each row. As PEFT has it, the
norm is a constant in the gradient, and dropout acts on all but W·x alone: with x̃ for the dropped x, a layer is
W·x + (gain - 1) ⊙ W·x̃ + gain ⊙ s·B·A·x̃ + bias, with gain = m/‖W + s·B·A‖.

The norm never needs W + s·B·A as a matrix: ‖w + s·b·A‖² = ‖w‖² + 2s·b·(A·w) + s²·b·(A·Aᵀ)·b for a row w of W, b of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from entrenar import ops
from entrenar.ops.parts import Weight
from entrenar.tensor import Tensor, default_rng

if TYPE_CHECKING:
    from entrenar.nn.layers import Linear, RMSNorm

ROWS = 1 << 20  # elements of a weight, or of B, that are in f32 or float64 at a time


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
    change = np.empty(len(b.data))
    step = max(1, ROWS // len(gram))
    for begin in range(0, len(change), step):
        some = slice(begin, begin + step)
        rows = b.data[some].astype(np.float64)
        change[some] = 2 * scale * np.einsum("or,ro->o", rows, aw[:, some])
        change[some] += scale * scale * np.einsum("os,os->o", rows @ gram, rows)
    return change


def project(x: Tensor, linears: Sequence[Linear], norm: RMSNorm | None, gated: bool, dropout: float) -> Tensor:
    """The layers' results side by side, of one input, as `entrenar.nn.layers.project` has it; some are DoRA's.

    All of them are one fused product u, and what DoRA adds is a factor for each of its columns. With dropout u reads h
    itself in W·h and dropped h in the low-rank part, so u - z with z = W·(h - dropped h) is what the factor is for.
    """
    parts = [linear.part()._replace(bias=None) for linear in linears]
    masks = default_rng.state_dict()
    u = ops.projection(
        x, parts, norm=None if norm is None else (norm.weight, norm.eps), gated=gated, dropout=dropout
    )
    gain, bias = ops.concat([_gain(linear) for linear in linears]), _bias(linears)
    if not dropout:
        return ops.affine(u, gain, bias)
    with default_rng.replay(masks):
        z = _not_dropped(ops.gated(x) if gated else x if norm is None else norm(x), linears, dropout)
    u = u + _negative(z)  # the old one may go
    return ops.affine(u, gain, bias) + z


def _not_dropped(h: Tensor, linears: Sequence[Linear], dropout: float) -> Tensor:
    """W·(h - dropped h) of each layer, drawing the masks that the low-rank parts have; 0 where there is none."""
    results = []
    for linear in linears:
        if linear.lora is None:
            results.append(Tensor(np.zeros((*h.shape[:-1], linear.weight.shape[0]), h.dtype)))
        else:
            results.append(ops.linear(h + _negative(ops.dropout(h, dropout)), linear.weight))
    return results[0] if len(results) == 1 else ops.concat(results, -1)


def _negative(x: Tensor) -> Tensor:
    """-x of either type."""
    return ops.affine(x, Tensor(np.full(x.shape[-1], -1, np.float32)))


def _gain(linear: Linear) -> Tensor:
    """The factor of each of a layer's columns, (out,); 1 without DoRA."""
    lora = linear.lora
    if lora is None or lora.magnitude is None:
        return Tensor(np.ones(linear.weight.shape[0], np.float32))
    return lora.magnitude / Tensor(lora.row_norms(linear.weight))


def _bias(linears: Sequence[Linear]) -> Tensor | None:
    """The layers' biases side by side, 0 where one has none; None where no layer has one."""
    if all(linear.bias is None for linear in linears):
        return None
    zeros = [Tensor(np.zeros(linear.weight.shape[0], np.float32)) for linear in linears]
    return ops.concat([zero if one.bias is None else one.bias for one, zero in zip(linears, zeros, strict=True)])
