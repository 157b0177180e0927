"""The KV cache: keys and values of the tokens already seen, one buffer pair a layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from entrenar.tensor import Tensor


class KVCache:
    """Room for `capacity` tokens at first, doubled when it is full; a layer's k and v are (B, room, kv_heads,
    head_dim) f32."""

    def __init__(self, layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int) -> None:
        shape = (batch, capacity, kv_heads, head_dim)
        self._k = [np.empty(shape, np.float32) for _ in range(layers)]
        self._v = [np.empty(shape, np.float32) for _ in range(layers)]
        self.length = 0  # tokens held in every layer

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v (B, T, kv_heads, head_dim) after the first `length` tokens; returns all of them, as views."""
        end = self.length + k.shape[1]
        for held, new in ((self._k, k), (self._v, v)):
            if end > held[layer].shape[1]:
                held[layer] = _wider(held[layer], max(end, 2 * held[layer].shape[1]))
            held[layer][:, self.length : end] = new.data
        return Tensor(self._k[layer][:, :end]), Tensor(self._v[layer][:, :end])

    def advance(self, tokens: int) -> None:
        """Makes the tokens appended to every layer part of the past."""
        self.length += tokens


def _wider(held: NDArray[np.float32], room: int) -> NDArray[np.float32]:
    batch, tokens, *head = held.shape
    wide = np.empty((batch, room, *head), np.float32)
    wide[:, :tokens] = held
    return wide
