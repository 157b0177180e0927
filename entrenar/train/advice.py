"""What to change so that a step fits into a memory: settings, the mildest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from entrenar.errors import AdapterError, MemoryLimitError, UsageError
from entrenar.models.flops import matrices
from entrenar.train.footprint import RUN, Footprint, process_bytes
from entrenar.train.plan import Plan, make_plan
from entrenar.train.work import Work

LOWEST_RANK = 4  # that is suggested
FEWEST = ("q_proj", "v_proj"), ("qkv_proj",)  # layers with an adapter that are suggested: PEFT's own choice
QUANT, FEWEST_BITS = "nf4", ("q3_k", "q2_k")  # types that are suggested, the latter where nothing else is enough
SHORTEST = 128  # sequence that is suggested, tokens
BUDGET = "memory_budget"

Settings = dict[str, Any]  # as the command line names them
Change = Callable[[Work], Iterator[Settings]]  # one setting, from its mildest value on


@dataclass(frozen=True)
class Suggestion:
    """Settings with which a step fits, in the place of those that were given, what is then done, and its plan."""

    settings: Settings
    work: Work
    plan: Plan


def suggestions(work_with: Callable[[Settings], Work], limit: int) -> list[Suggestion]:
    """Settings under which a step takes at most `limit` bytes, the mildest change first.

    Nothing but layers computed again, where that is enough; then each change that is enough by itself, with as many
    layers computed again as it needs. As long as nothing is enough, changes add up, and of those that are enough
    together the harshest that can be spared are left out. Where all weights are trained, last the mildest way to an
    adapter instead. An empty list: all of it together is not enough.

    work_with: the work with some settings changed; it raises UsageError or AdapterError where they can't be.
    """
    search = _Search(work_with, limit)
    found = search.run({})
    if work_with({}).adapter is None:
        found += search.run({"full": False})[:1]
    return found


class _Search:
    def __init__(self, work_with: Callable[[Settings], Work], limit: int) -> None:
        self._work_with = work_with
        self._limit = limit
        self._known: dict[str, Work | None] = {}

    def run(self, given: Settings) -> list[Suggestion]:
        """given: what is changed already."""
        found = [self._fit(given)]
        together = given
        for change in CHANGES:
            if change is _fewest_bits and any(found):
                break  # nobody wants them who need not
            found.append(next(filter(None, map(self._fit, self._lighter(given, change))), None))
            if any(found):
                continue
            for settings in self._lighter(together, change):
                together = settings
                if (enough := self._fit(together)) is not None:
                    found.append(self._spared(enough, given))
                    break
        return [suggestion for suggestion in found if suggestion is not None]

    def _work(self, settings: Settings) -> Work | None:
        """None where the settings can't be."""
        key = repr(sorted(settings.items()))
        if key not in self._known:
            try:
                self._known[key] = self._work_with(settings)
            except (UsageError, AdapterError):
                self._known[key] = None
        return self._known[key]

    def _lighter(self, settings: Settings, change: Change) -> Iterator[Settings]:
        """With each value of the change that can be and takes less."""
        now = self._work(settings)
        if now is None:
            return
        for values in change(now):
            work = self._work({**settings, **values})
            if work is not None and _least(work) < _least(now):
                yield {**settings, **values}

    def _spared(self, found: Suggestion, given: Settings) -> Suggestion:
        """Without the changes that it does not need; the last one it does."""
        *others, _ = (name for name in found.settings if name not in given and name != BUDGET)
        for name in reversed(others):
            fewer = {key: value for key, value in found.settings.items() if key not in (name, BUDGET)}
            found = self._fit(fewer) or found
        return found

    def _fit(self, settings: Settings) -> Suggestion | None:
        """With as few layers computed again as that needs; None where all are not enough."""
        work = self._work(settings)
        if work is None:
            return None
        budget = f"{(self._limit + 1) // 10**7 / 100:.2f}GB"  # as the flag has it, rounded down; 4.1GB is 4.1e9 - 1
        training = replace(work.training, memory_budget=budget)
        try:
            plan = make_plan(Footprint(work, process_bytes(work) + RUN), training, self._limit)
        except MemoryLimitError:
            return None
        if plan.rows is not None or (plan.recomputed and not training.gradient_checkpointing):
            settings = {**settings, BUDGET: budget}
        return Suggestion(settings, work, plan)


def _least(work: Work) -> int:
    """Bytes at the peak with every layer computed again."""
    size = Footprint(work)
    return size.peak(size.layers).total


# ---- changes


def _moments_of_a_byte(work: Work) -> Iterator[Settings]:
    large = work.adapter is None or work.adapter.modules_to_save  # low-rank factors' are small
    if large and work.training.optimizer in ("adam", "adamw"):
        yield {"optimizer": "adamw_8bit"}


def _sixteen_bit(work: Work) -> Iterator[Settings]:
    if any(work.types[name].name == "f32" for name in matrices(work.config)):
        yield {"dtype": "bf16"}


def _quantized(work: Work) -> Iterator[Settings]:
    if work.adapter is not None:
        yield {"quant": QUANT}


def _fewest_bits(work: Work) -> Iterator[Settings]:
    for quant in FEWEST_BITS if work.adapter is not None else ():
        yield {"quant": quant}


def _smaller_batch(work: Work) -> Iterator[Settings]:
    size = work.training.batch_size
    while size > 1:
        size //= 2
        yield {"batch_size": size}


def _lower_rank(work: Work) -> Iterator[Settings]:
    rank = work.adapter.r if work.adapter is not None else 0
    while rank > LOWEST_RANK:
        rank = max(LOWEST_RANK, rank // 2)
        yield {"rank": rank}


def _fewer_targets(work: Work) -> Iterator[Settings]:
    for names in FEWEST if work.adapter is not None else ():
        yield {"target": names}


def _shorter_sequences(work: Work) -> Iterator[Settings]:
    length = work.training.seq_len
    while length >= 2 * SHORTEST:
        length //= 2
        yield {"seq_len": length}


def _streamed(work: Work) -> Iterator[Settings]:
    if work.streamed is False and work.adapter is not None:
        yield {"stream": True}


CHANGES: tuple[Change, ...] = (
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
