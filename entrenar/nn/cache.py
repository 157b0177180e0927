"""The KV cache: keys and values of the tokens already seen, one buffer pair a layer."""

from __future__ import annotations

import numpy as np

from entrenar.tensor import Tensor


class KVCache:
    """Room for `capacity` tokens; k and v are (layers, B, capacity, kv_heads, head_dim) f32."""

    def __init__(self, layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int) -> None:
        shape = (batch, capacity, kv_heads, head_dim)
        self._k = [np.empty(shape, np.float32) for _ in range(layers)]
        self._v = [np.empty(shape, np.float32) for _ in range(layers)]
        self.length = 0  # tokens held in every layer

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v (B, T, kv_heads, head_dim) after the first `length` tokens; returns all of them, as views."""
        end = self.length + k.shape[1]
        self._k[layer][:, self.length : end] = k.data
        self._v[layer][:, self.length : end] = v.data
        return Tensor(self._k[layer][:, :end]), Tensor(self._v[layer][:, :end])

    def advance(self, tokens: int) -> None:
        """Makes the tokens appended to every layer part of the past."""
        self.length += tokens
