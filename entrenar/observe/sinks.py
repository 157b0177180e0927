"""Sinks that keep or show a training run: metrics.jsonl, a live display, plain lines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from entrenar.observe.events import Event

WIDE = 80  # columns of a terminal that the figures need side by side
KEPT = {"train.step": None, "train.eval": "eval", "train.skip": "skip"}  # event -> value of "event" in its line


class MetricsWriter:
    """Appends one JSON object a line: logged steps, evaluations ("event": "eval"), skipped steps ("event": "skip").

    Lines are flushed one by one, and NaN or infinity is written as null.

    Args:
        path: the file; its directory exists.
        resume_at: None starts the file anew; else what `position` said when the checkpoint was saved: all that was
            written later is cut off, because the resumed run will write it again.
    """

    def __init__(self, path: Path, resume_at: int | None = None) -> None:
        self.path = path
        if resume_at is None or not path.exists():
            path.write_bytes(b"")
        else:
            kept = path.read_bytes()[:resume_at]
            os.truncate(path, kept.rfind(b"\n") + 1)  # a crash may have cut the last line short
        self._file: IO[str] = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close)

    def __call__(self, event: Event) -> None:
        if event.name in KEPT:
            kind = KEPT[event.name]
            row = dict(event.fields) if kind is None else {"event": kind, **event.fields}
            self._file.write(json.dumps({name: _finite(value) for name, value in row.items()}) + "\n")

    def position(self) -> int:
        """The file's size in bytes, once all of it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Display(Protocol):
    """A sink with something to set up and tear down."""

    def __call__(self, event: Event) -> None: ...
    def __enter__(self) -> Display: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@contextmanager
def display(stream: IO[str] | None = None) -> Iterator[Display]:
    """The live display where `stream` (default: stderr) is a terminal, else plain lines."""
    target = sys.stderr if stream is None else stream
    console = Console(file=target)
    chosen: Display = LiveDisplay(console) if console.is_terminal and not console.is_dumb_terminal else Lines(target)
    with chosen:
        yield chosen


class Lines:
    """One plain line a logged step, not more often than every `interval` seconds; all else is always said."""

    def __init__(self, stream: IO[str], interval: float = 5.0) -> None:
        self._stream = stream
        self._interval = interval
        self._total = 0
        self._next = 0.0

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.flush()

    def __call__(self, event: Event) -> None:
        if event.name == "train.start":
            self._total = event.fields["total_steps"]
        if event.name == "train.step":
            due = time.monotonic() >= self._next or event.fields["step"] >= self._total
            if not due:
                return
            self._next = time.monotonic() + self._interval
        text = describe(event, self._total)
        if text:
            print(text, file=self._stream, flush=True)


class LiveDisplay:
    """A bar and a few figures that are redrawn in place; evaluations, checkpoints and warnings scroll above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            console=console,
        )
        self._task = self._bar.add_task("training", total=None)
        self._figures: RenderableType = Text("the first step is on its way", style="dim")
        self._remaining = TimeLeft()
        self._total = 0
        self._live = Live(Group(self._bar, self._figures), console=console, refresh_per_second=8)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        fields = event.fields
        match event.name:
            case "train.start":
                self._total = fields["total_steps"]
                self._bar.update(self._task, total=self._total, completed=fields["step"])
                self._remaining = TimeLeft()
            case "train.step":
                self._bar.update(self._task, description="training", completed=fields["step"])
                remaining = self._remaining(fields["step"], self._total)
                self._figures = _figures(fields, remaining, wide=self._console.width >= WIDE)
                self._live.update(Group(self._bar, self._figures))
                return
            case "train.eval.batch":
                self._bar.update(self._task, description=f"evaluating {fields['batch']}/{fields['batches']}")
        text = describe(event, self._total)
        if text:
            style = {"train.skip": "yellow", "train.stop": "yellow", "train.eval": "bold"}.get(event.name, "dim")
            self._console.print(Text(text, style=style), soft_wrap=True)


class TimeLeft:
    """Seconds to the end, from the pace of the last steps (weight halves about every 14 steps)."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        self._pace: float | None = None

    def __call__(self, step: int, total: int) -> float | None:
        now = time.monotonic()
        if self._last is not None and step > self._last[1]:
            pace = (now - self._last[0]) / (step - self._last[1])
            self._pace = pace if self._pace is None else 0.95 * self._pace + 0.05 * pace
        self._last = (now, step)
        return None if self._pace is None else self._pace * max(0, total - step)


def _figures(fields: Any, remaining: float | None, wide: bool) -> Table:
    """The figures below their names, or beside them where the terminal is narrow."""
    table = Table(box=None, expand=wide, padding=(0, 1), show_header=wide)
    row = {
        "loss": f"{fields['loss']:.4f}",
        "learning rate": f"{fields['lr']:.3g}",
        "gradient norm": f"{fields['grad_norm']:.3g}",
        "tokens/s": f"{fields['tokens_per_second']:,.0f}",
        "peak memory": f"{fields['peak_rss_gb']:.2f} GiB",
        "time left": "…" if remaining is None else duration(remaining),
    }
    if wide:
        for name in row:
            table.add_column(name, header_style="dim", justify="right", no_wrap=True)
        table.add_row(*row.values())
    else:
        table.add_column(style="dim")
        for figure in row.items():
            table.add_row(*figure)
    return table


def describe(event: Event, total: int) -> str | None:
    """One line about an event, None where it is not worth one."""
    f = event.fields
    match event.name:
        case "train.data":
            text = f"{f['rows']:,} rows of up to {f['seq_len']} tokens to train on, {f['valid_rows']:,} to evaluate on"
            if f["truncated"]:
                text += f"; {f['truncated']:,} samples were longer and are cut"
            return text if f["sample"] is None else f"{text}\nthe first, ⟦learned⟧ and only read: {f['sample']}"
        case "train.plan" if f["budget"] is not None or f["recomputed"]:
            budget = "" if f["budget"] is None else f" of {f['budget'] / 1e9:.2f}"
            again = f"{f['recomputed']} of {f['layers']} layers are computed again in the backward pass"
            return f"a step is to take {f['predicted'] / 1e9:.2f}{budget} GB: {again}"
        case "train.start" if f["resumed"]:
            return f"resumed at step {f['step']} of {f['total_steps']}"
        case "train.step":
            return (
                f"step {f['step']}/{total}  loss {f['loss']:.4f}  lr {f['lr']:.3g}  grad norm {f['grad_norm']:.3g}  "
                f"{f['tokens_per_second']:,.0f} tokens/s  {f['peak_rss_gb']:.2f} GiB"
            )
        case "train.eval":
            return (
                f"step {f['step']}  evaluation: {f['nll']:.4f} nats a token, perplexity {f['perplexity']:.2f} "
                f"({f['tokens']:,} tokens)"
            )
        case "train.skip":
            return f"step {f['step']} not applied: {f['reason']} ({f['consecutive']} in a row)"
        case "train.checkpoint":
            return f"step {f['step']}  checkpoint saved in {f['path']}"
        case "train.stop":
            return f"stopped after step {f['step']}: {f['reason']}"
    return None


def duration(seconds: float) -> str:
    """As '42 s', '3 min 20 s' or '5 h 07 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
