"""Rotary positions and attention. Layout: B batch, T queries, S keys, H heads, D head size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from entrenar.backend import cpu
from entrenar.errors import ShapeError
from entrenar.ops._arrays import as_ids, contiguous
from entrenar.tensor import FLOAT32, Array, Tensor, Vjp, op


@op(flow=("x",))
def rope(x: Tensor, cos: npt.ArrayLike, sin: npt.ArrayLike, interleaved: bool = False) -> tuple[Array, Vjp]:
    """Rotate pairs of x (B, T, H, D) by the angles of their positions.

    cos, sin: (T, rot/2) or (B, T, rot/2), rot ≤ D even; what is beyond rot passes through.
    interleaved: pairs are (2i, 2i+1); otherwise (i, i + rot/2), as Hugging Face stores Llama.
    """
    c, s = _angles("rope", x.shape, cos, sin)
    out = cpu.rope(contiguous(x.data), c, s, interleaved)
    return out, lambda g: (cpu.rope(contiguous(g), c, s, interleaved, inverse=True),)


@op(flow=("q", "k", "v"))
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


@op(flow=("qkv",))
def rope_attention(
    qkv: Tensor, heads: int, kv_heads: int, cos: npt.ArrayLike, sin: npt.ArrayLike, scale: float, window: int = 0,
    starts: npt.ArrayLike | None = None,
) -> tuple[Array, Vjp]:
    """Causal attention of q, k and v that lie beside each other, q and k turned to their positions first.

    qkv (B, T, (H + 2·Hkv)·D), float32 or bfloat16; the result is (B, T, H·D). cos, sin: as `rope` takes them, pairs
    (i, i + rot/2); scale, window, starts: as `attention` takes them.

    Kept for the way back: a copy of qkv with q and k turned, the result and the log-sum-exp (B, H, T).
    """
    if qkv.ndim != 3 or heads < 1 or kv_heads < 1 or heads % kv_heads or qkv.shape[2] % (heads + 2 * kv_heads):
        needed = f"(B, T, ({heads} + 2·{kv_heads})·D) and heads a multiple of kv_heads"
        raise ShapeError(f"rope_attention: qkv {qkv.shape} with {heads} heads on {kv_heads}; needed are {needed}")
    (batch, tokens, width), every = qkv.shape, heads + 2 * kv_heads
    d = width // every
    c, s = _angles("rope_attention", (batch, tokens, every, d), cos, sin)
    first = None if starts is None else as_ids("rope_attention", starts)
    options = (scale, True, window, first)

    def split(x: Array) -> tuple[Array, Array, Array, Array]:
        """q and k, q, k, v of x: views."""
        x = x.reshape(batch, tokens, every, d)
        turned = x[:, :, : heads + kv_heads]
        return turned, turned[:, :, :heads], turned[:, :, heads:], x[:, :, heads + kv_heads :]

    turned, q, k, v = split(cpu.copy(qkv.data))  # a copy, since what the projection gave may be looked at
    cpu.rope_(turned, c, s)
    out, lse = cpu.attention(q, k, v, *options)

    def vjp(g: Array) -> tuple[Array]:
        dqkv = cpu.buffer((batch, tokens, width), g.dtype)
        dturned, *into = split(dqkv)
        cpu.attention_backward(contiguous(g).reshape(q.shape), q, k, v, out, lse, *options, into=into)
        cpu.rope_(dturned, c, s, inverse=True)
        return (dqkv,)

    return out.reshape(batch, tokens, heads * d), vjp


def _angles(name: str, shape: tuple[int, ...], cos: npt.ArrayLike, sin: npt.ArrayLike) -> tuple[Array, Array]:
    """cos and sin as kernels take them, checked against x's shape (B, T, H, D)."""
    c, s = (np.ascontiguousarray(angle, FLOAT32) for angle in (cos, sin))
    if len(shape) != 4 or c.shape != s.shape or c.shape[:-1] not in (shape[1:2], shape[:2]):
        needed = "(B, T, H, D) and twice (T, rot/2) or (B, T, rot/2)"
        raise ShapeError(f"{name}: x {shape}, cos {c.shape}, sin {s.shape}; needed are {needed}")
    if 2 * c.shape[-1] > shape[3]:
        raise ShapeError(f"{name}: cos {c.shape} turns {2 * c.shape[-1]} of the {shape[3]} values of a head")
    return c, s
