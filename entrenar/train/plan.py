"""How many layers keep their activations, so that a step takes no more memory than a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entrenar.errors import MemoryLimitError
from entrenar.models.memory import available_bytes, gigabytes, parse_bytes, resident_bytes
from entrenar.train.config import TrainConfig
from entrenar.train.footprint import BASE, Footprint, Moment
from entrenar.train.work import Work

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM

MARGIN = 0.9  # "auto" plans with this share of what is free
FEWER_ROWS = (256, 128)  # of logits at once; below, reading the head's weights takes longer than multiplying


@dataclass(frozen=True)
class Plan:
    """What was decided, and the peak memory that follows.

    Attributes:
        recomputed: how many layers, from the first, are computed again; layers: of how many. rows: positions whose
            logits are held at once, None for as many as are fastest. budget: bytes, or None. kept: bytes that the
            layers would keep, none computed again. peak: the moment at which a step takes most.
    """

    recomputed: int
    layers: int
    rows: int | None
    budget: int | None
    kept: int
    peak: Moment

    @property
    def predicted(self) -> int:
        """Bytes at the peak."""
        return self.peak.total

    def record(self) -> Mapping[str, Any]:
        """The same as plain JSON."""
        return {
            "predicted": self.predicted,
            "budget": self.budget,
            "recomputed": self.recomputed,
            "layers": self.layers,
            "rows": self.rows,
            "where": self.peak.where,
            "parts": dict(self.peak.parts),
        }


def make_plan(size: Footprint, training: TrainConfig, free: int) -> Plan:
    """As few layers computed again as the budget allows; all with `gradient_checkpointing`.

    Where that is not enough, fewer logits are held at once, which costs more time for what it saves.

    Args:
        free: bytes that the process may take in all, for the budget "auto".

    Raises:
        MemoryLimitError: the budget is too small whatever is computed again; the message gives the least.
    """
    recomputed = size.layers if training.gradient_checkpointing else 0
    if training.memory_budget is None:
        return Plan(recomputed, size.layers, None, None, size.kept, size.peak(recomputed))
    automatic = training.memory_budget == "auto"
    budget = int(MARGIN * free) if automatic else parse_bytes("memory_budget", training.memory_budget)
    while size.peak(recomputed).total > budget and recomputed < size.layers:
        recomputed += 1
    for rows in (None, *(n for n in FEWER_ROWS if n < size.rows)):
        peak = size.peak(recomputed, rows)
        if peak.total <= budget:
            return Plan(recomputed, size.layers, rows, budget, size.kept, peak)
    raise MemoryLimitError(
        f"memory_budget: {gigabytes(budget)} is too little: with every layer computed again a step takes "
        f"{gigabytes(peak.total)}, of which {gigabytes(peak.parts['weights'])} are weights and "
        f"{gigabytes(peak.parts['optimizer'])} the optimizer's state; lower batch_size ({training.batch_size}) or "
        f"seq_len ({training.seq_len}), or give at least {math.ceil(peak.total / 1e7) / 100:.2f}GB"
    )


def plan_for(model: CausalLM, training: TrainConfig) -> Plan:
    """The plan for this model in this process, whose memory besides the model is taken as it is."""
    work = Work.of(model, training)
    added = sum(tensor.data.nbytes for tensor in model.parameters()) if model.adapter is not None else 0
    resident = resident_bytes()
    base = max(BASE, resident - sum(work.resident.values()) - added)
    return make_plan(Footprint(work, base), training, available_bytes() + resident)
