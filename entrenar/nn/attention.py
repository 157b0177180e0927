"""Self-attention with rotary embeddings and grouped queries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from entrenar import ops
from entrenar.errors import GraphError
from entrenar.nn.cache import KVCache
from entrenar.nn.layers import Linear, RMSNorm, project
from entrenar.nn.module import Module
from entrenar.tensor import Tensor


@dataclass(frozen=True)
class Sizes:
    """What attention must know of a model's shape."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int  # tokens that a query sees, itself included; 0: all before it

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)


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

    def __call__(self, x: Tensor, norm: RMSNorm, context: Context, layer: int) -> Tensor:
        """x + attention(norm(x)), x (B, T, d)."""
        qkv = project(x, self._inputs, norm=norm)
        out = self._attend(qkv, context) if context.cache is None else self._attend_past(qkv, context, layer)
        return project(out, [self.o_proj], residual=x)

    def _attend(self, qkv: Tensor, context: Context) -> Tensor:
        s = self.sizes
        return ops.rope_attention(
            qkv, s.heads, s.kv_heads, context.cos, context.sin, s.scale, window=s.window, starts=context.starts
        )

    def _attend_past(self, qkv: Tensor, context: Context, layer: int) -> Tensor:
        """The same with the cache's tokens before these; leaves nothing on the tape, and turns q and k in place."""
        if qkv.requires_grad:
            raise GraphError("attention: a cache keeps no gradients; run the model under no_grad()")
        s, cpu = self.sizes, qkv.backend
        heads = qkv.data.reshape(*qkv.shape[:2], s.heads + 2 * s.kv_heads, s.head_dim)
        cpu.rope_(heads[:, :, : s.heads + s.kv_heads], context.cos, context.sin)
        q, k, v = np.split(heads, (s.heads, s.heads + s.kv_heads), axis=2)
        assert context.cache is not None
        k, v = context.cache.extend(layer, k, v)
        out, _ = cpu.attention(q, k, v, s.scale, True, s.window, context.starts)
        return Tensor(out.reshape(*qkv.shape[:2], s.heads * s.head_dim))
