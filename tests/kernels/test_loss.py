"""Cross-entropy and its gradient."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.checks import FLOWS, TAILS, assert_close, assert_each_close, floats, wide
from kernels.guard import guarded

from entrenar import _native
from entrenar.errors import DataError, DTypeError, ShapeError

SIZES = [*TAILS, 1023, 1024, 1025, 5003]


def reference(logits, labels, ignore_index=-100):
    """(losses, lse, softmax less one at the label), 0 in ignored rows."""
    x = wide(logits)
    kept = labels != ignore_index
    top = x.max(-1, keepdims=True)
    tail = np.log1p(np.exp(x - top).sum(-1) - 1)
    rows, at = np.arange(len(x)), np.where(kept, labels, 0)
    p = np.exp(x - top - tail[:, None])
    p[rows, at] -= 1
    return (top[:, 0] - x[rows, at] + tail) * kept, (top[:, 0] + tail) * kept, p * kept[:, None]


@pytest.mark.tier1
@pytest.mark.parametrize("dtype", FLOWS)
def test_cross_entropy(isa: str, dtype: type) -> None:
    for v in SIZES:
        logits, g = guarded(floats(v, 5, v, scale=4).astype(dtype)), floats(v + 1, 5)
        labels = np.random.default_rng(v).integers(0, v, 5)
        labels[2] = -100
        want, lse, slope = reference(logits, labels)
        losses, z = _native.cross_entropy(logits, labels)
        assert_each_close(losses, want, rel=1e-6, floor=1e-7)
        assert_each_close(z, lse, rel=1e-6, floor=1e-6)
        dlogits = _native.cross_entropy_backward(g, logits, labels, z)
        assert_close(dlogits, g[:, None] * slope, rel=2e-6, scale=np.abs(g).max(), dtype=dtype)
        assert not dlogits[2].any()


@pytest.mark.tier1
@pytest.mark.parametrize("dtype", FLOWS)
def test_the_gradient_replaces_the_logits(isa: str, dtype: type) -> None:
    for rows, v in [*((4, v) for v in SIZES), (1, 151_936), (3, 40_001)]:
        logits = guarded(floats(v, rows, v, scale=4).astype(dtype))
        labels = np.random.default_rng(v).integers(0, v, rows)
        if rows > 1:
            labels[1] = -100
        want, _, slope = reference(logits, labels)
        losses = _native.cross_entropy_gradient_(logits, labels, 0.37)
        assert_each_close(losses, want, rel=1e-6, floor=1e-7)
        assert_each_close(logits, np.float32(0.37) * slope, rel=2e-6, floor=2e-8, dtype=dtype)
        assert not logits[labels < 0].any()
        assert not losses[labels < 0].any()


@pytest.mark.parametrize("dtype", FLOWS)
def test_the_gradient_of_special_rows(isa: str, dtype: type) -> None:
    for v in (70, 2100, 70_000):
        logits = np.full((4, v), -np.inf, dtype)
        logits[0, v - 1] = 3e38
        logits[1, [5, v - 1]] = 1.0
        logits[2] = -3e38
        logits[3, v - 1] = -3.0
        losses = _native.cross_entropy_gradient_(logits, np.int64([v - 1, 5, 0, 0]), 1.0)
        np.testing.assert_allclose(losses, [0, np.log(2), np.log(v), np.inf], rtol=1e-6)
        assert not logits[0].any()
        assert logits[1, [5, v - 1, 0]].tolist() == [-0.5, 0.5, 0]
        assert logits[3, [0, v - 1]].tolist() == [-1, 1]
        assert wide(logits[2]).sum() == pytest.approx(0, abs=5e-3)
        for bad in (np.nan, np.inf, -np.inf):
            x = floats(1, 2, v).astype(dtype)
            x[0, v // 2] = bad
            if bad == -np.inf:
                x[0] = bad
            losses = _native.cross_entropy_gradient_(x, np.int64([3, 3]), 1.0)
            assert np.isnan(losses[0])
            assert np.isfinite(losses[1])
            assert np.isnan(x[0].astype(np.float32)).any()
            assert np.isfinite(x[1].astype(np.float32)).all()


def test_a_confident_row_keeps_the_digits_of_its_loss(isa: str) -> None:
    logits = np.zeros((3, 70), np.float32)
    logits[:, 7] = [5, 12, 22]
    want = np.log1p(69 * np.exp(-np.float64([5, 12, 22])))
    for dtype in FLOWS:
        x = logits.astype(dtype)
        assert_each_close(_native.cross_entropy(x, np.full(3, 7))[0], want, rel=1e-5)
        assert_each_close(_native.cross_entropy_gradient_(x, np.full(3, 7), 2.0), want, rel=1e-5)
        assert_each_close(x[:, 7], -2 * -np.expm1(-want), rel=1e-5, dtype=dtype)


def test_large_and_masked_logits(isa: str) -> None:
    logits = np.full((4, 2100), -np.inf, np.float32)
    logits[0, 2000] = 3e38
    logits[1, [5, 2000]] = 1.0
    logits[2] = -3e38
    logits[3, 2099] = -3.0
    losses, lse = _native.cross_entropy(logits, np.int64([2000, 5, 0, 0]))
    np.testing.assert_allclose(losses, [0, np.log(2), np.log(2100), np.inf], rtol=1e-6)
    d = _native.cross_entropy_backward(np.ones(4, np.float32), logits, np.int64([2000, 5, 0, 0]), lse)
    assert d[1, [5, 2000, 0]] == pytest.approx([-0.5, 0.5, 0], rel=1e-6)
    assert d[3, [0, 2099]] == pytest.approx([-1, 1])
    for bad in (np.nan, np.inf):
        x = floats(1, 2, 1500)
        x[0, 1400] = bad
        losses, lse = _native.cross_entropy(x, np.int64([3, 3]))
        assert np.isnan(losses[0])
        assert np.isfinite(losses[1])
        assert np.isnan(_native.cross_entropy_backward(np.ones(2, np.float32), x, np.int64([3, 3]), lse)[0]).any()


def test_another_ignore_index_and_no_rows(isa: str) -> None:
    logits, labels = floats(1, 4, 9), np.int64([0, 3, 0, 8])
    losses, lse = _native.cross_entropy(logits, labels, 0)
    assert_each_close(losses, reference(logits, labels, 0)[0], rel=1e-6)
    assert losses[[0, 2]].tolist() == [0, 0]
    assert not _native.cross_entropy_backward(np.ones(4, np.float32), logits, labels, lse, 0)[[0, 2]].any()
    empty = np.zeros((0, 9), np.float32)
    losses, lse = _native.cross_entropy(empty, np.zeros(0, np.int64))
    assert losses.shape == lse.shape == (0,)
    assert _native.cross_entropy_backward(losses, empty, np.zeros(0, np.int64), lse).shape == (0, 9)


def test_results_do_not_depend_on_threads(isa: str, same_on_any_threads) -> None:
    logits, g = floats(1, 301, 1111), floats(2, 301)
    labels = np.random.default_rng(3).integers(0, 1111, 301)
    lse = _native.cross_entropy(logits, labels)[1]
    same_on_any_threads(lambda: _native.cross_entropy(logits, labels))
    same_on_any_threads(lambda: _native.cross_entropy_backward(g, logits, labels, lse))

    def gradient(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = x.copy()
        return _native.cross_entropy_gradient_(x, labels, 0.5), x

    for rows, v in [(301, 1111), (1, 100_000), (2, 70_001), (5, 40_000)]:
        for dtype in FLOWS:
            x, at = floats(v, rows, v).astype(dtype), np.random.default_rng(v).integers(0, v, rows)
            same_on_any_threads(lambda x=x, at=at: gradient(x, at))
            same_on_any_threads(lambda x=x, at=at: _native.cross_entropy(x, at))


def test_logits_stay_as_they_are_when_memory_runs_out() -> None:
    kept, labels = floats(1, 1, 100_000), np.int64([5])
    failures = 0
    for nth in range(1, 4):
        logits = kept.copy()
        _native._fail_allocation(nth)
        try:
            _native.cross_entropy_gradient_(logits, labels, 1.0)
        except MemoryError:
            failures += 1
            np.testing.assert_array_equal(logits, kept)
        finally:
            _native._fail_allocation(0)
    assert failures >= 1


def test_a_label_out_of_range_is_named_with_its_row() -> None:
    logits, g = np.zeros((3, 10), np.float32), np.zeros(3, np.float32)
    for bad in (10, -1, 2**40):
        labels = np.int64([-100, 1, bad])
        with pytest.raises(DataError, match=rf"cross_entropy: label {bad} in row 2 is outside the vocabulary of 10"):
            _native.cross_entropy(logits, labels)
        with pytest.raises(DataError, match=rf"label {bad} in row 2"):
            _native.cross_entropy_backward(g, logits, labels, g)
        with pytest.raises(DataError, match=rf"cross_entropy_gradient_: label {bad} in row 2"):
            _native.cross_entropy_gradient_(logits, labels, 1.0)
    assert not logits.any()


def test_errors_name_both_shapes() -> None:
    logits = np.zeros((3, 10), np.float32)
    with pytest.raises(ShapeError, match=r"logits have shape \(3, 10\), labels \(2,\)"):
        _native.cross_entropy(logits, np.zeros(2, np.int64))
    with pytest.raises(ShapeError, match=r"g has shape \(2,\), labels \(3,\)"):
        _native.cross_entropy_backward(np.zeros(2, np.float32), logits, np.zeros(3, np.int64), np.zeros(3, np.float32))
    with pytest.raises(DTypeError, match="labels must be an array of int64, not int32"):
        _native.cross_entropy(logits, np.zeros(3, np.int32))
    with pytest.raises(ShapeError, match=r"cross_entropy_gradient_: logits is written in place and must be C-cont"):
        _native.cross_entropy_gradient_(np.zeros((10, 3), np.float32).T, np.zeros(3, np.int64), 1.0)
    with pytest.raises(DTypeError, match="logits must be float32 or bfloat16, not float16"):
        _native.cross_entropy_gradient_(logits.astype(np.float16), np.zeros(3, np.int64), 1.0)
