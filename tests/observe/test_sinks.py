"""metrics.jsonl and what is shown on the screen."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from entrenar.observe import Event, emit, subscribed
from entrenar.observe.sinks import Lines, LiveDisplay, MetricsWriter, display, duration, read_metrics

pytestmark = pytest.mark.tier1


def step_fields(step: int, loss: float = 1.5) -> dict:
    return {
        "step": step, "loss": loss, "lr": 1e-3, "grad_norm": 0.7, "tokens": 64 * step,
        "tokens_per_second": 12345.6, "peak_rss_gb": 0.25, "elapsed": 0.5 * step,
    }  # fmt: skip


def narrate(first: int = 1, last: int = 3) -> None:
    emit("train.data", rows=1200, valid_rows=7, seq_len=64, truncated=2, sample="[b]Q:⟦A⟧")
    emit("train.start", step=first - 1, total_steps=last, resumed=first > 1)
    for step in range(first, last + 1):
        emit("train.step", **step_fields(step))
    emit("train.skip", step=last, loss=math.nan, grad_norm=math.nan, consecutive=1, reason="loss is nan")
    emit("train.eval.start", step=last, batches=2)
    emit("train.eval.batch", step=last, batch=1, batches=2)
    emit("train.eval", step=last, nll=1.25, perplexity=math.exp(1.25), tokens=4096)
    emit("train.checkpoint", step=last, path="out/checkpoints/step-3")
    emit("train.stop", step=last, reason="SIGTERM")


def test_lines_are_strict_json_and_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer(Event("train.step", step_fields(1)))
    assert json.loads(path.read_text()) == step_fields(1)
    writer(Event("train.skip", {"step": 2, "loss": math.inf}))
    writer(Event("train.checkpoint", {"step": 2, "path": "x"}))
    writer(Event("train.eval", {"step": 2, "nll": 1.0}))
    writer.close()
    assert read_metrics(path)[1:] == [
        {"event": "skip", "step": 2, "loss": None},
        {"event": "eval", "step": 2, "nll": 1.0},
    ]
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()


def test_resume_cuts_off_what_the_run_will_write_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in (1, 2):
        writer(Event("train.step", step_fields(step)))
    position = writer.position()
    writer(Event("train.step", step_fields(3)))
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    resumed = MetricsWriter(path, position)
    resumed(Event("train.step", step_fields(3, loss=9.0)))
    resumed.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1.5), (2, 1.5), (3, 9.0)]


def test_resume_survives_a_file_that_is_shorter_than_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    writer = MetricsWriter(path, 1000)
    writer(Event("train.eval", {"step": 2}))
    writer.close()
    assert read_metrics(path) == [{"step": 1}, {"event": "eval", "step": 2}]


def test_a_new_run_starts_its_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("old\n")
    MetricsWriter(path).close()
    assert path.read_bytes() == b""


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with display(stream) as sink, subscribed(sink):
        assert isinstance(sink, Lines)
        narrate()
    text = stream.getvalue()
    assert "\x1b" not in text
    for word in (
        "step 1/3",
        "loss 1.5000",
        "12,346 tokens/s",
        "1.2500 nats a token",
        "loss is nan",
        "SIGTERM",
        "1,200 rows",
        "2 samples were longer",
        "[b]Q:⟦A⟧",
    ):
        assert word in text


def test_plain_lines_are_not_a_flood() -> None:
    stream = io.StringIO()
    with subscribed(Lines(stream, interval=60.0)):
        emit("train.start", step=0, total_steps=100, resumed=False)
        for step in range(1, 101):
            emit("train.step", **step_fields(step))
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/100", "100/100"]


@pytest.mark.parametrize("width", [40, 79, 120])
def test_the_live_display_shows_all_that_is_asked_for(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width)
    with LiveDisplay(console) as sink, subscribed(sink):
        narrate(first=2, last=4)
    text = stream.getvalue()
    for word in (
        "resumed at step 1 of 4", "learning rate", "gradient norm", "tokens/s", "12,346", "peak memory", "0.25 GiB",
        "time left", "1.2500 nats", "4/4", "[b]Q:⟦A⟧",
    ):  # fmt: skip
        assert word in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (18430, "5 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
