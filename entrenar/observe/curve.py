"""The loss curve of a run as an SVG: no plotting library, readable on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 860, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 64, 52, 52  # margins, pixels
TRAIN, EVAL, RATE, INK = "#3b82f6", "#f97316", "#8b9099", "#7d828c"  # mid tones: they stand out on white and on black
MAX_POINTS = 1500  # a polyline never has more: neighbours are averaged

Points = Sequence[tuple[float, float]]


def write_curve(path: Path, rows: Iterable[Mapping[str, Any]], title: str = "Training loss") -> bool:
    """Draw the rows of a metrics.jsonl: train loss raw (pale) and smoothed, evaluation loss, learning rate (dashed).

    Returns:
        False, and no file, where no row has a finite loss.
    """
    train, rate, evals = [], [], []
    for row in rows:
        if row.get("event") == "eval" and row.get("nll") is not None:
            evals.append((float(row["step"]), float(row["nll"])))
        elif "event" not in row and row.get("loss") is not None:
            train.append((float(row["step"]), float(row["loss"])))
            rate.append((float(row["step"]), float(row["lr"])))
    if not train and not evals:
        return False
    path.write_text(draw(train, evals, rate, title), encoding="utf-8")
    return True


def draw(train: Points, evals: Points, rate: Points, title: str) -> str:
    """The SVG document; `train` and `evals` are (step, nats a token), `rate` (step, learning rate)."""
    smoothed = smooth(train)
    steps = [s for s, _ in (*train, *evals)]
    # Lines may leave the frame: one spike must not flatten all the rest.
    shown = [*evals, *smoothed[:1], *smoothed[-1:]]
    losses = sorted([value for _, value in shown] + _central([value for _, value in train]))
    x = Axis(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y = Axis(losses[0], losses[-1], HEIGHT - BOTTOM, TOP, pad=0.06)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        f"<title>{escape(title)}</title>",
        f'<clipPath id="frame"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>',
        f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">{escape(title)}</text>',
        *_frame(x, y),
    ]
    legend = []
    if rate and max(r for _, r in rate) > 0:
        top = Axis(0.0, max(r for _, r in rate), HEIGHT - BOTTOM, TOP, pad=0.06)
        parts += [_line(rate, x, top, RATE, 'stroke-width="1.2" stroke-dasharray="4 4" stroke-opacity="0.75"')]
        parts += _right_axis(top)
        legend.append(("learning rate", RATE, 'stroke-dasharray="4 4"'))
    if train:
        parts.append(_line(train, x, y, TRAIN, 'stroke-width="1" stroke-opacity="0.3"'))
        parts.append(_line(smoothed, x, y, TRAIN, 'stroke-width="2.2"'))
        parts += _dots(train[:1] if len(train) == 1 else [], x, y, TRAIN)
        legend.insert(0, ("train (smoothed)", TRAIN, ""))
    if evals:
        parts.append(_line(evals, x, y, EVAL, 'stroke-width="2"'))
        parts += _dots(evals if len(evals) <= 60 else [], x, y, EVAL)
        legend.insert(len(legend[:1]) if train else 0, (f"evaluation, last {evals[-1][1]:.3f}", EVAL, ""))
    return "\n".join([*parts, *_legend(legend), "</svg>", ""])


class Axis:
    """A linear map from values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float, pad: float = 0.0) -> None:
        span = high - low or max(abs(high), 1.0) * 0.1
        self.low = low - pad * span if low != 0 else low
        self.high = (high if high > low else low + span) + pad * span
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values inside the axis: multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def smooth(points: Points) -> list[tuple[float, float]]:
    """Centred mean over about 1/30 of the run, with what there is of it at the end: it does not lag behind."""
    sums = [0.0, *accumulate(value for _, value in points)]
    half = len(points) // 60
    smoothed = []
    for i, (s, _) in enumerate(points):
        first, end = i - min(half, i), min(len(points), i + min(half, i) + 1)
        smoothed.append((s, (sums[end] - sums[first]) / (end - first)))
    return smoothed


def _central(values: list[float]) -> list[float]:
    """The 1st and 99th percentile."""
    if not values:
        return []
    ordered = sorted(values)
    return [ordered[int(0.01 * (len(ordered) - 1))], ordered[math.ceil(0.99 * (len(ordered) - 1))]]


def _thinned(points: Points) -> Points:
    """At most MAX_POINTS points: means of runs of neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(s for s, _ in run) / len(run), sum(v for _, v in run) / len(run)) for run in runs]


def _line(points: Points, x: Axis, y: Axis, colour: str, style: str) -> str:
    path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in _thinned(points))
    return (
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-linejoin="round" {style} '
        'clip-path="url(#frame)"/>'
    )


def _dots(points: Points, x: Axis, y: Axis, colour: str) -> list[str]:
    return [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" fill="{colour}"/>' for s, v in points]


def _frame(x: Axis, y: Axis) -> list[str]:
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value in y.ticks(6):
        at = y(value)
        ends = f'x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"'
        parts.append(f'<line {ends} stroke="{INK}" stroke-opacity="0.2"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in x.ticks(8):
        if value != round(value):
            continue  # there are no half steps
        at = x(value)
        parts.append(f'<line x1="{at:.1f}" y1="{floor}" x2="{at:.1f}" y2="{floor + 5}" stroke="{INK}"/>')
        parts.append(f'<text x="{at:.1f}" y="{floor + 20}" text-anchor="middle">{value:,.0f}</text>')
    parts.append(f'<line x1="{LEFT}" y1="{floor}" x2="{right}" y2="{floor}" stroke="{INK}"/>')
    parts.append(f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">step</text>')
    parts.append(
        f'<text transform="translate(16 {(TOP + floor) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        "loss, nats a token</text>"
    )
    return parts


def _right_axis(rate: Axis) -> list[str]:
    return [
        f'<text x="{WIDTH - RIGHT + 8}" y="{rate(value) + 4:.1f}" fill="{RATE}" font-size="11">{value:.2g}</text>'
        for value in rate.ticks(3)
    ]


def _legend(entries: Sequence[tuple[str, str, str]]) -> list[str]:
    parts, at = [], WIDTH - RIGHT
    for name, colour, style in reversed(entries):
        at -= round(6.6 * len(name))
        parts.append(f'<text x="{at}" y="24">{escape(name)}</text>')
        parts.append(
            f'<line x1="{at - 30}" y1="20" x2="{at - 8}" y2="20" stroke="{colour}" stroke-width="2.2" {style}/>'
        )
        at -= 50
    return parts
