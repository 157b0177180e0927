"""What native kernels ran, how long, and how near to the machine's limits: a table, a trace to look at, a picture.

    with Profile() as profile:
        model.loss(ids).backward()
    print(profile.table(backend.cpu.peaks()))

A call's time runs from entering its wrapper to its kernel's end, checks and allocation of its result included; what
passes between calls is Python's. FLOPs and bytes are those of the task: the arithmetic asked for, and every operand
read and every result written once, whatever a kernel really did.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from entrenar.backend import cpu
from entrenar.observe.curve import EVAL, INK, TRAIN

BETWEEN = "between kernels"
WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 980, 190, 330, 40, 24, 16  # the picture, pixels
MAX_BARS = 24


class Record(NamedTuple):
    """One native call: nanoseconds of time.monotonic_ns; sizes (m, n, k), 0 where there are fewer."""

    name: str
    start: int
    duration: int
    flops: float
    bytes: float
    dtype: str
    sizes: tuple[int, int, int]
    thread: int


@dataclass(frozen=True)
class Kernel:
    """All calls of one kernel. `bound` is the least time they could take, None where the work isn't known."""

    name: str
    dtype: str
    sizes: tuple[int, int, int] | None
    calls: int
    seconds: float
    flops: float
    bytes: float
    bound: float | None

    @property
    def gflops(self) -> float:
        """10⁹ FLOP/s."""
        return self.flops / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def gb_per_s(self) -> float:
        """10⁹ bytes/s."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def roofline_share(self) -> float | None:
        """Speed as a share of min(peak, intensity · bandwidth); above 1 where operands came from a cache."""
        return None if self.bound is None or not self.seconds else self.bound / self.seconds


class Profile:
    """Records every native call of the block, in all threads; one recording at a time.

    Attributes:
        records: the calls in order. overwritten: older calls beyond `capacity` (each takes 112 bytes) that were
            dropped. seconds: how long the block took.
    """

    def __init__(self, capacity: int = 1 << 16) -> None:
        self.capacity = capacity
        self.records: list[Record] = []
        self.overwritten = 0
        self.seconds = 0.0

    def __enter__(self) -> Profile:
        cpu.profile_start(self.capacity)
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._began
        rows, self.overwritten = cpu.profile_stop()
        self.records = [Record(*row) for row in rows]

    def kernels(self, peaks: Mapping[str, float] | None = None, by_sizes: bool = False) -> list[Kernel]:
        """Calls summed by name and type (and sizes), the longest first. peaks: what ``cpu.peaks()`` gave."""
        groups: dict[tuple[object, ...], list[Record]] = {}
        for record in self.records:
            groups.setdefault((record.name, record.dtype, record.sizes if by_sizes else None), []).append(record)
        rows = [summed(group, peaks, by_sizes) for group in groups.values()]
        return sorted(rows, key=lambda row: -row.seconds)

    def table(self, peaks: Mapping[str, float] | None = None, by_sizes: bool = False) -> str:
        """`kernels` as text."""
        return table(self.kernels(peaks, by_sizes), self.seconds)

    def trace(self) -> dict[str, Any]:
        """The records in the trace event format that chrome://tracing and ui.perfetto.dev show."""
        return {"displayTimeUnit": "ms", "traceEvents": [event(record) for record in self.records]}

    def svg(self, peaks: Mapping[str, float] | None = None, title: str = "Where the time goes") -> str:
        """The same as a picture."""
        return draw(self.kernels(peaks), self.seconds, title)


def summed(records: Sequence[Record], peaks: Mapping[str, float] | None, by_sizes: bool) -> Kernel:
    """The row of some calls of one kernel."""
    first = records[0]
    known = peaks is not None and any(r.flops or r.bytes for r in records)
    return Kernel(
        name=first.name,
        dtype=first.dtype,
        sizes=first.sizes if by_sizes else None,
        calls=len(records),
        seconds=sum(r.duration for r in records) * 1e-9,
        flops=sum(r.flops for r in records),
        bytes=sum(r.bytes for r in records),
        bound=sum(bound(r, peaks) for r in records) if known and peaks is not None else None,
    )


def bound(record: Record, peaks: Mapping[str, float]) -> float:
    """Seconds that the machine needs at least: for the arithmetic, or for the memory if that takes longer."""
    arithmetic = peaks["bf16" if record.dtype == "bf16" else "f32"]
    return max(record.flops / arithmetic, record.bytes / max(peaks["read"], peaks["copy"]))


