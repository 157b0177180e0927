"""Self-attention with rotary embeddings and grouped queries; q, k and v from one fused projection or from three."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entrenar import ops
from entrenar.nn.cache import KVCache
from entrenar.nn.layers import Linear
from entrenar.nn.module import Module
from entrenar.tensor import Tensor


@dataclass(frozen=True)
class Sizes:
    """What attention must know of a model's shape."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int  # tokens that a query sees, itself included; 0: all before it


@dataclass(frozen=True)
class Context:
    """What all layers share in one forward pass.

    Attributes:
        cos, sin: rotary tables (T, rotary_dim/2) f32 of the tokens' positions.
        starts: (B, T) int32, the first position that each token may see (packed sequences); None: all.
        cache: keys and values of earlier tokens, while generating.
    """

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    starts: NDArray[np.int32] | None = None
    cache: KVCache | None = None


class Attention(Module):
    """softmax(q·kᵀ/√d + causal mask)·v, projected by o_proj.

    Args:
        inputs: what q, k and v come from, by module name: three projections, as in Llama, or one whose rows are q,
            then k, then v, as in Phi-3.
    """

    def __init__(self, sizes: Sizes, inputs: Mapping[str, Linear], o_proj: Linear) -> None:
        self.sizes = sizes
        vars(self).update(inputs)
        self._inputs = tuple(inputs.values())
        self.o_proj = o_proj

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d) -> q (B, T, heads·head_dim), k and v (B, T, kv_heads·head_dim)."""
        if len(self._inputs) == 3:
            q_proj, k_proj, v_proj = self._inputs
            return q_proj(x), k_proj(x), v_proj(x)
        (qkv_proj,) = self._inputs
        qkv = qkv_proj(x)
        q_end = self.sizes.heads * self.sizes.head_dim
        k_end = q_end + self.sizes.kv_heads * self.sizes.head_dim
        return qkv[..., :q_end], qkv[..., q_end:k_end], qkv[..., k_end:]

    def __call__(self, x: Tensor, context: Context, layer: int) -> Tensor:
        s = self.sizes
        batch, tokens, _ = x.shape
        q, k, v = self.project(x)
        q = ops.rope(q.reshape(batch, tokens, s.heads, s.head_dim), context.cos, context.sin)
        k = ops.rope(k.reshape(batch, tokens, s.kv_heads, s.head_dim), context.cos, context.sin)
        v = v.reshape(batch, tokens, s.kv_heads, s.head_dim)
        if context.cache is not None:
            k, v = context.cache.extend(layer, k, v)
        out = ops.attention(
            q, k, v, scale=1 / math.sqrt(s.head_dim), causal=True, window=s.window, starts=context.starts
        )
        return self.o_proj(out.reshape(batch, tokens, s.heads * s.head_dim))
