"""What a training step takes, from shapes alone: the arrays that live at each of its moments.

Activations gather in the forward pass until the loss; in the backward pass they go layer by layer while gradients come;
at the end all gradients are there. One of these moments is the peak. docs/memory.md tells the same in words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from entrenar.backend import get_num_threads
from entrenar.nn.lora import EMBEDDING, HEAD
from entrenar.ops.loss import chunk_rows
from entrenar.train.layer import FLOAT, layer_bytes
from entrenar.train.work import Work

BASE = 58_000_000  # bytes of the interpreter with everything that training imports
TOKENIZER, WORD = 4_000_000, 280  # bytes of a tokenizer, and of each of its words (240 to 400 with merges)
RUN = 30_000_000  # bytes that a run may hold besides: its data, records
PACKED = 8 << 20  # bytes of a product's left side that are packed at a time at most (A_WORDS in csrc/isa/)
THREAD = 2 << 20  # bytes of right sides and sums that a thread works on
MOMENTS = {"adamw": 8.0, "adam": 8.0, "adamw_8bit": 2 + 8 / 256}  # bytes of optimizer state a trained weight

PARTS = ("process", "kernels", "weights", "adapter", "optimizer", "gradients", "activations", "layer", "logits")


@dataclass(frozen=True)
class Moment:
    """What lives at once: bytes by part (see PARTS), and where in the step that is."""

    where: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def process_bytes(work: Work) -> int:
    """Of the process without the model, its tokenizer included."""
    return BASE + work.tokenizer * (TOKENIZER + WORD * work.config.vocab_size)


class Footprint:
    """The sizes of a step's arrays, in bytes, and the moments they make.

    Args:
        base: bytes of the process without the model, `process_bytes` by default.

    Attributes:
        layers: how many there are. rows: positions whose logits are held at once where memory does not matter.
    """

    def __init__(self, work: Work, base: int | None = None) -> None:
        config, tokens = work.config, work.tokens
        size = 2 if work.compute == "bf16" else 4
        self.layers = config.num_hidden_layers
        self._hidden = tokens * config.hidden_size * size
        self._logits = config.vocab_size * size  # of a position
        self.rows = chunk_rows(tokens, self._logits)
        self._whole_logits = tokens * _whole_logits(work, size)
        flows = any(_of(EMBEDDING, name) for name in work.trained)  # whether a layer's input needs a gradient
        self._layer = []
        for index in range(self.layers):
            self._layer.append(layer_bytes(work, index, flows))
            flows = self._layer[-1].flows
        total = FLOAT * sum(work.trained.values())
        embedding = FLOAT * sum(count for name, count in work.trained.items() if _of(EMBEDDING, name))
        head = FLOAT * sum(count for name, count in work.trained.items() if _of(HEAD, name))
        self._head = embedding if config.tie_word_embeddings and work.adapter is None else head
        # gradients that come at the end; an embedding's is added to in place where there is one
        self._last = total - self._head - sum(layer.mlp + layer.attention for layer in self._layer)
        self._accumulated = 0
        if work.training.gradient_accumulation_steps > 1:
            self._accumulated = total
            self._last -= min(self._last, embedding)
        state = MOMENTS.get(work.training.optimizer, 4.0 if work.training.momentum else 0.0)
        self._held = {
            "process": process_bytes(work) if base is None else base,
            "kernels": _kernels(work, self.rows * self._logits, size),
            "weights": sum(work.resident.values()),
            "adapter": total if work.adapter is not None else 0,
            "optimizer": int(state * (total // FLOAT)),
        }

    @property
    def kept(self) -> int:
        """Bytes that all layers keep, none computed again."""
        return sum(layer.input + layer.kept for layer in self._layer)

    def peak(self, recomputed: int, rows: int | None = None) -> Moment:
        """The moment at which most lives where the first `recomputed` layers are computed again.

        rows: positions whose logits are held at once.
        """
        return max(self.moments(recomputed, rows), key=lambda moment: moment.total)

    def moments(self, recomputed: int, rows: int | None = None) -> Iterator[Moment]:
        """The loss, each layer's way back, and the end."""
        below = sum(layer.input + layer.kept * (index >= recomputed) for index, layer in enumerate(self._layer))
        logits = self._whole_logits or (rows or self.rows) * self._logits
        # the last layer's result, its norm, those rows of it that count, and their gradient
        yield self._moment("the loss", below, 4 * self._hidden, 0, self._head, logits)
        done = self._head
        for index, layer in reversed([*enumerate(self._layer)]):
            again = index < recomputed
            below -= 0 if again else layer.kept
            # what reaches the layer from above and, where it is computed again, its result
            own = layer.kept + self._hidden * (2 if again else 1)
            where = f"the way back through layer {index + 1} of {self.layers}"
            yield self._moment(where, below, own + layer.mlp_back, done, layer.down)
            yield self._moment(where, below, own + layer.attention_back, done, layer.mlp)
            done += layer.mlp + layer.attention
            below -= layer.input
        yield self._moment("the last gradients", 0, self._hidden, done, self._last)

    def _moment(self, where: str, activations: int, layer: int, done: int, new: int, logits: int = 0) -> Moment:
        """done, new: bytes of gradients from before and of those that just come into being."""
        gradients = (self._accumulated or done) + new
        return Moment(
            where,
            self._held | {"gradients": gradients, "activations": activations, "layer": layer, "logits": logits},
        )


def _of(path: str, name: str) -> bool:
    """Whether a trained weight or adapter is that of the module at `path`."""
    return name == path or name.rpartition(".")[0] == path


def _whole_logits(work: Work, size: int) -> int:
    """Bytes a position of logits that are not made some positions at a time, with their gradients; 0 where they are.

    size: of an element between layers.
    """
    adapter = work.adapter
    if adapter is None or HEAD not in work.adapters or not (adapter.use_dora or adapter.lora_dropout):
        return 0
    # the logits in f32 and their gradient; DoRA's before they are scaled
    return work.config.vocab_size * (2 * FLOAT + size * adapter.use_dora)


def _kernels(work: Work, logits: int, size: int) -> int:
    """Bytes that kernels keep to work in: packed operands of products and of attention.

    logits: bytes of the logits that are held at once.
    """
    config = work.config
    widest = max(config.intermediate_size, config.num_attention_heads * config.head_size, config.hidden_size)
    left = min(PACKED, max(work.tokens * widest * size, logits))
    head = work.training.seq_len * config.head_size  # k and v packed two ways, and sums of their gradients
    return left + get_num_threads() * (THREAD + head * (2 * size + FLOAT + 2 * FLOAT))
