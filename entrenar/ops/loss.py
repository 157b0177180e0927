"""Losses."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from entrenar.backend import cpu
from entrenar.errors import DataError, ShapeError, UsageError
from entrenar.ops._arrays import as_ids, rows
from entrenar.ops.parts import Gradients, Part, Weights
from entrenar.tensor import FLOAT32, Array, Tensor, Vjp, op, taping

LOGITS = 160 << 20  # bytes of logits at a time: 512 rows of a vocabulary of 151,936 in bf16
MIN_ROWS = 256  # with fewer, reading the weights costs more than multiplying by them


@op()
def cross_entropy(
    logits: Tensor, labels: npt.ArrayLike, ignore_index: int = -100, denominator: float | None = None
) -> tuple[Array, Vjp]:
    """Sum over positions of -log softmax(logits)[label], divided by `denominator`: a scalar, in nats.

    logits (..., V), labels (...) integers; positions with the label `ignore_index` count nothing.
    denominator: the number of positions that count for None. Give one for gradient accumulation.

    Raises:
        DataError: no position counts, or a label is outside 0 … V - 1.
    """
    if logits.ndim < 1:
        raise ShapeError(f"cross_entropy: logits {logits.shape}; needed are (..., V)")
    shape = logits.shape
    ids, _, denominator = _targets("cross_entropy", labels, shape[:-1], shape[-1], ignore_index, denominator)
    flat = rows(logits.data)
    losses, lse = cpu.cross_entropy(flat, ids, ignore_index)
    out = np.asarray(losses.sum(dtype=np.float64) / denominator, FLOAT32)

    def vjp(g: Array) -> tuple[Array]:
        each = np.full(len(ids), g / denominator, FLOAT32)
        return (cpu.cross_entropy_backward(each, flat, ids, lse, ignore_index).reshape(shape),)

    return out, vjp


@op(half=("part",), flow=("x",))
def linear_cross_entropy(
    x: Tensor,
    part: Part,
    labels: npt.ArrayLike,
    ignore_index: int = -100,
    denominator: float | None = None,
    at_once: int | None = None,
) -> tuple[Array, Vjp]:
    """`cross_entropy` of x's projection by one part, (..., V), which exists for some rows at a time only.

    x (..., d), float32 or bfloat16, labels (...). Rows with the label `ignore_index` cost nothing. The gradients of x
    and of what is trainable in the part are made on the way, and are what is kept for the way back.
    at_once: rows whose logits exist together, `chunk_rows` for None.

    Raises:
        DataError: no position counts, or a label is outside 0 … V - 1.
    """
    if x.ndim < 1:
        raise ShapeError(f"linear_cross_entropy: x {x.shape}; needed is (..., d)")
    name, shape = "linear_cross_entropy", x.shape
    weights = Weights(name, [part], shape[-1])
    ids, counted, denominator = _targets(name, labels, shape[:-1], weights.d_out, ignore_index, denominator)
    h = rows(x.data)
    where = None if counted.all() else np.flatnonzero(counted)
    if where is not None:
        h, ids = h[where], ids[where]
    train = taping()
    dh = cpu.buffer(h.shape, h.dtype) if train and x.requires_grad else None
    need_low = dh is not None or weights.need_a
    grads: Gradients | None = None
    total = 0.0
    step = at_once or chunk_rows(len(h), weights.d_out * h.itemsize)
    room = cpu.buffer((min(step, len(h)), weights.d_out), h.dtype)
    for begin in range(0, max(len(h), 1), step):  # once for no rows: the gradients of none are zeros
        some, dlogits = h[begin : begin + step], room[: len(h) - begin]
        low = weights.low(some)
        weights.forward(some, low, dlogits)
        losses = cpu.cross_entropy_gradient_(dlogits, ids[begin : begin + step], 1 / denominator)
        total += float(losses.sum(dtype=np.float64))
        if not train:
            continue
        dlow = weights.low_backward(dlogits) if need_low else None
        if dh is not None:
            weights.input_gradient(dlogits, dlow, dh[begin : begin + step])
        grads = weights.gradients(dlogits, some, None, low, dlow, into=grads)
    del room

    def vjp(g: Array) -> list[Array | None]:
        factor = float(g)
        dx = None if dh is None else _times(dh, factor)
        if dx is not None and where is not None:
            dx, some = np.zeros((math.prod(shape[:-1]), shape[-1]), dx.dtype), dx
            dx[where] = some
        found = [] if grads is None else weights.in_order(grads)
        return [dx if dx is None else dx.reshape(shape), *(d if d is None else _times(d, factor) for d in found)]

    return np.asarray(total / denominator, FLOAT32), vjp


def _times(x: Array, factor: float) -> Array:
    """x times the gradient of the loss, in place: only this way back holds x, and it is walked once."""
    return x if factor == 1 else cpu.scale_(x, factor)


def chunk_rows(count: int, row_bytes: int) -> int:
    """Rows at a time: chunks of about the same length, as few as LOGITS allows, and none below MIN_ROWS."""
    chunks = max(1, -(-count // max(MIN_ROWS, LOGITS // row_bytes)))
    return max(1, -(-count // chunks))


def _targets(
    name: str, labels: npt.ArrayLike, shape: tuple[int, ...], vocab: int, ignore_index: int, denominator: float | None
) -> tuple[Array, Array, float]:
    """Labels (N,), which of them count, and what the sum of their losses is divided by."""
    ids = as_ids(name, labels)
    if ids.shape != shape:
        raise ShapeError(f"{name}: labels {ids.shape} for rows {shape}; each needs one")
    ids = ids.reshape(-1)
    counted = ids != ignore_index
    wrong = ids[counted & ((ids < 0) | (ids >= vocab))]
    if wrong.size:
        raise DataError(f"{name}: label {wrong[0]} is outside 0 … {vocab - 1} and not {ignore_index}")
    if denominator is None:
        denominator = int(np.count_nonzero(counted))
        if not denominator:
            raise DataError(f"{name}: all {ids.size} labels are {ignore_index}; nothing to learn from")
    if not denominator > 0:
        raise UsageError(f"{name}: denominator {denominator}; give a number above 0")
    return ids, counted, denominator
