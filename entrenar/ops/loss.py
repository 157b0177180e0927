"""Losses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from entrenar.backend import cpu
from entrenar.errors import DataError, ShapeError, UsageError
from entrenar.ops._arrays import as_ids, rows
from entrenar.tensor import FLOAT32, Array, Tensor, Vjp, op


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
    ids = as_ids("cross_entropy", labels)
    if logits.ndim < 1 or ids.shape != logits.shape[:-1]:
        raise ShapeError(f"cross_entropy: labels {ids.shape} for logits {logits.shape}, which need one a row")
    shape, vocab = logits.shape, logits.shape[-1]
    ids = ids.reshape(-1)
    counted = ids != ignore_index
    wrong = ids[counted & ((ids < 0) | (ids >= vocab))]
    if wrong.size:
        raise DataError(f"cross_entropy: label {wrong[0]} is outside 0 … {vocab - 1} and not {ignore_index}")
    if denominator is None:
        denominator = int(np.count_nonzero(counted))
        if not denominator:
            raise DataError(f"cross_entropy: all {ids.size} labels are {ignore_index}; nothing to learn from")
    if not denominator > 0:
        raise UsageError(f"cross_entropy: denominator {denominator}; give a number above 0")
    flat = rows(logits.data)
    losses, lse = cpu.cross_entropy(flat, ids, ignore_index)
    out = np.asarray(losses.sum(dtype=np.float64) / denominator, FLOAT32)

    def vjp(g: Array) -> tuple[Array]:
        each = np.full(len(ids), g / denominator, FLOAT32)
        return (cpu.cross_entropy_backward(each, flat, ids, lse, ignore_index).reshape(shape),)

    return out, vjp
