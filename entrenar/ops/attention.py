"""Rotary positions and attention. Layout: B batch, T queries, S keys, H heads, D head size."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from entrenar.backend import cpu
from entrenar.errors import ShapeError, UsageError
from entrenar.ops._arrays import contiguous
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
    if not _fit(q.shape, k.shape, v.shape):
        raise ShapeError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape}; needed are (B, T, H, D) and twice "
            "(B, S, Hkv, D) with S ≥ T and H a multiple of Hkv"
        )
    b, t, _, d = q.shape
    if window < 0:
        raise UsageError(f"attention: window {window}; give the number of keys seen, or 0 for all")
    if scale is None:
        scale = 1 / math.sqrt(d)
    first = None
    if starts is not None:
        first = np.ascontiguousarray(starts, np.int32)
        if first.shape != (b, t):
            raise ShapeError(f"attention: starts {first.shape} for q {q.shape}; needed is (B, T)")
    qd, kd, vd = contiguous(q.data), _cache_rows(k.data), _cache_rows(v.data)
    out, lse = cpu.attention(qd, kd, vd, scale, causal, window, first)

    def vjp(g: Array) -> tuple[Array, Array, Array]:
        args = (contiguous(kd), contiguous(vd), out, lse, scale, causal, window, first)
        return cpu.attention_backward(contiguous(g), qd, *args)

    return out, vjp


def _fit(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> bool:
    if len(q) != 4 or len(k) != 4 or k != v:
        return False
    (b, t, h, d), (kb, s, hkv, kd) = q, k
    return (b, d) == (kb, kd) and d > 0 and s >= t and hkv > 0 and h % hkv == 0


def _cache_rows(x: Array) -> Array:
    """Keys or values as the kernel takes them: contiguous but between sequences, like a slice of a cache."""
    return x if x.shape[0] and x[0].flags.c_contiguous else contiguous(x)
