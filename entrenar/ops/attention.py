"""Rotary positions and attention. Layout: B batch, T queries, S keys, H heads, D head size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from entrenar.backend import cpu
from entrenar.errors import ShapeError
from entrenar.ops._arrays import as_ids, contiguous
from entrenar.tensor import FLOAT32, Array, Tensor, Vjp, op


@op()
def rope(x: Tensor, cos: npt.ArrayLike, sin: npt.ArrayLike, interleaved: bool = False) -> tuple[Array, Vjp]:
    """Rotate pairs of x (B, T, H, D) by the angles of their positions.

    cos, sin: (T, rot/2) or (B, T, rot/2), rot ≤ D even; what is beyond rot passes through.
    interleaved: pairs are (2i, 2i+1); otherwise (i, i + rot/2), as Hugging Face stores Llama.
    """
    c, s = (np.ascontiguousarray(angle, FLOAT32) for angle in (cos, sin))
    if x.ndim != 4 or c.shape != s.shape or c.shape[:-1] not in (x.shape[1:2], x.shape[:2]):
        needed = "(B, T, H, D) and twice (T, rot/2) or (B, T, rot/2)"
        raise ShapeError(f"rope: x {x.shape}, cos {c.shape}, sin {s.shape}; needed are {needed}")
    if 2 * c.shape[-1] > x.shape[3]:
        raise ShapeError(f"rope: cos {c.shape} turns {2 * c.shape[-1]} of the {x.shape[3]} values of a head")
    out = cpu.rope(contiguous(x.data), c, s, interleaved)
    return out, lambda g: (cpu.rope(contiguous(g), c, s, interleaved, inverse=True),)


@op()
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = True, window: int = 0,
    starts: npt.ArrayLike | None = None,
) -> tuple[Array, Vjp]:
    """softmax(scale · q kᵀ) v for each head, q (B, T, H, D), k and v (B, S, Hkv, D), result (B, T, H, D).

    H / Hkv query heads share a key head. The last query sits at the last key: query t has position t + S - T.
    scale: 1/sqrt(D) for None.
    causal: a query sees keys up to its own position.
    window: and, if above 0, only that many of them.
    starts: (B, T) and none before this position: where the query's own sequence begins among packed ones.
    """
    if scale is None:
        scale = max((1, *q.shape[-1:])) ** -0.5
    first = None if starts is None else as_ids("attention", starts)
    options = (scale, causal, window, first)
    qd, kd, vd = contiguous(q.data), k.data, v.data  # a slice of a cache is read where it lies
    out, lse = cpu.attention(qd, kd, vd, *options)
    return out, lambda g: cpu.attention_backward(contiguous(g), qd, kd, vd, out, lse, *options)
