"""What a training step takes, from shapes alone: the arrays that live at each of its moments.

Activations gather in the forward pass until the loss; in the backward pass they go layer by layer while gradients come;
at the end all gradients are there. One of these moments is the peak. docs/memory.md tells the same in words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from entrenar.backend import get_num_threads
from entrenar.models.dtype import Compute
from entrenar.models.spec import ModelConfig
from entrenar.models.storage import qtype_of
from entrenar.models.stream import StreamedQTensor, resident, streamed_layers
from entrenar.nn.lora import LoraConfig
from entrenar.ops.loss import chunk_rows
from entrenar.quant import QType
from entrenar.train.config import TrainConfig

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM

BASE = 58_000_000  # bytes of the interpreter with everything that training imports
PACKED = 8 << 20  # bytes of a product's left side that are packed at a time (A_WORDS in csrc/kernels/plan.h)
THREAD = 2 << 20  # bytes of right sides and sums that a thread works on
MOMENTS = {"adamw": 8.0, "adam": 8.0, "adamw_8bit": 2 + 8 / 256}  # bytes of optimizer state a trained weight
FLOAT = 4  # bytes of gradients, adapters and statistics

PARTS = ("process", "kernels", "weights", "adapter", "optimizer", "gradients", "activations", "layer", "logits")


@dataclass(frozen=True)
class Work:
    """A model that exists or not, and what is to be done with it.

    Attributes:
        types: the type that each weight has in memory, by name. adapter: None where all weights are trained.
        streamed: whether layers' quantized weights stay in the file; None where there is no such file.
    """

    config: ModelConfig
    types: Mapping[str, QType]
    compute: Compute
    adapter: LoraConfig | None
    training: TrainConfig
    streamed: bool | None = None

    @classmethod
    def of(cls, model: CausalLM, training: TrainConfig) -> Work:
        """The work of training a model that is loaded."""
        types = {name: qtype_of(weight) for name, weight in model.named_weights()}
        streamed = any(isinstance(weight, StreamedQTensor) for _, weight in model.named_weights()) or None
        return cls(model.config, types, model.compute, model.adapter, training, streamed)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the model's own weights."""
        return self.config.parameter_shapes()

    @cached_property
    def elements(self) -> dict[str, int]:
        """Of each of the model's own weights."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes of the model's own weights, by name."""
        return {name: self.types[name].nbytes(count) for name, count in self.elements.items()}

    @cached_property
    def resident(self) -> dict[str, int]:
        """Bytes of those in memory, by name, and of the room for streamed layers."""
        return resident(self.weights, streamed_layers(self.types) if self.streamed else {})

    @cached_property
    def adapters(self) -> dict[str, tuple[int, int, int]]:
        """Rank, input and output size of each layer's adapter, by path."""
        adapter = self.adapter
        if adapter is None:
            return {}
        chosen = ((path, shape) for path, shape in self._linears() if adapter.selects(path))
        return {path: (adapter.rank_of(path), in_, out) for path, (out, in_) in chosen}

    @cached_property
    def trained(self) -> dict[str, int]:
        """Number of trained elements, by weight's name or adapter's path."""
        if self.adapter is None:
            return self.elements
        adapter, dora = self.adapter, self.adapter.use_dora
        factors = {path: rank * (in_ + out) + out * dora for path, (rank, in_, out) in self.adapters.items()}
        return factors | {name: n for name, n in self.elements.items() if adapter.saves(name.rpartition(".")[0])}

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.training.batch_size * self.training.seq_len

    def _linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Path and shape of every linear layer, the head included, and of the embedding."""
        for name, shape in self.shapes.items():
            path, _, kind = name.rpartition(".")
            if kind == "weight" and len(shape) == 2:
                yield path, (shape[0], shape[1])
        if self.config.tie_word_embeddings:
            yield "lm_head", (self.config.vocab_size, self.config.hidden_size)


@dataclass(frozen=True)
class Moment:
    """What lives at once: bytes by part (see PARTS), and where in the step that is."""

    where: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Footprint:
    """The sizes of a step's arrays, in bytes, and the moments they make.

    Args:
        base: bytes of the process without the model.

    Attributes:
        layers: how many there are. rows: positions whose logits are held at once where memory does not matter.
    """

    def __init__(self, work: Work, base: int = BASE) -> None:
        config, tokens = work.config, work.tokens
        size = 2 if work.compute == "bf16" else 4
        self.layers = config.num_hidden_layers
        self._hidden = tokens * config.hidden_size * size
        self._wide = tokens * config.intermediate_size * size
        self._logits = config.vocab_size * size  # of a position
        self.rows = chunk_rows(tokens, self._logits)
        self._inputs, self._kept, self._mlp, self._attention = [], [], [], []
        flows = work.adapter is None  # whether a layer's input needs a gradient
        norms = 2 * config.hidden_size if flows else 0
        for layer in range(self.layers):
            attention, mlp = (_trained(work, f"model.layers.{layer}.{name}.") for name in ("self_attn", "mlp"))
            reads, kept, flows = _kept(work, layer, size, flows)
            self._inputs.append(self._hidden if reads else 0)
            self._kept.append(kept)
            self._mlp.append(FLOAT * mlp)
            self._attention.append(FLOAT * (attention + norms))
        total = FLOAT * sum(work.trained.values())
        head = "model.embed_tokens" if config.tie_word_embeddings and work.adapter is None else "lm_head"
        self._head = FLOAT * _trained(work, head)
        self._last = total - self._head - sum(self._mlp) - sum(self._attention)  # gradients that come at the end
        self._accumulated = total if work.training.gradient_accumulation_steps > 1 else 0
        state = MOMENTS.get(work.training.optimizer, 4.0 if work.training.momentum else 0.0)
        self._held = {
            "process": base,
            "kernels": _kernels(work, self.rows * self._logits, size),
            "weights": sum(work.resident.values()),
            "adapter": total if work.adapter is not None else 0,
            "optimizer": int(state * (total // FLOAT)),
        }

    @property
    def kept(self) -> int:
        """Bytes that all layers keep, none computed again."""
        return sum(self._inputs) + sum(self._kept)

    def peak(self, recomputed: int, rows: int | None = None) -> Moment:
        """The moment at which most lives where the first `recomputed` layers are computed again.

        rows: positions whose logits are held at once.
        """
        return max(self.moments(recomputed, rows), key=lambda moment: moment.total)

    def moments(self, recomputed: int, rows: int | None = None) -> Iterator[Moment]:
        """The loss, each layer's way back, and the end."""
        keeps = [0 if layer < recomputed else kept for layer, kept in enumerate(self._kept)]
        below = sum(self._inputs) + sum(keeps)
        logits = (rows or self.rows) * self._logits
        # the last layer's result, its norm, those rows of it that count, and their gradient
        yield self._moment("the loss", below, 4 * self._hidden, 0, self._head, logits)
        done = self._head
        for layer in reversed(range(self.layers)):
            below -= keeps[layer]
            # what reaches the layer from above and, where it is computed again, its result
            own = self._kept[layer] + self._hidden * (2 if layer < recomputed else 1)
            where = f"the way back through layer {layer + 1} of {self.layers}"
            down = self._mlp[layer] // 3
            yield self._moment(where, below, own + 3 * self._wide, done, down)
            yield self._moment(where, below, own + 3 * self._hidden, done, self._mlp[layer])
            done += self._mlp[layer] + self._attention[layer]
            below -= self._inputs[layer]
        yield self._moment("the last gradients", 0, self._hidden, done, self._last)

    def _moment(self, where: str, activations: int, layer: int, done: int, new: int, logits: int = 0) -> Moment:
        """done, new: bytes of gradients from before and of those that just come into being."""
        gradients = (self._accumulated or done) + new
        return Moment(
            where,
            self._held | {"gradients": gradients, "activations": activations, "layer": layer, "logits": logits},
        )


