"""`Part`: a linear layer as the products of a fused operation see it, and what they do with several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from entrenar.backend import cpu
from entrenar.errors import DTypeError, ShapeError, UsageError
from entrenar.ops._arrays import check_gradient, contiguous
from entrenar.quant import QTensor
from entrenar.tensor import FLOAT32, Array, Tensor

_ZERO = np.zeros(1, FLOAT32)
MAX_PARTS = 4  # each may need a term for its weight and one for its low rank, and a product has room for eight


LowInputs: TypeAlias = Callable[[int], Array]  # what the i-th low-rank part reads, (N, in)
Weight: TypeAlias = QTensor | Tensor  # a QTensor is frozen, stays packed, and is no operand on the tape
Maybe: TypeAlias = Any  # an Array, or None where nothing that is asked for depends on it


class Lora(NamedTuple):
    """scale · (x Aᵀ) Bᵀ: a (r, in) and b (out, r), float32."""

    a: Tensor
    b: Tensor
    scale: float


class Part(NamedTuple):
    """A linear layer: weight (out, in), float16 or packed where frozen; bias (out,) float32."""

    weight: Weight
    bias: Tensor | None = None
    lora: Lora | None = None


class _Block(NamedTuple):
    """Weights that lie one below the other in memory, as the one matrix that they are."""

    matrix: Array | QTensor  # (rows, in)
    columns: slice  # of the result
    trainable: bool

    @property
    def weight(self) -> Any:
        """As products take it: an Array, or what stands for a packed matrix, asked for anew because a streamed one is
        not always in memory."""
        return self.matrix.data if isinstance(self.matrix, QTensor) else self.matrix


class _Factors(NamedTuple):
    """The low-rank part of one part."""

    b: Array  # (out, r)
    scale: float
    columns: slice  # of the result
    ranks: slice  # of the low-rank products of all parts, (N, Σr)
    need_b: bool


class Gradients(NamedTuple):
    """Of all parts' operands, as products give them, float32; None where none is needed."""

    weight: list[Array | None]  # by block, (rows, in)
    bias: list[Array | None]  # one, (Σout,)
    a: list[Array | None]  # one, (Σr, in)
    b: list[Array | None]  # by low-rank part, (out, r)


