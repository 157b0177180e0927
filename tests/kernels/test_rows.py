"""Softmax, RMSNorm and LayerNorm against float64."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.checks import BF16, FLOWS, TAILS, assert_close, assert_each_close, floats, wide
from kernels.guard import guarded

from entrenar import _native
from entrenar.errors import DTypeError, ShapeError, UsageError

SIZES = [*TAILS, 1000, 4099]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.tier1
def test_softmax(isa: str) -> None:
    for d in SIZES:
        x, g = floats(d, 3, d, scale=10), floats(d + 1, 3, d)
        y, want = _native.softmax(x), softmax(wide(x))
        assert_each_close(y, want, rel=5e-6)
        np.testing.assert_allclose(wide(y).sum(-1), 1, rtol=1e-6)
        dx = want * (g - (g * want).sum(-1, keepdims=True))
        assert_close(_native.softmax_backward(want.astype(np.float32), g), dx, scale=np.abs(want * g).max())


def test_softmax_of_special_rows(isa: str) -> None:
    inf, nan = np.inf, np.nan
    for tail in (0, 1, 40):
        rest = [-inf] * tail
        assert _native.softmax(np.float32([0, -inf, 0, *rest])).tolist() == [0.5, 0, 0.5, *[0] * tail]
        assert np.isnan(_native.softmax(np.float32([0, nan, 1, *rest]))).all()
        assert np.isnan(_native.softmax(np.float32([-inf, -inf, *rest]))).all()
        assert np.isnan(_native.softmax(np.float32([0, inf, *rest]))).any()
    assert _native.softmax(np.float32([3e38, -3e38])).tolist() == [1, 0]
    assert _native.softmax(np.zeros((3, 0), np.float32)).shape == (3, 0)
    assert _native.softmax(np.zeros((0, 3), np.float32)).shape == (0, 3)


def rms_norm(x, w, eps):
    rstd = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * rstd * w, rstd


@pytest.mark.tier1
@pytest.mark.parametrize("dtype", FLOWS)
def test_rms_norm(isa: str, dtype: type) -> None:
    for d in SIZES:
        x, w, g = floats(d, 2, 3, d).astype(dtype), floats(d + 1, d), floats(d + 2, 2, 3, d).astype(dtype)
        want, rstd = rms_norm(wide(x), wide(w), 1e-5)
        y, r = _native.rms_norm(guarded(x), guarded(w), 1e-5)
        assert_each_close(y, want, rel=1e-6, dtype=dtype)
        assert_each_close(r, rstd.reshape(-1), rel=1e-6)
        dx, dw = _native.rms_norm_backward(guarded(g), guarded(x), guarded(w), r)
        gw = wide(g) * w
        want = rstd * gw - x * rstd**3 * (gw * x).mean(-1, keepdims=True)
        assert_close(dx, want, scale=np.abs(rstd * gw).max(), dtype=dtype)
        assert_close(dw, (wide(g) * x * rstd).sum((0, 1)))
        normed = guarded(np.zeros_like(x))
        again, nothing = _native.rms_norm_backward(g, x, w, r, need_dw=False, normed=normed)
        assert nothing is None
        np.testing.assert_array_equal(again, dx)
        np.testing.assert_array_equal(normed, y)


def test_rms_norm_of_long_rows_keeps_its_digits(isa: str) -> None:
    """The bound of the sums of squares holds to rows of 16k, for alike and for very unlike values."""
    for d in (16384, 16447):
        for x in (floats(1, 2, d), floats(2, 2, d) ** 9, np.full((2, d), 0.1, np.float32)):
            want, rstd = rms_norm(wide(x), 1, 1e-6)
            y, r = _native.rms_norm(x, np.ones(d, np.float32), 1e-6)
            assert_each_close(r, rstd.reshape(-1), rel=2e-7)
            assert_each_close(y, want, rel=3e-7, floor=1e-40)
            half = x.astype(BF16)
            assert_each_close(_native.rms_norm(half, np.ones(d, np.float32), 1e-6)[1],
                              rms_norm(wide(half), 1, 1e-6)[1].reshape(-1), rel=2e-7)  # fmt: skip


def test_rms_norm_at_extremes(isa: str) -> None:
    w = np.ones(65, np.float32)
    for scale in (1e30, 1e-30):
        x = floats(1, 4, 65) * np.float32(scale)
        y, r = _native.rms_norm(x, w, 0.0)
        assert_each_close(y, rms_norm(wide(x), 1, 0)[0], rel=1e-6)
        assert np.isfinite(_native.rms_norm_backward(floats(2, 4, 65), x, w, r)[0]).all()
    assert (_native.rms_norm(np.zeros((2, 65), np.float32), w, 1e-5)[0] == 0).all()
    x = np.ones((2, 65), np.float32)
    x[0, 64] = np.nan
    y, _ = _native.rms_norm(x, w, 1e-5)
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


def layer_norm(x, eps):
    rstd = 1 / np.sqrt(x.var(-1, keepdims=True) + eps)
    return (x - x.mean(-1, keepdims=True)) * rstd, rstd


@pytest.mark.tier1
def test_layer_norm(isa: str) -> None:
    for d in SIZES:
        x, w, b, g = floats(d, 2, 3, d) + 1, floats(d + 1, d), floats(d + 2, d), floats(d + 3, 2, 3, d)
        normal, rstd = layer_norm(wide(x), 1e-5)
        y, mean, r = _native.layer_norm(x, w, b, 1e-5)
        assert_close(y, normal * w + b)
        assert_each_close(mean, wide(x).mean(-1).reshape(-1), rel=1e-6)
        assert_each_close(r, rstd.reshape(-1), rel=1e-6)
        dx, dw, db = _native.layer_norm_backward(g, x, w, mean, r)
        gw = wide(g) * w
        want = rstd * (gw - gw.mean(-1, keepdims=True) - normal * (gw * normal).mean(-1, keepdims=True))
        assert_close(dx, want, scale=np.abs(rstd * gw).max())
        assert_close(dw, (g * normal).sum((0, 1)), rel=5e-6)
        assert_close(db, wide(g).sum((0, 1)))


def test_layer_norm_of_a_small_deviation_around_a_large_mean(isa: str) -> None:
    x = floats(1, 3, 77) + 5000
    y, _, _ = _native.layer_norm(x, np.ones(77, np.float32), np.zeros(77, np.float32), 1e-5)
    assert_close(y, layer_norm(wide(x), 1e-5)[0])


def test_strided_rows_are_taken_as_they_read(isa: str) -> None:
    x = floats(1, 37, 5).T
    np.testing.assert_array_equal(_native.softmax(x), _native.softmax(x.copy()))
    w = floats(2, 74)[::2]
    np.testing.assert_array_equal(_native.rms_norm(x, w, 1e-5)[0], _native.rms_norm(x.copy(), w.copy(), 1e-5)[0])


@pytest.mark.parametrize("dtype", FLOWS)
def test_rms_norm_does_not_depend_on_threads(isa: str, dtype: type, same_on_any_threads) -> None:
    x, g, w = floats(1, 257, 515).astype(dtype), floats(2, 257, 515).astype(dtype), floats(3, 515)
    _, rstd = _native.rms_norm(x, w, 1e-5)
    same_on_any_threads(lambda: _native.rms_norm(x, w, 1e-5))
    same_on_any_threads(lambda: _native.rms_norm_backward(g, x, w, rstd))


def test_results_do_not_depend_on_threads(isa: str, same_on_any_threads) -> None:
    x, g, w = floats(1, 257, 515), floats(2, 257, 515), floats(3, 515)
    same_on_any_threads(lambda: _native.softmax(x))
    same_on_any_threads(lambda: _native.softmax_backward(x, g))
    _, mean, rstd = _native.layer_norm(x, w, w, 1e-5)
    same_on_any_threads(lambda: _native.layer_norm(x, w, w, 1e-5))
    same_on_any_threads(lambda: _native.layer_norm_backward(g, x, w, mean, rstd))


def test_no_rows_and_no_columns(isa: str) -> None:
    for shape in [(0, 5), (3, 0)]:
        x, w = np.zeros(shape, np.float32), np.ones(shape[1], np.float32)
        y, rstd = _native.rms_norm(x, w, 1e-5)
        assert y.shape == shape
        assert _native.rms_norm_backward(x, x, w, rstd)[1].tolist() == [0] * shape[1]
        y, mean, rstd = _native.layer_norm(x, w, w, 1e-5)
        assert _native.layer_norm_backward(x, x, w, mean, rstd)[2].tolist() == [0] * shape[1]


def test_errors_name_the_operation_and_both_shapes() -> None:
    x, w = np.zeros((2, 3), np.float32), np.ones(3, np.float32)
    rows = np.ones(2, np.float32)
    with pytest.raises(ShapeError, match=r"rms_norm: w has shape \(4,\), x \(2, 3\)"):
        _native.rms_norm(x, np.ones(4, np.float32), 1e-5)
    with pytest.raises(ShapeError, match=r"rms_norm_backward: g has shape \(3, 2\), x \(2, 3\)"):
        _native.rms_norm_backward(x.T, x, w, rows)
    with pytest.raises(ShapeError, match=r"rms_norm_backward: rstd has shape \(3,\), x \(2, 3\)"):
        _native.rms_norm_backward(x, x, w, w)
    for normed, error in ((np.zeros((3, 2), np.float32), ShapeError), (np.zeros((2, 3), BF16), DTypeError),
                          (np.zeros((2, 6), np.float32)[:, ::2], ShapeError), (x, UsageError)):  # fmt: skip
        with pytest.raises(error, match="rms_norm_backward: normed"):
            _native.rms_norm_backward(x.copy(), x, w, rows, normed=normed)
    with pytest.raises(DTypeError, match="rms_norm_backward: g is bfloat16, x float32; they must be the same"):
        _native.rms_norm_backward(x.astype(BF16), x, w, rows)
    with pytest.raises(DTypeError, match="rms_norm: w must be float32, not bfloat16"):
        _native.rms_norm(x, w.astype(BF16), 1e-5)
    with pytest.raises(DTypeError, match="rms_norm: x must be float32 or bfloat16, not float16"):
        _native.rms_norm(x.astype(np.float16), w, 1e-5)
    with pytest.raises(ShapeError, match=r"layer_norm: b has shape \(2,\)"):
        _native.layer_norm(x, w, rows, 1e-5)
    with pytest.raises(ShapeError, match=r"layer_norm_backward: mean has shape \(3,\)"):
        _native.layer_norm_backward(x, x, w, w, rows)
    with pytest.raises(ShapeError, match=r"softmax_backward: y has shape \(2, 3\), g \(3,\)"):
        _native.softmax_backward(x, w)
    with pytest.raises(ShapeError, match="softmax: x must have at least one dimension"):
        _native.softmax(np.zeros((), np.float32))
    with pytest.raises(DTypeError, match="softmax: x must be float32, not float64"):
        _native.softmax(np.zeros(3))
    with pytest.raises(DTypeError, match="softmax: x must be float32, not >f4"):
        _native.softmax(np.zeros(3, ">f4"))
    with pytest.raises(DTypeError, match="softmax: x must be a NumPy array, not list"):
        _native.softmax([1.0])
