"""The loss curve: what is drawn stands where the numbers say, in well-formed XML."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.observe.curve import EVAL, HEIGHT, MAX_POINTS, TRAIN, WIDTH, Axis, draw, smooth, write_curve

pytestmark = pytest.mark.tier1

SVG = "{http://www.w3.org/2000/svg}"


def lines(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    root = ElementTree.fromstring(svg)
    found = [e.attrib["points"] for e in root.iter(f"{SVG}polyline") if e.attrib["stroke"] == colour]
    return [[(float(a), float(b)) for a, b in (pair.split(",") for pair in points.split())] for points in found]


def test_a_run_is_drawn(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 5.0 - 0.01 * s, "lr": 1e-3} for s in range(1, 301)]
    rows += [{"event": "eval", "step": s, "nll": 4.0 - 0.01 * s, "perplexity": 1, "tokens": 1} for s in (100, 300)]
    rows += [{"step": 301, "loss": None, "lr": 1e-3}, {"event": "skip", "step": 302, "loss": 9.0}]
    assert write_curve(tmp_path / "loss.svg", rows, "a < b & c")
    svg = (tmp_path / "loss.svg").read_text()
    raw, smoothed = lines(svg, TRAIN)
    (evals,) = lines(svg, EVAL)
    assert len(raw) == len(smoothed) == 300
    assert len(evals) == 2
    for x, y in (*raw, *smoothed, *evals):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
    assert raw == sorted(raw)  # steps go right, a falling loss goes down
    assert raw[-1][1] - raw[0][1] > 100
    assert evals[1][1] > raw[-1][1]  # a lower loss is lower on the page
    assert evals[1][0] == raw[-1][0]
    texts = [e.text for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert {"a < b & c", "step", "train (smoothed)", "evaluation, last 1.000", "learning rate"} <= set(texts)


def test_nothing_to_draw_writes_no_file(tmp_path: Path) -> None:
    assert not write_curve(tmp_path / "loss.svg", [{"step": 1, "loss": None, "lr": 0.0}])
    assert not (tmp_path / "loss.svg").exists()


@pytest.mark.parametrize("train", [[], [(1.0, 2.5)], [(1.0, 0.0), (2.0, 0.0)]])
def test_degenerate_runs_are_still_well_formed(train: list) -> None:
    svg = draw(train, [(4.0, 2.0)], [], "short")
    assert "nan" not in svg
    ElementTree.fromstring(svg)


def test_a_spike_does_not_flatten_the_rest() -> None:
    points = [(float(s), 2.0 + math.sin(s)) for s in range(400)]
    points[3] = (3.0, 1e6)
    raw, _ = lines(draw(points, [], [], "spike"), TRAIN)
    rest = [y for i, (_, y) in enumerate(raw) if i != 3]
    assert raw[3][1] < 0  # far above the frame, where it is clipped
    assert max(rest[50:]) - min(rest[50:]) > 5


def test_long_runs_are_thinned() -> None:
    points = [(float(s), 1.0 / (s + 1)) for s in range(10 * MAX_POINTS + 7)]
    svg = draw(points, [], [], "long")
    assert all(len(line) <= MAX_POINTS for line in lines(svg, TRAIN))


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6))
def test_ticks_are_round_inside_and_a_handful(low: float, span: float) -> None:
    axis = Axis(low, low + span, 0.0, 100.0)
    ticks = axis.ticks(6)
    assert 2 <= len(ticks) <= 7
    assert all(axis.low - 1e-6 * span <= t <= axis.high + 1e-6 * span for t in ticks)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=200))
def test_smoothing_stays_within_the_data(values: list[float]) -> None:
    smoothed = [v for _, v in smooth([(float(i), v) for i, v in enumerate(values)])]
    assert len(smoothed) == len(values)
    assert min(values) - 1e-9 <= min(smoothed)
    assert max(smoothed) <= max(values) + 1e-9
