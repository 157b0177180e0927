"""Operations that only move values: reshape, transpose, slice, concat. The first three give views."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from entrenar.errors import DTypeError, ShapeError
from entrenar.ops._arrays import contiguous, normal_axes
from entrenar.tensor import Array, Tensor, Vjp, op

_INDICES = (int, np.integer, builtins.slice, type(None), type(...))


def _flat(values: tuple[int | tuple[int, ...], ...]) -> tuple[int, ...]:
    """f(2, 3) and f((2, 3)) mean the same."""
    unpacked = values[0] if len(values) == 1 and isinstance(values[0], (tuple, list)) else values
    return tuple(operator.index(v) for v in unpacked)  # type: ignore[arg-type]


@op(method="reshape", flow=("x",))
def reshape(x: Tensor, *shape: int | tuple[int, ...]) -> tuple[Array, Vjp]:
    """The same values in order under another shape; one extent may be -1."""
    old, new = x.shape, _flat(shape)
    try:
        out = contiguous(x.data).reshape(new)
    except ValueError:
        raise ShapeError(f"reshape: {old} ({x.size} elements) into {new}") from None
    return out, lambda g: (contiguous(g).reshape(old),)


@op(method="transpose", flow=("x",))
def transpose(x: Tensor, *axes: int | tuple[int, ...]) -> tuple[Array, Vjp]:
    """Permute the axes as NumPy does; without `axes` reverse them."""
    order = _flat(axes) or tuple(reversed(range(x.ndim)))
    if len(order) != x.ndim:
        raise ShapeError(f"transpose: {order} is no permutation of the axes of {x.shape}")
    order = normal_axes("transpose", order, x.ndim)
    inverse = tuple(order.index(a) for a in range(x.ndim))
    return x.data.transpose(order), lambda g: (g.transpose(inverse),)


@op(method="__getitem__", flow=("x",))
def slice(x: Tensor, key: Any) -> tuple[Array, Vjp]:
    """x[key] for integers, slices of any step, ... and None."""
    keys = key if isinstance(key, tuple) else (key,)
    for k in keys:
        if isinstance(k, bool) or not isinstance(k, _INDICES):
            raise DTypeError(f"slice: an index of type {type(k).__name__}; give integers, slices, ..., None")
    try:
        out = np.asarray(x.data[keys])
    except (IndexError, ValueError) as error:
        raise ShapeError(f"slice: {key} of {x.shape}: {error}") from None
    shape = x.shape

    def vjp(g: Array) -> tuple[Array]:
        dx = np.zeros(shape, g.dtype)
        dx[keys] = g
        return (dx,)

    return out, vjp


@op(flow=("tensors",))
def concat(tensors: Sequence[Tensor], axis: int = 0) -> tuple[Array, Vjp]:
    """Join along an axis that exists; the other axes must agree."""
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(t, Tensor) for t in tensors):
        raise DTypeError("concat: give a list of Tensors")
    shapes = [t.shape for t in tensors]
    (normal,) = normal_axes("concat", axis, len(shapes[0]) if shapes else 0)
    if len({(*s[:normal], *s[normal + 1 :]) for s in shapes}) != 1 or len({len(s) for s in shapes}) != 1:
        raise ShapeError(f"concat: shapes {shapes} along axis {axis}")
    ends = np.cumsum([s[normal] for s in shapes])[:-1]
    return np.concatenate([t.data for t in tensors], normal), lambda g: np.split(g, ends, normal)

