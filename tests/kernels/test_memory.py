"""Results live in aligned memory that is reused only after they are gone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from kernels.checks import floats

from entrenar import _native


def test_live_results_never_share_memory() -> None:
    """Hold, drop and make results of many sizes, around the size from which freed blocks are kept."""
    rng, source = np.random.default_rng(1), floats(1, 200_000)
    live: list[tuple[int, np.ndarray]] = []
    for step in range(600):
        if live and rng.random() < 0.5:
            n, held = live.pop(rng.integers(len(live)))
            np.testing.assert_array_equal(held, source[:n])
        n = int(rng.choice([0, 1, 17, 32_752, 32_768, 33_000, 36_000, 100_000, 200_000])) + step % 3 * 16
        n = min(n, source.size)
        live.append((n, _native.copy(source[:n])))
        assert live[-1][1].ctypes.data % 64 == 0
    for n, held in live:
        np.testing.assert_array_equal(held, source[:n])


def test_threads_make_and_drop_results_together() -> None:
    source, wrong = floats(2, 60_000), []

    def work() -> None:
        for _ in range(200):
            if not np.array_equal(_native.unary("neg", source), -source):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def test_views_keep_a_result_alive() -> None:
    view = _native.copy(floats(3, 100_000))[10:20]
    for _ in range(5):
        _native.scale_(_native.copy(floats(4, 100_000)), 0.0)
    np.testing.assert_array_equal(view, floats(3, 100_000)[10:20])


RESIDENT = """
import os
import numpy as np
from entrenar import _native

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

one = np.float32(1)
def made(megabytes):
    return _native.copy(np.broadcast_to(one, int(megabytes * 250_000)))

made(1)
before = resident()
"""


def resident_after(code: str) -> float:
    """Megabytes, in a process of its own, whose peak is its own."""
    out = subprocess.run([sys.executable, "-c", RESIDENT + code], check=True, capture_output=True, text=True).stdout
    return float(out)


def test_kept_blocks_are_bounded() -> None:
    """What stays after a model's worth of results is dropped is within an eighth of the machine's memory."""
    code = """
most = os.sysconf("SC_PHYS_PAGES") // 8 * os.sysconf("SC_PAGE_SIZE") / 1e6
held = [made(64) for _ in range(int(most) // 64 + 8)]
del held
print((resident() - before) / most)
"""
    assert 0 < resident_after(code) < 1.05


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer's quarantine keeps more")
def test_kept_blocks_never_raise_the_peak() -> None:
    """Blocks of ever new sizes fit none that is kept: those go, so that memory stays at the most that was in use."""
    code = """
try:
    _native.copy(np.broadcast_to(one, 1 << 45))  # what can't be had doesn't count
except MemoryError:
    pass
held = [made(16) for _ in range(6)]
peak = resident()
del held
worst = 0
for size in range(20, 90, 3):
    held = made(size)
    worst = max(worst, resident())
    del held
print(worst - peak)
"""
    assert resident_after(code) < 8


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer's quarantine keeps more")
def test_sums_of_a_wide_and_deep_product_are_bounded() -> None:
    """A bf16 result of 33 MB can't hold the f32 sums of its parts; as an array of their own they would be 65 MB."""
    code = """
import ml_dtypes
from entrenar.backend import cpu

def peak():
    with open("/proc/self/status") as f:
        return int(next(line for line in f if line.startswith("VmHWM")).split()[1]) / 1e3

x, w = np.full((1000, 2300), 1, np.float16), np.full((16400, 2300), 1, np.float16)
out = np.full((1000, 16400), 1, ml_dtypes.bfloat16)
before = peak()
cpu.product([(x, w.T)], out)
assert (out == 2304).all()
print(peak() - before)
"""
    assert resident_after(code) < 40


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer's heap is another one")
def test_free_pages_of_the_heap_are_given_back() -> None:
    code = """
held = [bytes(2000) for _ in range(50_000)]
last = held.pop()
del held
kept = resident() - before
_native.trim()
print(kept if kept < 50 else resident() - before)
"""
    assert resident_after(code) < 20


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer keeps no blocks")
def test_what_is_kept_counts_as_free() -> None:
    """A plan for what comes next sees no memory of what was dropped."""
    code = """
from entrenar.models.memory import available_bytes, resident_bytes
resident_before, free_before = resident_bytes(), available_bytes()
held = [made(16) for _ in range(30)]
assert resident_bytes() > resident_before + 400e6
del held
assert _native.kept_bytes() > 400e6
assert resident() * 1e6 > resident_before + 400e6
print(max(abs(resident_bytes() - resident_before) / 1e6, (free_before - available_bytes()) / 1e6 / 10))
"""
    assert resident_after(code) < 40


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer keeps no blocks")
def test_steps_after_the_first_work_in_the_same_pages() -> None:
    """Results of 8, 60 and 14 MiB follow each other, none fits where another was: huge pages move between them. If they
    didn't, each step would take 60 MiB of fresh memory or more: 30 page faults, or 15,000 where pages are small."""
    code = """
import resource

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def whole(mebibytes):  # huge pages, the block's header included
    return _native.copy(np.broadcast_to(one, (mebibytes << 18) - 16))

def step():
    held = [whole(8) for _ in range(8)]  # activations
    room = whole(60)                     # logits, at the peak
    del room
    while held:                          # the way back
        gradient = whole(14)
        held.pop()

step()
base = faults()
for _ in range(3):
    step()
print((faults() - base) / 3)
"""
    assert resident_after(code) < 15


@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer keeps no blocks")
def test_moved_pages_belong_to_one_block() -> None:
    """Results of many sizes around huge pages, dropped in any order, keep their values, and the peak is theirs."""
    code = """
rng = np.random.default_rng(0)
held, most, worst = [], 0.0, 0.0
for turn in range(300):
    size = float(rng.choice([0.2, 1, 3.9, 4.2, 6.3, 9, 17, 40]))
    if sum(s for s, _, _ in held) + size > 120 or rng.random() < 0.3 and held:
        s, value, array = held.pop(rng.integers(len(held)))
        assert array.min() == array.max() == value
        del array
    else:
        array = made(size)
        _native.scale_(array, float(turn))
        held.append((size, turn, array))
    most = max(most, sum(s for s, _, _ in held))
    worst = max(worst, resident() - before)
for _, value, array in held:
    assert array.min() == array.max() == value
print(worst - most)
"""
    assert resident_after(code) < 16