def event(record: Record) -> dict[str, Any]:
    """A record as a complete event; times in microseconds."""
    sizes = "x".join(str(size) for size in record.sizes if size)
    seconds = record.duration * 1e-9 or 1e-9
    return {
        "name": f"{record.name} {sizes}".rstrip(),
        "cat": record.dtype,
        "ph": "X",
        "ts": record.start / 1e3,
        "dur": record.duration / 1e3,
        "pid": 0,
        "tid": record.thread,
        "args": {
            "dtype": record.dtype,
            "flops": record.flops,
            "bytes": record.bytes,
            "gflops": record.flops / seconds / 1e9,
            "gb_per_s": record.bytes / seconds / 1e9,
        },
    }


def table(rows: Sequence[Kernel], seconds: float) -> str:
    """Rows with their part of `seconds`, and what is left for all that isn't a kernel."""
    lines = [("kernel", "calls", "ms", "time", "GFLOP/s", "GB/s", "of roofline")]
    for row in rows:
        share = row.roofline_share
        lines.append(
            (
                label(row),
                f"{row.calls:,}",
                f"{row.seconds * 1e3:,.2f}",
                portion(row.seconds, seconds),
                f"{row.gflops:,.1f}" if row.flops else "",
                f"{row.gb_per_s:,.1f}" if row.bytes else "",
                "" if share is None else f"{share:.0%}",
            )
        )
    left = between(rows, seconds)
    lines.append((BETWEEN, "", f"{left * 1e3:,.2f}", portion(left, seconds), "", "", ""))
    name, *numbers = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([first.ljust(name), *(cell.rjust(w) for cell, w in zip(rest, numbers, strict=True))]).rstrip()
        for first, *rest in lines
    )


def label(row: Kernel) -> str:
    """A row's name, with its type where that isn't f32, and its sizes where it has them."""
    sizes = "x".join(str(size) for size in row.sizes or () if size)
    return " ".join(word for word in (row.name, "" if row.dtype == "f32" else row.dtype, sizes) if word)


def portion(seconds: float, whole: float) -> str:
    return f"{seconds / whole:.1%}" if whole else ""


def between(rows: Iterable[Kernel], seconds: float) -> float:
    """Seconds outside of kernels; none where calls of several threads add up to more than the block took."""
    return max(0.0, seconds - sum(row.seconds for row in rows))


def draw(rows: Sequence[Kernel], seconds: float, title: str) -> str:
    """The SVG document: a bar a kernel, as long as its time; the solid part is the least it could take."""
    shown = [row for row in rows if row.seconds >= 0.002 * seconds][:MAX_BARS]
    bars = [(label(row), row.seconds, row.bound, f"{row.calls:,} calls{rates(row)}") for row in shown]
    others = sum(row.seconds for row in rows) - sum(row.seconds for row in shown)
    if others > 0:
        bars.append((f"{len(rows) - len(shown)} others", others, None, ""))
    bars.append((BETWEEN, between(rows, seconds), None, "Python"))
    longest = max((length for _, length, _, _ in bars), default=0.0) or 1.0
    height = TOP + BAR * len(bars) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        f"<title>{escape(title)}</title>",
        f'<text x="{GAP}" y="24" font-size="15" font-weight="600">{escape(title)}</text>',
        f'<text x="{WIDTH - GAP}" y="24" text-anchor="end">{seconds * 1e3:,.1f} ms; solid: the least the machine '
        "could take</text>",
    ]
    for i, (name, length, least, note) in enumerate(bars):
        top, colour = TOP + BAR * i, EVAL if name == BETWEEN else TRAIN
        middle, scale = top + BAR / 2 + 4, (WIDTH - LEFT - RIGHT) / longest
        parts.append(f'<text x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>')
        for part, opacity in ((length, 0.35), (min(least or 0.0, length), 1.0)):
            parts.append(
                f'<rect x="{LEFT}" y="{top + 3}" width="{part * scale:.1f}" height="{BAR - 6}" fill="{colour}" '
                f'fill-opacity="{opacity}"/>'
            )
        text = f"{length * 1e3:,.1f} ms, {portion(length, seconds)}{', ' if note else ''}{note}"
        parts.append(f'<text x="{LEFT + length * scale + 8:.1f}" y="{middle:.1f}">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def rates(row: Kernel) -> str:
    speed = f", {row.gflops:,.0f} GFLOP/s" if row.flops else f", {row.gb_per_s:,.1f} GB/s" if row.bytes else ""
    return speed + ("" if row.roofline_share is None else f", {row.roofline_share:.0%} of roofline")
