"""The ring of native calls and the machine's limits: what they say, not how fast anything is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from kernels.checks import floats

from entrenar import backend
from entrenar.backend import cpu
from entrenar.errors import ShapeError, UsageError

pytestmark = pytest.mark.tier1

BLOCKS = np.zeros(18 * 5, np.uint8)  # five blocks of q4_0: 90 bytes, 160 values


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    yield
    cpu.profile_stop()


def test_a_recorded_call_has_its_name_times_work_and_thread():
    before = time.monotonic_ns()
    cpu.profile_start()
    cpu.dequantize("q4_0", BLOCKS, ml_dtypes.bfloat16)
    cpu.scale_(floats(0, 10), 2.0)
    records, overwritten = cpu.profile_stop()
    after = time.monotonic_ns()
    assert overwritten == 0
    assert [r[0] for r in records] == ["dequantize", "scale_"]
    _, start, duration, flops, nbytes, kind, sizes, thread = records[0]
    assert before <= start <= start + duration <= records[1][1] <= after
    assert (flops, nbytes, kind, sizes) == (0, 90 + 2 * 160, "bf16", (160, 0, 0))
    assert thread == threading.get_native_id()


def test_nothing_is_recorded_before_and_after():
    cpu.scale_(floats(0, 10), 2.0)
    cpu.profile_start()
    assert cpu.profile_stop() == ([], 0)
    cpu.scale_(floats(0, 10), 2.0)
    assert cpu.profile_stop() == ([], 0)


def test_of_too_many_calls_the_last_are_kept_in_order():
    cpu.profile_start(4)
    for i in range(7):
        cpu.dequantize("q4_0", BLOCKS[: 18 * (i % 5 + 1)])
    records, overwritten = cpu.profile_stop()
    assert overwritten == 3
    assert [r[6][0] for r in records] == [128, 160, 32, 64]
    assert [r[1] for r in records] == sorted(r[1] for r in records)


def test_a_refused_call_is_not_recorded():
    cpu.profile_start()
    with pytest.raises(ShapeError):
        cpu.add_(floats(0, 3), floats(0, 4))
    assert cpu.profile_stop() == ([], 0)


def test_callers_of_many_threads_share_the_ring():
    cpu.profile_start(64)
    threads = [threading.Thread(target=lambda: [cpu.scale_(floats(0, 8), 2.0) for _ in range(10)]) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records, overwritten = cpu.profile_stop()
    assert (len(records), overwritten) == (50, 0)
    assert {r[0] for r in records} == {"scale_"}
    assert min(r[2] for r in records) >= 0


def test_only_one_recording_at_a_time():
    cpu.profile_start()
    with pytest.raises(UsageError, match="under way"):
        cpu.profile_start()


@pytest.mark.parametrize("capacity", [0, -1, 2**24 + 1])
def test_a_capacity_that_can_not_be_is_a_usage_error(capacity):
    with pytest.raises(UsageError, match="capacity"):
        cpu.profile_start(capacity)


def test_no_memory_for_the_ring_leaves_the_recording_off():
    cpu._fail_allocation(1)
    with pytest.raises(MemoryError, match="profile"):
        cpu.profile_start()
    assert cpu.profile_stop() == ([], 0)


def test_limits_of_the_machine(isa):
    limits = cpu.peaks(0.01)
    alone = [cpu.peak(dtype, 0.01, rounds=1) for dtype in ("f32", "bf16")]
    assert set(limits) == {"f32", "bf16", "read", "copy"}
    assert all(1e7 < value < 1e16 for value in (*limits.values(), *alone))
    if isa != "amx" or not backend.cpu_info()["software_tiles"]:
        assert limits["bf16"] >= limits["f32"] * 0.99


def test_limits_without_memory_and_without_sense():
    cpu._fail_allocation(1)
    with pytest.raises(MemoryError, match="peaks"):
        cpu.peaks(0.001)
    for seconds in (0, -1, float("nan"), 61):
        with pytest.raises(UsageError, match="seconds"):
            cpu.peaks(seconds)
    for rounds in (0, -1, 1001):
        with pytest.raises(UsageError, match="rounds"):
            cpu.peak("f32", 0.001, rounds)
    with pytest.raises(UsageError, match="'f16'"):
        cpu.peak("f16")


def recorded(call):
    """(flops, bytes, type, sizes) of the only native call that `call` makes."""
    cpu.profile_start()
    call()
    (record,), _ = cpu.profile_stop()
    return record[3:7]


def test_the_work_of_products():
    a, b = floats(0, 2, 3, 5), floats(1, 2, 5, 7)
    assert recorded(lambda: cpu.matmul(a, b)) == (2 * 2 * 3 * 5 * 7, 4 * 2 * (15 + 35 + 21), "f32", (3, 7, 5))
    # one weight for a batch: rows of one product
    assert recorded(lambda: cpu.matmul(a, b[0])) == (2 * 6 * 5 * 7, 4 * (30 + 35 + 42), "f32", (6, 7, 5))
    x, w, low = (floats(2, *shape).astype(ml_dtypes.bfloat16) for shape in ((3, 5), (5, 8), (3, 2)))
    out = np.zeros((3, 8), np.float32)
    terms = [(x, w), (low, floats(3, 2, 4), 4)]
    kind = "bf16" if cpu.fast_bf16() else "f32"
    flops, read = 2 * 3 * (5 * 8 + 2 * 4), 2 * (15 + 40 + 6) + 4 * 8
    assert recorded(lambda: cpu.product(terms, out)) == (flops, read + 96, kind, (3, 8, 5))
    assert recorded(lambda: cpu.product(terms, out, accumulate=True)) == (flops, read + 192, kind, (3, 8, 5))
    assert recorded(lambda: cpu.product([(floats(0, 3, 5), w)], out, residual=out)) == (
        2 * 3 * 5 * 8, 60 + 80 + 2 * 96, "f32", (3, 8, 5)
    )  # fmt: skip
