"""How much memory a training step takes, and so how many layers may keep their activations.

The prediction counts the arrays that live at the step's worst moments: at the loss, when every layer has kept what it
keeps; in the backward pass at each layer, where activations go and gradients come; at the end, with all gradients.
docs/training.md has the same as a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from entrenar.backend import get_num_threads
from entrenar.errors import MemoryLimitError
from entrenar.models.dtype import Compute
from entrenar.models.memory import available_bytes, gigabytes, parse_bytes
from entrenar.models.spec import ModelConfig
from entrenar.nn.lora import LoraConfig
from entrenar.ops.loss import chunk_rows
from entrenar.train.config import TrainConfig

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM

BASE = 60_000_000  # bytes of the interpreter with everything that training imports
PACKED = 8 << 20  # bytes of a product's left side that are packed at a time (A_WORDS in csrc/kernels/plan.h)
THREAD = 2 << 20  # bytes of right sides and sums that a thread works on
MARGIN = 0.9  # "auto" plans with this share of what is free
FEWER_ROWS = (256, 128)  # of logits at once; below, reading the head's weights takes longer than multiplying
STATE = {"adamw": 8.0, "adam": 8.0, "adamw_8bit": 2 + 8 / 256}  # bytes of optimizer state a trained weight


@dataclass(frozen=True)
class Footprint:
    """Bytes that a step takes, part by part.

    Attributes:
        base: the process without the model. scratch: what kernels keep to work in.
        weights: all, adapters included. state: the optimizer's.
        layers: how many there are.
        boundary: a layer's input, always kept. kept: what a layer keeps besides, unless it is computed again.
        working: what a layer's backward pass needs for itself.
        layer_gradients, other_gradients: of a layer's trained weights, and of those outside the layers.
        hidden: the final states, their norm and its gradient. logits: of one position. rows: positions whose logits
            are held at once where memory does not matter.
        embedding: the gradient of a tied embedding until it is added to the head's.
        accumulated: whether gradients live through the whole step, from the micro-batch before.
    """

    base: int
    scratch: int
    weights: int
    state: int
    layers: int
    boundary: int
    kept: int
    working: int
    layer_gradients: int
    other_gradients: int
    hidden: int
    logits: int
    rows: int
    embedding: int
    accumulated: bool

    def peak(self, recomputed: int, rows: int | None = None) -> int:
        """The most that lives at once where the first `recomputed` layers are computed again.

        rows: positions whose logits are held at once.
        """
        loss = self.hidden + (rows or self.rows) * self.logits
        gradients = self.layers * self.layer_gradients + self.other_gradients
        held = self.base + self.scratch + self.weights + self.state + (gradients if self.accumulated else 0)
        new = 0 if self.accumulated else 1  # gradients that come into being in this backward pass
        inputs = self.layers * self.boundary
        moments = [held + inputs + (self.layers - recomputed) * self.kept + loss + new * self.other_gradients]
        for layer in range(self.layers):  # while its backward pass runs
            below = max(0, layer - recomputed) * self.kept
            done = (self.layers - layer) * self.layer_gradients + self.other_gradients
            moments.append(
                held + (layer + 1) * self.boundary + below + self.kept + self.working + self.boundary + new * done
            )
        moments.append(held + new * gradients + self.embedding)
        return max(moments)


@dataclass(frozen=True)
class Plan:
    """What was decided: how many layers are computed again, how many positions' logits are held at once (None: as many
    as are fastest), and the peak memory that follows, in bytes."""

    recomputed: int
    rows: int | None
    predicted: int
    budget: int | None
    footprint: Footprint


def footprint(
    config: ModelConfig,
    adapter: LoraConfig | None,
    training: TrainConfig,
    compute: Compute,
    weights: int,
    base: int = BASE,
) -> Footprint:
    """What a step of `batch_size` sequences of `seq_len` takes, from shapes alone.

    Args:
        weights: bytes of the model's own weights, without an adapter.
    """
    size = 2 if compute == "bf16" else 4
    tokens = training.batch_size * training.seq_len
    hidden, wide = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    shapes = config.parameter_shapes()
    low = {  # path -> rank, input and output size of its adapter
        path: (adapter.rank_of(path), in_, out)
        for path, (out, in_) in _matrices(shapes, config)
        if adapter is not None and adapter.selects(path)
    }
    if adapter is None:
        trained = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    else:
        trained = {path: rank * (in_ + out) for path, (rank, in_, out) in low.items()}
    in_layers = sum(count for name, count in trained.items() if name.startswith("model.layers."))
    layers = config.num_hidden_layers
    ranks = sum(rank for path, (rank, _, _) in low.items() if path.startswith("model.layers.0."))
    # kept: q, k, v; attention's result; x after it; gate and up; statistics of two norms and of softmax; x·Aᵀ
    kept = (q_size + 2 * kv_size + q_size + hidden + 2 * wide) * size
    kept += (2 + config.num_attention_heads + ranks) * 4
    # the gradients of x, of the gated product (then the product itself in its place), and of gate and up
    working = (2 * hidden + 3 * wide) * size
    embedding = config.vocab_size * hidden * 4 if adapter is None and config.tie_word_embeddings else 0
    parameters = sum(trained.values())
    logits = config.vocab_size * size
    rows = chunk_rows(tokens, logits)
    return Footprint(
        base=base,
        scratch=min(PACKED, max(tokens * max(wide, q_size, hidden) * size, rows * logits)) + get_num_threads() * THREAD,
        weights=weights + (4 * parameters if adapter is not None else 0),
        state=int(STATE.get(training.optimizer, 4.0 if training.momentum else 0.0) * parameters),
        layers=layers,
        boundary=tokens * hidden * size,
        kept=tokens * kept,
        working=tokens * working,
        layer_gradients=4 * (in_layers // layers),
        other_gradients=4 * (parameters - in_layers),
        hidden=3 * tokens * hidden * size,
        logits=logits,
        rows=rows,
        embedding=embedding,
        accumulated=training.gradient_accumulation_steps > 1,
    )


def _matrices(shapes: dict[str, tuple[int, ...]], config: ModelConfig) -> Iterable[tuple[str, tuple[int, int]]]:
    """Path and shape of every linear layer, the head included."""
    for name, shape in shapes.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight" and len(shape) == 2 and path != "model.embed_tokens":
            yield path, (shape[0], shape[1])
    if config.tie_word_embeddings:
        yield "lm_head", (config.vocab_size, config.hidden_size)


def make_plan(size: Footprint, training: TrainConfig, free: int) -> Plan:
    """As few layers computed again as the budget allows; all with `gradient_checkpointing`.

    Where that is not enough, fewer logits are held at once, which costs more time for what it saves.

    Args:
        free: bytes that the process may take in all, for the budget "auto".

    Raises:
        MemoryLimitError: the budget is too small whatever is computed again; the message gives the least.
    """
    recomputed, rows = (size.layers if training.gradient_checkpointing else 0), None
    if training.memory_budget is None:
        return Plan(recomputed, rows, size.peak(recomputed), None, size)
    automatic = training.memory_budget == "auto"
    budget = int(MARGIN * free) if automatic else parse_bytes("memory_budget", training.memory_budget)
    while size.peak(recomputed) > budget and recomputed < size.layers:
        recomputed += 1
    for rows in (None, *(n for n in FEWER_ROWS if n < size.rows)):
        least = size.peak(recomputed, rows)
        if least <= budget:
            return Plan(recomputed, rows, least, budget, size)
    raise MemoryLimitError(
        f"memory_budget: {gigabytes(budget)} is too little: with every layer computed again a step takes "
        f"{gigabytes(least)}, of which {gigabytes(size.weights)} are weights and {gigabytes(size.state)} the "
        f"optimizer's state; lower batch_size ({training.batch_size}) or seq_len ({training.seq_len}), or give at "
        f"least {math.ceil(least / 1e7) / 100:.2f}GB"
    )


def plan_for(model: CausalLM, training: TrainConfig) -> Plan:
    """The plan for this model in this process, whose memory besides the model is taken as it is."""
    weights = sum(weight.data.nbytes for _, weight in model.named_weights())
    adapters = sum(f.a.data.nbytes + f.b.data.nbytes for _, linear in model.linears() if (f := linear.lora) is not None)
    resident = resident_bytes()
    base = max(BASE, resident - weights - adapters)
    size = footprint(model.config, model.adapter, training, model.compute, weights, base)
    return make_plan(size, training, available_bytes() + resident)


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmRSS"))
