"""Sums over any dimensions and questions about whole arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.checks import BF16, FLOWS, TAILS, assert_close, floats, wide
from kernels.guard import guarded

from entrenar import _native
from entrenar.errors import ShapeError

LEVELS = _native.available_isas()


@pytest.mark.tier1
@pytest.mark.parametrize("dtype", FLOWS)
def test_sum_meets_every_tail(isa: str, dtype: type) -> None:
    for n in [*TAILS, 127, 129, 1025]:
        x, rows = guarded((floats(n, n) + 1).astype(dtype)), guarded(floats(n, 3, n).astype(dtype))
        assert_close(_native.sum(x), wide(x).sum())
        assert_close(_native.sum(rows, (0,)), wide(rows).sum(0))
        assert_close(_native.sum(rows, (1,)), wide(rows).sum(1))


def test_columns_of_bf16_are_summed_wide(isa: str, same_on_any_threads) -> None:
    x = (floats(1, 5001, 67) + 1).astype(BF16)
    assert_close(_native.sum(x, (0,)), wide(x).sum(0), rel=1e-7)
    assert_close(_native.sum(x.T, (1,)), wide(x).sum(0), rel=1e-7)
    assert_close(_native.sum(x[::3, 5:40], (0,), keepdims=True), wide(x)[::3, 5:40].sum(0, keepdims=True), rel=1e-7)
    same_on_any_threads(lambda: _native.sum(x, (0,)))
    same_on_any_threads(lambda: _native.sum(x))


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=5),
    data=st.data(),
    keepdims=st.booleans(),
    level=st.sampled_from(LEVELS),
)
def test_sum_over_any_dimensions_of_any_strides(
    shape: list[int], data: st.DataObject, keepdims: bool, level: str
) -> None:
    before = _native.isa()
    _native._set_isa(level)
    try:
        order = data.draw(st.permutations(range(len(shape))))
        x = floats(1, *shape).transpose(order)
        if data.draw(st.booleans()):
            x = np.broadcast_to(x, (3, *x.shape))
        if x.ndim and data.draw(st.booleans()):
            x = x[..., ::-1]
        axes = data.draw(st.none() | st.sets(st.integers(-x.ndim, x.ndim - 1)) if x.ndim else st.none())
        if axes is not None:
            axes = tuple({a % x.ndim: a for a in axes}.values())
        want = wide(x).sum(axis=axes, keepdims=keepdims)
        assert_close(_native.sum(x, axes, keepdims), want, rel=3e-7)
    finally:
        _native._set_isa(before)


def test_long_sums_keep_their_digits(isa: str) -> None:
    x = np.full(3_000_001, 0.1, np.float32)
    assert _native.sum(x) == np.float32(wide(x).sum())
    large = np.float32([1e30, 1, -1e30] * 999)
    assert _native.sum(large[: 3 * 64]) == 0 or abs(_native.sum(large)) < 1e15
    tall = floats(1, 70001, 3)
    assert_close(_native.sum(tall, (0,)), wide(tall).sum(0), rel=1e-7)
    assert_close(_native.sum(tall.T, (1,)), wide(tall).sum(0), rel=1e-7)
    grid = floats(2, 37, 5, 301)
    for axes in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]:
        assert_close(_native.sum(grid, axes), wide(grid).sum(axes), rel=2e-7)


def test_sum_of_special_values(isa: str) -> None:
    assert np.isnan(_native.sum(np.float32([1, np.nan, 2])))
    assert _native.sum(np.float32([1, np.inf, 2])) == np.inf
    assert np.isnan(_native.sum(np.float32([-np.inf, np.inf])))
    assert _native.sum(np.full(100, 1e-45, np.float32)) == np.float32(1.4012984643e-45 * 100)
    assert _native.sum(np.float32([3e38, 3e38, -3e38])) == np.float32(3e38)
    np.testing.assert_array_equal(_native.sum(np.zeros((3, 0), np.float32), (1,)), np.zeros(3))
    assert _native.sum(np.zeros((0, 3), np.float32), (1,)).shape == (0,)


@pytest.mark.tier1
def test_square_sums_and_all_finite(isa: str) -> None:
    for n in [0, *TAILS, 65535, 65536, 65537, 200001]:
        x = floats(n, n)
        assert _native.square_sums([x])[0] == pytest.approx((wide(x) ** 2).sum(), rel=1e-13)
        assert _native.all_finite(x)
        for bad in (np.nan, np.inf, -np.inf):
            for at in {0, n // 2, n - 1} if n else ():
                y = x.copy()
                y[at] = bad
                assert not _native.all_finite(y)
    assert _native.square_sums([np.full(10, 1e30, np.float32)])[0] == pytest.approx(1e61)
    assert _native.all_finite(np.float32([3.4e38, -3.4e38, 1e-45]))


def test_results_do_not_depend_on_threads(isa: str, same_on_any_threads) -> None:
    x = floats(1, 613, 1009)
    for axes in [None, (0,), (1,)]:
        same_on_any_threads(lambda axes=axes: _native.sum(x, axes))
        same_on_any_threads(lambda axes=axes: _native.sum(x.T, axes))
    same_on_any_threads(lambda: np.float64(_native.square_sums([x])[0]))


def test_bad_axes() -> None:
    x = np.zeros((2, 3), np.float32)
    for axes in [(2,), (-3,), (0, 0), (1, -1)]:
        with pytest.raises(ShapeError, match="sum: axis"):
            _native.sum(x, axes)


def test_out_of_memory_is_an_exception() -> None:
    x = floats(1, 200001)
    _native.sum(x)  # the scratch buffer is there now
    want = _native.sum(x)
    failures = 0
    for nth in range(1, 4):
        _native._fail_allocation(nth)
        try:
            assert _native.sum(x) == want
        except MemoryError:
            failures += 1
        finally:
            _native._fail_allocation(0)
    assert failures >= 1
