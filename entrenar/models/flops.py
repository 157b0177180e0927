"""The useful arithmetic of a training step: what any program has to compute, however it does it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM

FORWARD = 2  # FLOPs a weight and token: a multiplication and an addition
INPUT_GRADIENT = 2
WEIGHT_GRADIENT = 2
ATTENTION = 2 + 5  # products of visible pairs: q·k and p·v forward; p again, dp, dv, dq, dk backward


def step_flops(model: CausalLM, batch_size: int, seq_len: int) -> float:
    """FLOPs of forward and backward over (batch_size, seq_len) tokens.

    A token costs 4 FLOPs a weight of a frozen matrix (the head included, the embedding's look-up not), 6 a weight of a
    trained one, LoRA's factors among them. Attention costs 7 products of 2·head_dim FLOPs a head and pair of a query
    and a key that it may see. Recomputed activations, norms, activations' functions and the optimizer don't count.
    """
    config = model.config
    trained = {name: weight.data.shape for name, weight in model.named_parameters()}
    shapes = config.parameter_shapes()
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    matrices = [name for name, shape in shapes.items() if len(shape) == 2 and "embed_tokens" not in name]
    factors = [name for name in trained if name not in shapes]
    token = 0
    for name in {*matrices, head, *factors}:
        shape = trained.get(name) or shapes[name]
        needed = FORWARD + INPUT_GRADIENT + (WEIGHT_GRADIENT if name in trained else 0)
        token += needed * math.prod(shape)
    pair = ATTENTION * 2 * config.head_size * config.num_attention_heads * config.num_hidden_layers
    return float(batch_size) * (seq_len * token + visible_pairs(seq_len, config.sliding_window) * pair)


def visible_pairs(seq_len: int, window: int | None) -> int:
    """Pairs of a query and a key at or before it, at most `window` positions with its own."""
    hidden = max(0, seq_len - (window or seq_len))
    return (seq_len * (seq_len + 1) - hidden * (hidden + 1)) // 2
