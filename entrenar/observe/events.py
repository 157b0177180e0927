"""The event bus: code that works emits, and whoever wants to see attaches a sink. Emitting to nobody costs nothing.

`EVENTS` is the whole vocabulary: a name and the fields that it always carries; an emitter may add more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EVENTS: Mapping[str, frozenset[str]] = {
    name: frozenset(fields.split())
    for name, fields in {
        "train.data": "rows valid_rows seq_len truncated sample",
        "train.plan": "predicted budget recomputed layers",
        "train.start": "step total_steps resumed",
        "train.step": "step loss lr grad_norm tokens tokens_per_second peak_rss_gb elapsed",
        "train.skip": "step loss grad_norm consecutive reason",
        "train.eval.start": "step batches",
        "train.eval.batch": "step batch batches",
        "train.eval": "step nll perplexity tokens",
        "train.checkpoint": "step path",
        "train.stop": "step reason",
        "train.end": "step total_steps",
    }.items()
}


@dataclass(frozen=True)
class Event:
    """Something that happened: its name and its fields, as numbers, strings or None."""

    name: str
    fields: Mapping[str, Any]


Sink = Callable[[Event], None]

_sinks: tuple[Sink, ...] = ()


def emit(name: str, **fields: Any) -> None:
    """Tell every sink, in the order of attaching. A sink's exception reaches the emitter: it isn't hidden.

    Raises:
        ValueError: the name is unknown, or one of its fields is missing.
    """
    if not EVENTS.get(name, frozenset({""})) <= fields.keys():
        raise ValueError(f"event {name!r} with fields {sorted(fields)} is not in entrenar.observe.events.EVENTS")
    event = Event(name, fields)
    for sink in _sinks:
        sink(event)


@contextmanager
def subscribed(*sinks: Sink) -> Iterator[None]:
    """Attach `sinks` for the length of the block."""
    global _sinks
    _sinks = (*_sinks, *sinks)
    try:
        yield
    finally:
        remaining = list(_sinks)
        for sink in sinks:
            remaining.remove(sink)
        _sinks = tuple(remaining)
