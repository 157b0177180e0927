"""The event bus."""

from __future__ import annotations

import pytest

from entrenar.observe import Event, emit, subscribed

pytestmark = pytest.mark.tier1


def test_sinks_hear_in_order_and_only_while_attached() -> None:
    heard: list[tuple[str, Event]] = []
    emit("train.checkpoint", step=0, path="nobody listens")
    with subscribed(lambda e: heard.append(("outer", e))):
        with subscribed(lambda e: heard.append(("inner", e))):
            emit("train.checkpoint", step=1, path="a")
        emit("train.checkpoint", step=2, path="b")
    emit("train.checkpoint", step=3, path="c")
    assert [(who, event.fields["step"]) for who, event in heard] == [("outer", 1), ("inner", 1), ("outer", 2)]


def test_a_sink_is_detached_when_its_block_fails() -> None:
    heard: list[Event] = []
    with pytest.raises(ZeroDivisionError), subscribed(heard.append):
        raise ZeroDivisionError
    emit("train.checkpoint", step=1, path="a")
    assert heard == []


def test_a_sinks_error_reaches_the_emitter() -> None:
    def full(event: Event) -> None:
        raise OSError("disk full")

    with subscribed(full), pytest.raises(OSError, match="disk full"):
        emit("train.checkpoint", step=1, path="a")


@pytest.mark.parametrize(("name", "fields"), [("train.nothing", {}), ("train.checkpoint", {"step": 1})])
def test_the_vocabulary_is_closed(name: str, fields: dict) -> None:
    with pytest.raises(ValueError, match=name):
        emit(name, **fields)
