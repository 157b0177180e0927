"""The operations' forward functions in float64 NumPy, from their definitions; shapes as in entrenar.ops.

Gradients are checked against central differences of these, see `gradient`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray


def gradient(fn: Callable[..., Array], xs: Sequence[Array], g: Array, which: int) -> Array:
    """d sum(fn(*xs) * g) / d xs[which] by central differences; about nine digits in float64."""
    xs = [np.array(x, np.float64) for x in xs]
    x = xs[which]
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        value = x[i]
        h = 1e-5 * max(1.0, abs(value))
        x[i] = value + h
        up = np.array(fn(*xs))  # a copy: it may be a view of x
        x[i] = value - h
        down = np.array(fn(*xs))
        x[i] = value
        out[i] = np.sum((up - down) * g) / (2 * h)
    return out


def error(actual: Array, expected: Array) -> float:
    """max |actual - expected| / max |expected|."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    if expected.size == 0:
        return 0.0
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0)


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    return weight * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) + bias


def rope(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Each pair as a complex number, turned by its angle."""
    half = cos.shape[-1]
    pair = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    turn = np.broadcast_to(cos.astype(np.float64) + 1j * sin, (*x.shape[:2], half))
    y = x.copy()
    for i, (a, b) in enumerate(pair):
        z = (x[..., a] + 1j * x[..., b]) * turn[..., None, i]
        y[..., a], y[..., b] = z.real, z.imag
    return y


def attention(
    q: Array, k: Array, v: Array, scale: float, causal: bool = True, window: int = 0,
    starts: Array | None = None,
) -> Array:
    """One query at a time, over the keys that it sees."""
    (batch, queries, heads, _), (_, keys, kv_heads, _) = q.shape, k.shape
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(batch, queries, heads):
        position = t + keys - queries
        seen = [
            s
            for s in range(keys)
            if (not causal or s <= position)
            and (window == 0 or s > position - window)
            and (starts is None or s >= starts[b, t])
        ]
        head = h // (heads // kv_heads)
        p = softmax(np.array([scale * q[b, t, h] @ k[b, s, head] for s in seen]), 0)
        out[b, t, h] = sum(weight * v[b, s, head] for weight, s in zip(p, seen, strict=True))
    return out


def cross_entropy(logits: Array, labels: Array, ignore_index: int, denominator: float | None) -> Array:
    losses = [
        math.log(np.exp(row - row.max()).sum()) + row.max() - row[label]
        for row, label in zip(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), strict=True)
        if label != ignore_index
    ]
    return np.array(sum(losses) / (denominator or len(losses)))


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = np.einsum("...i,oi->...o", x, weight)
    return y if bias is None else y + bias
