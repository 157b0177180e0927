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
from entrenar.train.footprint import Footprint
from entrenar.train.plan import Plan, make_plan
from entrenar.train.work import Work

RANK, LOWEST_RANK = 16, 4  # of the adapter that is suggested instead of training all weights; of any
FEWEST = ("q_proj", "v_proj"), ("qkv_proj",)  # layers with an adapter that are suggested: PEFT's own choice
QUANT, FEWEST_BITS = "nf4", ("q3_k", "q2_k")  # types that are suggested, the latter where nothing else is enough
SHORTEST = 128  # sequence that is suggested, tokens


@dataclass(frozen=True)
class Suggestion:
    """Flags that make a step fit, the command that has them, what is then done, and its plan."""

    command: str
    flags: tuple[str, ...]
    work: Work
    plan: Plan


def suggestions(work: Work, limit: int) -> list[Suggestion]:
    """Settings under which a step takes at most `limit` bytes, the mildest change first.

    Nothing but layers computed again, where that is enough; then each change that is enough by itself, with as many
    layers computed again as it needs. As long as nothing is enough, changes add up. Where all weights are trained, last
    the mildest way to an adapter instead. An empty list: all of it together is not enough.
    """
    found = _search(work, (), limit)
    if work.adapter is None:
        adapter = LoraConfig(r=RANK, target_modules="all-linear")
        frozen = replace(_training(work, optimizer="adamw"), adapter=adapter)
        found += _search(frozen, (f"--rank {RANK}",), limit)[:1]
    return found


def _search(work: Work, given: tuple[str, ...], limit: int) -> list[Suggestion]:
    """given: flags that the work has already."""
    found = [_fit(given, work, limit)]
    flags, together = given, work
    for change in CHANGES:
        if change is _fewest_bits and any(found):
            break  # nobody wants them who need not
        found.append(next(_fitting(change(work), given, limit), None))
        if any(found):
            continue
        changes = list(change(together))
        found.append(next(_fitting(changes, flags, limit), None))
        if changes:
            flags, together = _and(flags, changes[-1][0]), changes[-1][1]
    return [suggestion for suggestion in found if suggestion is not None]


def _fitting(changes: Iterable[tuple[str, Work]], flags: tuple[str, ...], limit: int) -> Iterator[Suggestion]:
    """Those of the changes that make it fit, with the flags of what was changed before."""
    for flag, work in changes:
        suggestion = _fit(_and(flags, flag), work, limit)
        if suggestion is not None:
            yield suggestion


def _and(flags: tuple[str, ...], flag: str) -> tuple[str, ...]:
    """One flag more, in the place of an earlier one of its name."""
    return (*(earlier for earlier in flags if earlier.split()[0] != flag.split()[0]), flag)


def _fit(flags: tuple[str, ...], work: Work, limit: int) -> Suggestion | None:
    """With as few layers computed again as that needs; None where all are not enough."""
    budget = f"{(limit + 1) // 10**7 / 100:.2f}GB"  # as the flag has it, rounded down; 4.1GB is 4.1e9 - 1
    training = replace(work.training, memory_budget=budget)
    try:
        plan = make_plan(Footprint(work), training, limit)
    except MemoryLimitError:
        return None
    if plan.rows is not None or (plan.recomputed and not training.gradient_checkpointing):
        flags = (*flags, f"--memory-budget {budget}")
    return Suggestion("train" if work.adapter is None else "finetune", flags, work, plan)


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
    return replace(work, types=types, compute="bf16" if cpu.fast_bf16() else work.compute, quant=quant)


def _sixteen_bit(work: Work) -> Changes:
    if any(work.types[name].name == "f32" for name in matrices(work.config)):
        yield "--dtype bf16", _retyped(work, "bf16", None)


def _quantized(work: Work) -> Changes:
    yield from _smaller_types(work, (QUANT,))


def _fewest_bits(work: Work) -> Changes:
    yield from _smaller_types(work, FEWEST_BITS)


def _smaller_types(work: Work, quants: Iterable[str]) -> Changes:
    """Types that are smaller than those now, where weights are quantized as they are loaded or not at all."""
    stored = any(work.types[name].dtype is None for name in matrices(work.config)) and work.quant is None
    for quant in quants if work.adapter is not None and not stored else ():
        smaller = _retyped(work, "bf16", quant)
        if sum(smaller.weights.values()) < sum(work.weights.values()):
            yield f"--quant {quant}", smaller


def _smaller_batch(work: Work) -> Changes:
    size = work.training.batch_size
    while size > 1:
        size //= 2
        yield f"--batch-size {size}", _training(work, batch_size=size)


def _lower_rank(work: Work) -> Changes:
    adapter = work.adapter
    while adapter is not None and adapter.r > LOWEST_RANK:
        adapter = replace(adapter, r=max(LOWEST_RANK, adapter.r // 2))
        yield f"--rank {adapter.r}", replace(work, adapter=adapter)


def _fewer_targets(work: Work) -> Changes:
    adapter = work.adapter
    for names in FEWEST if adapter is not None else ():
        fewest = [path for path in work.adapters if path.rpartition(".")[2] in names]
        if adapter is not None and fewest and len(fewest) < len(work.adapters):
            yield f"--target {' '.join(names)}", replace(work, adapter=replace(adapter, target_modules=names))


def _shorter_sequences(work: Work) -> Changes:
    length = work.training.seq_len
    while length >= 2 * SHORTEST:
        length //= 2
        yield f"--seq-len {length}", _training(work, seq_len=length)


def _streamed(work: Work) -> Changes:
    if work.streamed is False and work.adapter is not None:
        yield "--stream", replace(work, streamed=True)


CHANGES = (
    _moments_of_a_byte,
    _sixteen_bit,
    _quantized,
    _smaller_batch,
    _lower_rank,
    _fewer_targets,
    _shorter_sequences,
    _streamed,
    _fewest_bits,
)
