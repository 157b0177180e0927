"""Rows of a table by id."""

from __future__ import annotations

import numpy.typing as npt

from entrenar.backend import cpu
from entrenar.errors import ShapeError
from entrenar.ops._arrays import as_ids, check_gradient, contiguous
from entrenar.ops.cast import type_named
from entrenar.ops.parts import Weight
from entrenar.tensor import Array, Vjp, op


@op(half=("weight",))
def embedding(weight: Weight, ids: npt.ArrayLike, dtype: str = "f32") -> tuple[Array, Vjp]:
    """weight[ids] as "f32" or "bf16": weight (V, D), float16 or packed where frozen, ids integers of any shape.

    An id outside 0 … V - 1 is an error that names it.
    """
    if weight.ndim != 2:
        raise ShapeError(f"embedding: weight {weight.shape}; needed is (V, D)")
    check_gradient("embedding", weight)
    rows, vocab = as_ids("embedding", ids), weight.shape[0]
    out = weight.rows(rows, type_named("embedding", dtype))
    return out, lambda g: (lambda held: cpu.embedding_backward(contiguous(g), rows, vocab, held),)
