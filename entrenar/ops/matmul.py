"""Matrix products."""

from __future__ import annotations

import numpy as np

from entrenar.backend import cpu
from entrenar.errors import DTypeError, ShapeError
from entrenar.ops._arrays import rows, unbroadcast
from entrenar.tensor import FLOAT32, Array, Tensor, Vjp, op


@op(method="__matmul__", reflected="__rmatmul__", half=("b",))
def matmul(a: Tensor, b: Tensor) -> tuple[Array, Vjp]:
    """a (..., M, K) @ b (..., K, N) -> (..., M, N), as NumPy's: batch dimensions broadcast, a vector is a row
    or column.

    b may be frozen float16 or bfloat16 storage.
    """
    sa, sb = a.shape, b.shape
    if not sa or not sb or sa[-1] != sb[-2 if len(sb) > 1 else 0]:
        raise ShapeError(f"matmul: {sa} @ {sb}; needed are (..., M, K) @ (..., K, N)")
    x = a.data if a.ndim > 1 else a.data[None, :]
    y = b.data if b.ndim > 1 else b.data[:, None]
    if y.ndim > 2:
        try:
            batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        except ValueError:
            raise ShapeError(f"matmul: {sa} @ {sb}: the batch axes do not broadcast") from None
        x = np.broadcast_to(x, (*batch, *x.shape[-2:]))
        y = np.broadcast_to(y, (*batch, *y.shape[-2:]))
    need_a, need_b = a.requires_grad, b.requires_grad
    if need_b and y.dtype != FLOAT32:
        raise DTypeError(f"matmul: {y.dtype} storage {sb} is for frozen weights and has no gradient")
    product = cpu.matmul(x, y)
    matrices, sx, sy = product.shape, (1, *sa)[-max(2, len(sa)) :], sb if len(sb) > 1 else (*sb, 1)

    def vjp(g: Array) -> tuple[Array | None, ...]:
        g = g.reshape(matrices)
        da = db = None
        if need_a:
            da = unbroadcast(cpu.matmul(g, y, trans_b=True), sx).reshape(sa)
        if need_b and y.ndim == 2:
            db = cpu.matmul(rows(x), rows(g), trans_a=True).reshape(sb)
        elif need_b:
            db = unbroadcast(cpu.matmul(x, g, trans_a=True), sy).reshape(sb)
        return da, db

    return product.reshape((*matrices[:-2], *sa[-2:-1], *(sb[-1:] if len(sb) > 1 else ()))), vjp
