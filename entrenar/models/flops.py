"""The useful arithmetic of a training step: what any program has to compute, however it does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from entrenar.models.spec import ModelConfig

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM

FORWARD = 2  # FLOPs a weight and token: a multiplication and an addition
INPUT_GRADIENT = 2
WEIGHT_GRADIENT = 2
ATTENTION_FORWARD = 2  # products of visible pairs: q·k and p·v
ATTENTION = ATTENTION_FORWARD + 5  # and backward: p again, dp, dv, dq, dk


def step_flops(model: CausalLM, batch_size: int, seq_len: int) -> float:
    """FLOPs of forward and backward over (batch_size, seq_len) tokens; see `useful_flops`."""
    trained = {name: weight.data.size for name, weight in model.named_parameters()}
    return useful_flops(model.config, trained, batch_size, seq_len)


def useful_flops(config: ModelConfig, trained: Mapping[str, int], batch_size: int, seq_len: int) -> float:
    """FLOPs of forward and backward over (batch_size, seq_len) tokens.

    A token costs 4 FLOPs a weight of a frozen matrix (the head included, the embedding's look-up not), 6 a weight of a
    trained one, LoRA's factors among them. Attention costs 7 products of 2·head_dim FLOPs a head and pair of a query
    and a key that it may see. Recomputed activations, norms, activations' functions and the optimizer don't count.

    trained: elements of each trained weight; a name that is none of the model's is one of LoRA's.
    """
    shapes = config.parameter_shapes()
    sizes = {name: math.prod(shapes[name]) for name in matrices(config)}
    sizes |= {name: size for name, size in trained.items() if name not in shapes}
    token = sum(
        (FORWARD + INPUT_GRADIENT + (WEIGHT_GRADIENT if name in trained else 0)) * size for name, size in sizes.items()
    )
    return float(batch_size) * (seq_len * token + ATTENTION * attention_flops(config, seq_len))


def matrices(config: ModelConfig) -> list[str]:
    """The weights that every token is multiplied by: all linear layers' and the head's, which may be the embedding."""
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    shapes = config.parameter_shapes()
    return [name for name, shape in shapes.items() if name == head or (len(shape) == 2 and "embed_tokens" not in name)]


def attention_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of one product of all visible pairs of a sequence, in all layers."""
    pair = 2 * config.head_size * config.num_attention_heads * config.num_hidden_layers
    return float(visible_pairs(seq_len, config.sliding_window) * pair)


def visible_pairs(seq_len: int, window: int | None) -> int:
    """Pairs of a query and a key at or before it, at most `window` positions with its own."""
    hidden = max(0, seq_len - (window or seq_len))
    return (seq_len * (seq_len + 1) - hidden * (hidden + 1)) // 2
