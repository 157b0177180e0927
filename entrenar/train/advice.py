"""What to change so that a step fits into a memory: settings, the mildest first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from entrenar.backend import cpu
from entrenar.errors import MemoryLimitError
from entrenar.models.dtype import DTYPES
from entrenar.models.flops import matrices
from entrenar.models.storage import kept_as
from entrenar.nn.lora import LoraConfig
from entrenar.train.footprint import Footprint, Work
from entrenar.train.plan import Plan, make_plan

RANK = 16  # of the adapter that is suggested instead of training all weights
QUANT = "nf4"  # that is suggested
SHORTEST = 128  # sequence that is suggested, tokens


@dataclass(frozen=True)
class Suggestion:
    """Flags that make a step fit, what is then done, and its plan."""

    flags: tuple[str, ...]
    work: Work
    plan: Plan


def suggestions(work: Work, limit: int) -> list[Suggestion]:
    """Settings under which a step takes at most `limit` bytes, the mildest change first.

    Nothing but layers computed again, where that is enough; then each change that is enough by itself, with as many
    layers computed again as it needs. As long as nothing is enough, changes add up. An empty list: all of them together
    are not enough.
    """
    found = [_fit((), work, limit)]
    flags: tuple[str, ...] = ()
    together = work
    for change in CHANGES:
        found.append(next(_fitting(change(work), (), limit), None))
        if any(found):
            continue
        changes = list(change(together))
        found.append(next(_fitting(changes, flags, limit), None))
        if changes:
            flags, together = (*flags, changes[-1][0]), changes[-1][1]
    return [suggestion for suggestion in found if suggestion is not None]


def _fitting(changes: Iterable[tuple[str, Work]], flags: tuple[str, ...], limit: int) -> Iterator[Suggestion]:
    """Those of the changes that make it fit, with the flags of what was changed before."""
    for flag, work in changes:
        suggestion = _fit((*flags, flag), work, limit)
        if suggestion is not None:
            yield suggestion


def _fit(flags: tuple[str, ...], work: Work, limit: int) -> Suggestion | None:
    """With as few layers computed again as that needs; None where all are not enough."""
    training = replace(work.training, memory_budget=str(limit))
    try:
        plan = make_plan(Footprint(work), training, limit)
    except MemoryLimitError:
        return None
    if plan.rows is not None or (plan.recomputed and not training.gradient_checkpointing):
        flags = (*flags, f"--memory-budget {limit / 1e9:.2f}GB")
    return Suggestion(flags, work, plan)


Changes = Iterator[tuple[str, Work]]  # flag and work, from the mildest on; nothing where it would change nothing


def _training(work: Work, **settings: Any) -> Work:
    return replace(work, training=replace(work.training, **settings))


def _moments_of_a_byte(work: Work) -> Changes:
    if work.adapter is None and work.training.optimizer in ("adam", "adamw"):
        yield "--optimizer adamw_8bit", _training(work, optimizer="adamw_8bit")


def _retyped(work: Work, dtype: str, quant: str | None) -> Work:
    """With matrices of another type, quantized ones but for those that `quant` leaves alone."""
    config = work.config
    types = {name: kept_as(name, shape, DTYPES[dtype], quant, config).qtype for name, shape in work.shapes.items()}
    return replace(work, types=types, compute="bf16" if cpu.fast_bf16() else work.compute)


def _sixteen_bit(work: Work) -> Changes:
    if any(work.types[name].name == "f32" for name in matrices(work.config)):
        yield "--dtype bf16", _retyped(work, "bf16", None)


def _quantized(work: Work) -> Changes:
    if work.adapter is not None and all(work.types[name].dtype is not None for name in matrices(work.config)):
        yield f"--quant {QUANT}", _retyped(work, "bf16", QUANT)


def _smaller_batch(work: Work) -> Changes:
    size = work.training.batch_size
    while size > 1:
        size //= 2
        yield f"--batch-size {size}", _training(work, batch_size=size)


def _shorter_sequences(work: Work) -> Changes:
    length = work.training.seq_len
    while length >= 2 * SHORTEST:
        length //= 2
        yield f"--seq-len {length}", _training(work, seq_len=length)


def _streamed(work: Work) -> Changes:
    if work.streamed is False and work.adapter is not None:
        yield "--stream", replace(work, streamed=True)


def _adapter(work: Work) -> Changes:
    if work.adapter is None:
        low = replace(work, adapter=LoraConfig(r=RANK, target_modules="all-linear"))
        yield f"--no-full --rank {RANK}", low
        yield f"--no-full --rank {RANK} --quant {QUANT}", _retyped(low, "bf16", QUANT)


CHANGES = (_moments_of_a_byte, _sixteen_bit, _quantized, _smaller_batch, _shorter_sequences, _streamed, _adapter)
