"""The decoder: embedding, layers, final norm. No model's name and no option is tested here; `build` chose the parts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from entrenar.models.dtype import Compute
from entrenar.models.spec import RopeSpec
from entrenar.nn.attention import Attention, Context
from entrenar.nn.cache import KVCache
from entrenar.nn.layers import Embedding, RMSNorm
from entrenar.nn.mlp import GatedMlp
from entrenar.nn.module import Module
from entrenar.tensor import Tensor, checkpoint


class DecoderLayer(Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        input_layernorm: RMSNorm,
        self_attn: Attention,
        post_attention_layernorm: RMSNorm,
        mlp: GatedMlp,
    ) -> None:
        self.input_layernorm = input_layernorm
        self.self_attn = self_attn
        self.post_attention_layernorm = post_attention_layernorm
        self.mlp = mlp

    def __call__(self, x: Tensor, context: Context, index: int) -> Tensor:
        x = self.self_attn(x, self.input_layernorm, context, index)
        return self.mlp(x, self.post_attention_layernorm)


class Decoder(Module):
    """Token ids (B, T) -> hidden states (B, T, d) after the final norm.

    Attributes:
        compute: "f32" or "bf16", the type of all that flows from layer to layer.
        recompute: how many layers, from the first, keep only their input and run again in the backward pass. By the
            time their turn comes, the last layers have given back what they kept.
    """

    def __init__(self, embed_tokens: Embedding, layers: list[DecoderLayer], norm: RMSNorm, rope: RopeSpec) -> None:
        self.embed_tokens = embed_tokens
        self.layers = layers
        self.norm = norm
        self.compute: Compute = "f32"
        self.recompute = 0
        self._rope = RotaryTable(rope)

    def __call__(
        self, ids: NDArray[np.int64], starts: NDArray[np.int32] | None = None, cache: KVCache | None = None
    ) -> Tensor:
        tokens = ids.shape[1]
        past = 0 if cache is None else cache.length
        cos, sin = self._rope(past, past + tokens)
        context = Context(cos, sin, starts, cache)
        x = self.embed_tokens(ids, self.compute)
        for index, layer in enumerate(self.layers):
            x = checkpoint(layer, x, context, index) if index < self.recompute else layer(x, context, index)
        if cache is not None:
            cache.advance(tokens)
        return self.norm(x)


class RotaryTable:
    """cos and sin of position · frequency, (positions, rotary_dim/2) f32, computed in f64 and grown on demand."""

    def __init__(self, rope: RopeSpec) -> None:
        self._inv_freq = rope.inv_freq
        self._cos = self._sin = np.empty((0, len(rope.inv_freq)), np.float32)

    def __call__(self, begin: int, end: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        if end > len(self._cos):
            rows = max(end, 2 * len(self._cos), 64)
            angles = np.arange(rows, dtype=np.float64)[:, None] * self._inv_freq
            self._cos = np.cos(angles).astype(np.float32)
            self._sin = np.sin(angles).astype(np.float32)
        return self._cos[begin:end], self._sin[begin:end]
