"""Profiles: sums, limits, trace and picture of known records, and that a block's calls are the ones recorded."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from entrenar.backend import cpu
from entrenar.errors import UsageError
from entrenar.observe.profile import WIDTH, Profile, Record, draw

pytestmark = pytest.mark.tier1

SVG = "{http://www.w3.org/2000/svg}"
PEAKS = {"f32": 100e9, "bf16": 200e9, "read": 8e9, "copy": 10e9}
MS = 1_000_000  # nanoseconds


def known() -> Profile:
    """Five calls in 20 ms: products bound by arithmetic and by memory, a norm, and a call of no known work."""
    profile = Profile()
    profile.seconds = 20e-3
    profile.records = [
        Record("product", 0 * MS, 4 * MS, 2e8, 1e6, "f32", (10, 20, 30), 7),  # 2 ms at 100 GFLOP/s
        Record("product", 5 * MS, 4 * MS, 1e8, 2e7, "f32", (10, 20, 40), 7),  # 2 ms at 10 GB/s
        Record("product", 10 * MS, 4 * MS, 2e8, 0, "bf16", (10, 20, 30), 7),  # 1 ms at 200 GFLOP/s
        Record("rms_norm", 14 * MS, 1 * MS, 0, 5e6, "f32", (3, 0, 0), 8),  # 0.5 ms at 10 GB/s
        Record("copy", 15 * MS, 1 * MS, 0, 0, "f32", (0, 0, 0), 8),
    ]
    return profile


def test_rows_are_sums_with_the_share_of_the_nearer_limit() -> None:
    rows = known().kernels(PEAKS)
    assert [(r.name, r.dtype, r.calls) for r in rows] == [
        ("product", "f32", 2), ("product", "bf16", 1), ("rms_norm", "f32", 1), ("copy", "f32", 1)
    ]  # fmt: skip
    first = rows[0]
    assert first.seconds == pytest.approx(8e-3)
    assert first.gflops == pytest.approx(3e8 / 8e-3 / 1e9)
    assert first.gb_per_s == pytest.approx(2.1e7 / 8e-3 / 1e9)
    assert [r.roofline_share for r in rows] == [pytest.approx(x) for x in (0.5, 0.25, 0.5)] + [None]


def test_rows_by_sizes_and_without_limits() -> None:
    rows = known().kernels(by_sizes=True)
    assert {(r.name, r.dtype, r.sizes) for r in rows} == {
        ("product", "f32", (10, 20, 30)), ("product", "f32", (10, 20, 40)), ("product", "bf16", (10, 20, 30)),
        ("rms_norm", "f32", (3, 0, 0)), ("copy", "f32", (0, 0, 0)),
    }  # fmt: skip
    assert {r.roofline_share for r in rows} == {None}


def test_the_table_says_where_the_time_went() -> None:
    lines = [line.split() for line in known().table(PEAKS, by_sizes=True).splitlines()]
    assert lines[1] == ["product", "10x20x30", "1", "4.00", "20.0%", "50.0", "0.2", "50%"]
    assert lines[-1] == ["between", "kernels", "6.00", "30.0%"]
    assert ["product", "bf16", "10x20x30", "1", "4.00", "20.0%", "50.0", "25%"] in lines
    assert ["copy", "1", "1.00", "5.0%"] in lines


def test_calls_of_several_threads_leave_nothing_between() -> None:
    profile = known()
    profile.seconds = 10e-3  # 14 ms of calls
    assert profile.table().splitlines()[-1].split() == ["between", "kernels", "0.00", "0.0%"]


def test_the_trace_is_what_viewers_read() -> None:
    events = json.loads(json.dumps(known().trace()))["traceEvents"]
    assert len(events) == 5
    second = events[1]
    assert (second["name"], second["ph"], second["ts"], second["dur"], second["tid"]) == (
        "product 10x20x40", "X", 5000.0, 4000.0, 7
    )  # fmt: skip
    assert second["args"]["gflops"] == pytest.approx(25)
    assert events[4]["name"] == "copy"


def test_the_picture_has_a_bar_a_kernel_as_long_as_its_time() -> None:
    root = ElementTree.fromstring(known().svg(PEAKS, "a < b"))
    widths = [float(e.attrib["width"]) for e in root.iter(f"{SVG}rect")]
    whole, solid = widths[::2], widths[1::2]
    assert whole == [pytest.approx(whole[0] * ms / 8, abs=0.1) for ms in (8, 4, 1, 1, 6)]
    assert solid == [pytest.approx(whole[0] * ms / 8, abs=0.1) for ms in (4, 1, 0.5, 0, 0)]
    assert max(float(e.attrib["x"]) + float(e.attrib["width"]) for e in root.iter(f"{SVG}rect")) < WIDTH
    texts = [e.text or "" for e in root.iter(f"{SVG}text")]
    assert {"a < b", "product", "product bf16", "between kernels"} <= set(texts)
    assert any("38 GFLOP/s" in text and "50% of roofline" in text for text in texts)


@pytest.mark.parametrize("seconds", [0.0, 1e-9])
def test_an_empty_picture_is_well_formed(seconds: float) -> None:
    svg = draw([], seconds, "nothing")
    assert "nan" not in svg
    ElementTree.fromstring(svg)


def test_a_block_is_recorded_and_an_error_ends_it() -> None:
    x = np.ones((3, 5), np.float32)
    with pytest.raises(TypeError), Profile() as profile:
        cpu.scale_(x, cpu.scale_(x, 2.0))
    assert [record.name for record in profile.records] == ["scale_"]
    assert profile.seconds >= profile.records[0].duration * 1e-9
    with Profile(capacity=2) as again:
        for _ in range(5):
            cpu.scale_(x, 2.0)
    assert (len(again.records), again.overwritten) == (2, 3)
    with Profile(), pytest.raises(UsageError, match="under way"), Profile():
        pass
