"""The KV cache: keys and values of the tokens already seen, one buffer pair a layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from entrenar.tensor import Array


class KVCache:
    """Room for `capacity` tokens at first, doubled when it is full; a layer's k and v are (B, room, kv_heads,
    head_dim) of type `dtype`, the one that the model computes in."""

    def __init__(
        self, layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: np.dtype[Any]
    ) -> None:
        shape = (batch, capacity, kv_heads, head_dim)
        self._k = [np.empty(shape, dtype) for _ in range(layers)]
        self._v = [np.empty(shape, dtype) for _ in range(layers)]
        self.length = 0  # tokens held in every layer

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Appends k, v (B, T, kv_heads, head_dim) after the first `length` tokens; returns all of them, as views."""
        end = self.length + k.shape[1]
        for held, new in ((self._k, k), (self._v, v)):
            if end > held[layer].shape[1]:
                held[layer] = _wider(held[layer], max(end, 2 * held[layer].shape[1]))
            held[layer][:, self.length : end] = new
        return self._k[layer][:, :end], self._v[layer][:, :end]

    def advance(self, tokens: int) -> None:
        """Makes the tokens appended to every layer part of the past."""
        self.length += tokens


def _wider(held: Array, room: int) -> Array:
    batch, tokens, *head = held.shape
    wide = np.empty((batch, room, *head), held.dtype)
    wide[:, :tokens] = held
    return wide
