"""What one layer of a step takes, from shapes alone: what it keeps for its way back, and what that needs besides.

Bytes of a micro-batch. The operations say what they keep (entrenar/ops/linear.py, attention.py, affine.py); which of
it a layer needs depends on what of it is trained, and on whether its input needs a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from entrenar.train.work import Work

FLOAT = 4  # bytes of gradients, adapters and statistics
ATTENTION, OUTPUT, MLP, DOWN = "self_attn", "o_proj", "mlp", "down_proj"


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer.

    Attributes:
        input: of its input, 0 where it keeps none; kept: besides that, where it is not computed again.
        mlp_back, attention_back: what the two halves of its way back need besides.
        mlp, attention: gradients of what is trained in each half; down: of that, what comes with the first product.
        flows: whether its result needs a gradient.
    """

    input: int
    kept: int
    mlp_back: int
    attention_back: int
    mlp: int
    attention: int
    down: int
    flows: bool


def layer_bytes(work: Work, index: int, flows: bool) -> LayerBytes:
    """flows: whether the layer's input needs a gradient."""
    config, tokens, size = work.config, work.tokens, 2 if work.compute == "bf16" else 4
    hidden, wide = config.hidden_size * size, config.intermediate_size * size  # of a token
    q, kv = config.num_attention_heads * config.head_size * size, config.kv_heads * config.head_size * size
    part = _Parts(work, f"model.layers.{index}.")
    dropout = part.dora and work.adapter is not None and work.adapter.lora_dropout > 0

    kept = sum(part.ranks.values()) * size  # x·Aᵀ
    reads = flows or part.trained(ATTENTION, but=OUTPUT) or part.trained("input_layernorm")
    if reads:  # the norm's statistic; q, k and v; the result and softmax's statistics
        kept += FLOAT + (q + 2 * kv) + q + config.num_attention_heads * FLOAT
    elif part.trained(OUTPUT):
        kept += q
    flows = reads or part.trained(OUTPUT)
    gated = flows or part.trained(MLP, but=DOWN) or part.trained("post_attention_layernorm")
    if gated:  # the norm's input and statistic
        kept += hidden + FLOAT
    if gated or part.trained(DOWN):  # gate and up
        kept += 2 * wide
    # DoRA's results before or after they are scaled; gate and up after it are there already
    kept += (q + 2 * kv) * part.has_dora(ATTENTION, but=OUTPUT) + hidden * part.has_dora(OUTPUT)
    kept += hidden * part.has_dora(DOWN) + 2 * wide * (part.has_dora(MLP, but=DOWN) and (dropout or config.mlp_bias))

    mlp_back = 3 * wide  # of silu(gate)·up and of both
    if part.has_dora(MLP):  # scaled gate and up and their gradients; dropout: and those of what is not dropped
        mlp_back = 3 * hidden + 6 * wide if dropout else hidden + 4 * wide
    return LayerBytes(
        input=tokens * hidden * reads,
        kept=tokens * kept,
        mlp_back=tokens * mlp_back,
        attention_back=tokens * 3 * hidden,
        mlp=FLOAT * part.count(MLP),
        attention=FLOAT * (part.count("") - part.count(MLP)),
        down=FLOAT * part.count(DOWN),
        flows=gated or part.trained(DOWN),
    )


class _Parts:
    """What is trained of one layer; names may be a module's or that of a half."""

    def __init__(self, work: Work, layer: str) -> None:
        self.dora = work.adapter is not None and work.adapter.use_dora
        self.counts = {name.removeprefix(layer): n for name, n in work.trained.items() if name.startswith(layer)}
        self.ranks = {p.removeprefix(layer): rank for p, (rank, _, _) in work.adapters.items() if p.startswith(layer)}

    def trained(self, name: str, but: str = "") -> bool:
        """Whether anything of that module is, leaving out another one."""
        return any(_within(self.counts, name, but))

    def has_dora(self, name: str, but: str = "") -> bool:
        return self.dora and any(_within(self.ranks, name, but))

    def count(self, name: str) -> int:
        """Trained elements."""
        return sum(self.counts[path] for path in _within(self.counts, name))


def _within(paths: Iterable[str], name: str, but: str = "") -> list[str]:
    """Those of the paths that have this module on them, leaving out those with another; all for ""."""
    split = ((path, path.split(".")) for path in paths)
    return [path for path, parts in split if (not name or name in parts) and but not in parts]
