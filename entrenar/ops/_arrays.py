"""What several operations need of arrays: layout, broadcasting, axes and ids."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from entrenar.backend import cpu
from entrenar.errors import DTypeError, ShapeError
from entrenar.quant import QTensor
from entrenar.tensor import BFLOAT16, FLOAT32, Array, Tensor


def contiguous(x: Array) -> Array:
    """x itself if it is C-contiguous, else a copy that is; for kernels that take no strides."""
    if x.flags.c_contiguous:
        return x
    return np.ascontiguousarray(x) if x.dtype == np.float16 else cpu.copy(x)


def like(x: Array) -> Array:
    """Room for an array of x's shape and type."""
    return cpu.buffer(x.shape, x.dtype)


def rows(x: Array) -> Array:
    """(..., d) -> (N, d), contiguous."""
    return contiguous(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_gradient(name: str, weight: QTensor | Tensor) -> None:
    """Gradients of weights are f32 whatever the weight's type: float16 has none, and bfloat16 only as a leaf."""
    if isinstance(weight, QTensor) or not weight.requires_grad or weight.dtype == FLOAT32:
        return
    if weight.dtype != BFLOAT16 or not weight.is_leaf:
        raise DTypeError(f"{name}: a {weight.dtype} weight that is no bfloat16 leaf has no gradient")


def unbroadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum g over the axes along which an operand of `shape` was repeated: the gradient of broadcasting."""
    if g.shape == shape:
        return g
    extra = g.ndim - len(shape)
    repeated = tuple(i for i in range(g.ndim) if i < extra or (shape[i - extra] == 1 and g.shape[i] != 1))
    summed = cpu.sum(contiguous(g), repeated, True).reshape(shape)
    return summed if g.dtype == summed.dtype else cpu.convert(summed, g.dtype)


def normal_axes(name: str, axis: int | tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    """`axis` as a tuple of different axes from 0 to ndim - 1; None stands for all."""
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    normal = tuple(a + ndim if a < 0 else a for a in axes)
    if any(not 0 <= a < ndim for a in normal) or len(set(normal)) != len(normal):
        raise ShapeError(f"{name}: axis {axis} for a tensor of {ndim} dimensions")
    return normal


def as_ids(name: str, ids: npt.ArrayLike) -> Array:
    """A copy of token ids or labels as int64: the caller's buffer may hold the next batch before backward."""
    array = np.asarray(ids)
    if array.dtype.kind not in "iu" and array.size:
        raise DTypeError(f"{name}: ids of type {array.dtype}; give integers")
    return np.array(array, dtype=np.int64, order="C")
