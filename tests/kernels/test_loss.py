"""Cross-entropy and its gradient."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.checks import TAILS, assert_close, assert_each_close, floats, wide

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
def test_cross_entropy(isa: str) -> None:
    for v in SIZES:
        logits, g = floats(v, 5, v, scale=4), floats(v + 1, 5)
        labels = np.random.default_rng(v).integers(0, v, 5)
        labels[2] = -100
        want, lse, slope = reference(logits, labels)
        losses, z = _native.cross_entropy(logits, labels)
        assert_each_close(losses, want, rel=1e-6, floor=1e-7)
        assert_each_close(z, lse, rel=1e-6, floor=1e-6)
        dlogits = _native.cross_entropy_backward(g, logits, labels, z)
        assert_close(dlogits, g[:, None] * slope, rel=2e-6, scale=np.abs(g).max())
        assert not dlogits[2].any()


def test_a_confident_row_keeps_the_digits_of_its_loss(isa: str) -> None:
    logits = np.zeros((3, 70), np.float32)
    logits[:, 7] = [5, 12, 22]
    losses, _ = _native.cross_entropy(logits, np.full(3, 7))
    assert_each_close(losses, np.log1p(69 * np.exp(-np.float64([5, 12, 22]))), rel=1e-5)


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


def test_a_label_out_of_range_is_named_with_its_row() -> None:
    logits, g = np.zeros((3, 10), np.float32), np.zeros(3, np.float32)
    for bad in (10, -1, 2**40):
        labels = np.int64([-100, 1, bad])
        with pytest.raises(DataError, match=rf"cross_entropy: label {bad} in row 2 is outside the vocabulary of 10"):
            _native.cross_entropy(logits, labels)
        with pytest.raises(DataError, match=rf"label {bad} in row 2"):
            _native.cross_entropy_backward(g, logits, labels, g)


def test_errors_name_both_shapes() -> None:
    logits = np.zeros((3, 10), np.float32)
    with pytest.raises(ShapeError, match=r"logits have shape \(3, 10\), labels \(2,\)"):
        _native.cross_entropy(logits, np.zeros(2, np.int64))
    with pytest.raises(ShapeError, match=r"g has shape \(2,\), labels \(3,\)"):
        _native.cross_entropy_backward(np.zeros(2, np.float32), logits, np.zeros(3, np.int64), np.zeros(3, np.float32))
    with pytest.raises(DTypeError, match="labels must be an array of int64, not int32"):
        _native.cross_entropy(logits, np.zeros(3, np.int32))