def _trained(work: Work, beginning: str) -> int:
    """Trained elements of the weights whose names begin so."""
    return sum(count for name, count in work.trained.items() if name.startswith(beginning))


def _kept(work: Work, layer: int, size: int, flows: bool) -> tuple[bool, int, bool]:
    """Whether a layer's input is kept, bytes of what it keeps besides, and whether its result needs a gradient.

    size: bytes of an element between layers. flows: whether its input needs a gradient.
    """
    config, full = work.config, work.adapter is None
    q, kv = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    ranks = {
        path.removeprefix(f"model.layers.{layer}."): rank
        for path, (rank, _, _) in work.adapters.items()
        if path.startswith(f"model.layers.{layer}.")
    }
    o, down = ranks.get("self_attn.o_proj", 0), ranks.get("mlp.down_proj", 0)
    qkv = sum(rank for path, rank in ranks.items() if path.startswith("self_attn.")) - o
    gate_up = sum(rank for path, rank in ranks.items() if path.startswith("mlp.")) - down
    kept = (qkv + o + gate_up + down) * size  # a token's x·Aᵀ
    reads = full or flows or qkv > 0
    if reads:  # the norm's statistic; q, k and v; the result and softmax's statistics
        kept += FLOAT + (q + 2 * kv) * size + q * size + config.num_attention_heads * FLOAT
    elif o:
        kept += q * size
    flows = reads or o > 0
    if flows or gate_up:  # the norm's input and statistic; gate and up
        kept += config.hidden_size * size + FLOAT + 2 * config.intermediate_size * size
    elif down:
        kept += 2 * config.intermediate_size * size
    return reads, work.tokens * kept, flows or gate_up > 0 or down > 0


def _kernels(work: Work, logits: int, size: int) -> int:
    """Bytes that kernels keep to work in: packed operands of products and of attention.

    logits: bytes of the logits that are held at once.
    """
    config = work.config
    widest = max(config.intermediate_size, config.num_attention_heads * config.head_size, config.hidden_size)
    left = min(PACKED, max(work.tokens * widest * size, logits))
    head = work.training.seq_len * config.head_size  # k and v packed two ways, and sums of their gradients
    return left + get_num_threads() * (THREAD + head * (2 * size + FLOAT + 2 * FLOAT))