class Weights:
    """The parts of one projection: h (N, in) -> (N, Σout), and the ways back.

    Attributes:
        d_in, d_out, rank: in, Σout and Σr. blocks, factors: the weights and the low-rank parts, in order.
        need_w, need_bias, need_a, need_b: whether one of that kind needs a gradient.
    """

    def __init__(self, name: str, parts: Sequence[Part], d_in: int) -> None:
        if not 1 <= len(parts) <= MAX_PARTS:
            raise UsageError(f"{name}: {len(parts)} parts; give 1 to {MAX_PARTS}")
        self.d_in, self.d_out, self.rank = d_in, 0, 0
        self.factors: list[_Factors] = []
        self._places: list[tuple[str, int, slice] | None] = []  # of the operands' gradients among all
        groups: list[list[Weight]] = []
        begins: list[int] = []
        for weight, bias, lora in parts:
            _check(name, weight, bias, lora, d_in)
            columns = slice(self.d_out, self.d_out + weight.shape[0])
            if not (groups and _follows(weight, groups[-1][-1])):
                groups.append([])
                begins.append(self.d_out)
            groups[-1].append(weight)
            rows = slice(columns.start - begins[-1], columns.stop - begins[-1])
            if isinstance(weight, Tensor):
                self._places.append(("weight", len(groups) - 1, rows) if weight.requires_grad else None)
            if bias is not None:
                self._places.append(("bias", 0, columns) if bias.requires_grad else None)
            if lora is not None:
                ranks = slice(self.rank, self.rank + lora.a.shape[0])
                self._places.append(("a", 0, ranks) if lora.a.requires_grad else None)
                self._places.append(("b", len(self.factors), slice(None)) if lora.b.requires_grad else None)
                self.factors.append(_Factors(lora.b.data, float(lora.scale), columns, ranks, lora.b.requires_grad))
                self.rank = ranks.stop
            self.d_out = columns.stop
        self.blocks = [
            _Block(_matrix(group), slice(begin, begin + sum(w.shape[0] for w in group)), group[0].requires_grad)
            for begin, group in zip(begins, groups, strict=True)
        ]  # fmt: skip
        with_bias = any(part.bias is not None for part in parts)
        self._biases = [_bias(part) for part in parts] if with_bias else []
        self._a = [part.lora.a.data for part in parts if part.lora is not None]
        needed = {place[0] for place in self._places if place}
        self.need_w, self.need_bias, self.need_a, self.need_b = (k in needed for k in ("weight", "bias", "a", "b"))

    def a(self) -> Array:
        """All A's as one matrix (Σr, in): put together where it is needed rather than kept."""
        return _as_one(self._a)

    def low(self, h: Array, inputs: LowInputs | None = None) -> Maybe:
        """s · h Aᵀ of all parts, (N, Σr) of h's type; `inputs(i)` stands for h in the i-th, where given."""
        if not self.factors:
            return None
        low = cpu.buffer((len(h), self.rank), h.dtype)
        if inputs is None:
            return self._scaled(cpu.product([(h, self.a().T)], low))
        terms = [(inputs(i), a.T, f.ranks.start) for i, (f, a) in enumerate(zip(self.factors, self._a, strict=True))]
        return self._scaled(cpu.product(terms, low))

    def low_backward(self, g: Array) -> Maybe:
        """s · g B of all parts, (N, Σr) of g's type: the gradient of h Aᵀ."""
        if not self.factors:
            return None
        dlow = cpu.buffer((len(g), self.rank), g.dtype)
        return self._scaled(cpu.product([(g[:, f.columns], f.b, f.ranks.start) for f in self.factors], dlow))

    def _scaled(self, low: Array) -> Array:
        scales = {factor.scale for factor in self.factors}
        if len(scales) == 1:
            return cpu.scale_(low, scales.pop())
        each = np.concatenate([np.full(f.ranks.stop - f.ranks.start, f.scale, FLOAT32) for f in self.factors])
        low[...] = low.astype(FLOAT32) * each
        return low

    def forward(self, h: Array, low: Maybe, out: Array, residual: Array | None = None) -> None:
        """out (N, Σout) = h Wᵀ + low Bᵀ + bias + residual: one product."""
        terms = [(h, block.weight.T, block.columns.start) for block in self.blocks]
        if low is not None:
            terms += [(low[:, f.ranks], f.b.T, f.columns.start) for f in self.factors]
        bias = contiguous(_as_one(self._biases)) if self._biases else None
        cpu.product(terms, out, bias=bias, residual=residual)

    def input_gradient(self, g: Array, dlow: Maybe, out: Array | None = None) -> Array:
        """g W + dlow A: one product, (N, in) of g's type, into `out` where given."""
        terms = [(g[:, block.columns], block.weight) for block in self.blocks]
        if dlow is not None:
            terms.append((dlow, self.a()))
        return cpu.product(terms, cpu.buffer((len(g), self.d_in), g.dtype) if out is None else out)

    def gradients(
        self,
        g: Array,
        h: Maybe,
        inputs: LowInputs | None,
        low: Maybe,
        dlow: Maybe,
        into: Gradients | None = None,
    ) -> Gradients:
        """Of the operands that need one; added to `into` where given. Weights and A read h, A dlow, and B low."""
        more = into is not None
        held = into or self._room()
        for block, dw in zip(self.blocks, held.weight, strict=True):
            if dw is not None:
                cpu.product([(g[:, block.columns].T, h)], dw, accumulate=more)
        if self.need_bias:
            column_sums = cpu.sum(g, (0,))
            held.bias[0] = column_sums if held.bias[0] is None else cpu.add_(held.bias[0], column_sums)
        da = held.a[0]
        if da is not None and inputs is None:
            cpu.product([(dlow.T, h)], da, accumulate=more)
        elif da is not None and inputs is not None:
            for i, factor in enumerate(self.factors):
                cpu.product([(dlow[:, factor.ranks].T, inputs(i))], da[factor.ranks], accumulate=more)
        for factor, db in zip(self.factors, held.b, strict=True):
            if db is not None:
                cpu.product([(g[:, factor.columns].T, low[:, factor.ranks])], db, accumulate=more)
        return held

    def _room(self) -> Gradients:
        """Gradients still to be written."""
        return Gradients(
            [cpu.buffer(block.matrix.shape) if block.trainable else None for block in self.blocks],
            [None],
            [cpu.buffer((self.rank, self.d_in)) if self.need_a else None],
            [cpu.buffer(factor.b.shape) if factor.need_b else None for factor in self.factors],
        )

    def in_order(self, held: Gradients) -> list[Array | None]:
        """One gradient an operand, in the order of the parts: weight, bias, a and b of each; views."""
        return [place and getattr(held, place[0])[place[1]][place[2]] for place in self._places]


def _check(name: str, weight: Weight, bias: Tensor | None, lora: Lora | None, d_in: int) -> None:
    if weight.ndim != 2 or weight.shape[1] != d_in:
        raise ShapeError(f"{name}: a weight {weight.shape} for an input (..., {d_in}); needed is (out, {d_in})")
    d_out = weight.shape[0]
    check_gradient(name, weight)
    if bias is not None and bias.shape != (d_out,):
        raise ShapeError(f"{name}: bias {bias.shape} with a weight {weight.shape}; needed is ({d_out},)")
    if lora is not None:
        a, b = lora.a.shape, lora.b.shape
        if len(a) != 2 or a[1] != d_in or b != (d_out, a[0]):
            raise ShapeError(f"{name}: lora A {a} and B {b}; needed are (r, {d_in}) and ({d_out}, r)")
    for what, tensor in (("bias", bias), ("lora A", lora and lora.a), ("lora B", lora and lora.b)):
        if tensor is not None and tensor.dtype != FLOAT32:
            raise DTypeError(f'{name}: {what} is {tensor.dtype}; give float32, see ops.cast(x, "f32")')


def _bias(part: Part) -> Array:
    return np.broadcast_to(_ZERO, part.weight.shape[:1]) if part.bias is None else part.bias.data


def _follows(b: Weight, a: Weight) -> bool:
    """Whether b's rows lie right behind a's in one array, and both are trainable or neither."""
    if isinstance(a, QTensor) or isinstance(b, QTensor):
        return False
    return a.requires_grad == b.requires_grad and cpu.joined((a.data, b.data)) is not None


def _matrix(group: list[Weight]) -> Array | QTensor:
    """Weights of one block: a packed one, which is always alone, or tensors that follow each other."""
    return group[0] if isinstance(group[0], QTensor) else _as_one([weight.data for weight in group])


def _as_one(arrays: list[Array]) -> Array:
    """Arrays below each other as one: a view where they are consecutive rows of one array, else a copy."""
    if len(arrays) == 1:
        return arrays[0]
    view = cpu.joined(arrays)
    return np.concatenate(arrays) if view is None else view
