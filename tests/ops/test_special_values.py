"""The operations against NumPy on any shapes, strides and values: NaN, infinities, denormals and zeros
included."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from entrenar import ops
from entrenar.tensor import Tensor

pytestmark = pytest.mark.tier2
quick = settings(max_examples=60, deadline=None)

SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -1.0, 1e-45, -1e-40, 1.1754944e-38, 3.4028235e38, -3.4028235e38]
values = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))
finite = st.floats(-50, 50, width=32)


def arrays(shape: st.SearchStrategy[tuple[int, ...]] | tuple[int, ...], elements: st.SearchStrategy[float] = values):
    return hnp.arrays(np.float32, shape, elements=elements, fill=elements)


shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=19)
small = hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=7)


@st.composite
def strided(draw: st.DrawFn, elements: st.SearchStrategy[float] = values) -> np.ndarray:
    """An array seen through a transpose and steps, some of them negative."""
    x = draw(arrays(shapes, elements)).T
    steps = draw(st.tuples(*[st.sampled_from([1, 2, 3, -1, -2])] * x.ndim))
    return x[tuple(slice(None, None, s) for s in steps)]


@st.composite
def broadcasting(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    both = draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, min_side=0, max_side=9))
    a, b = (draw(arrays(shape)) for shape in both.input_shapes)
    return a, b


def numpy(fn: Callable[..., np.ndarray], *xs: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(fn(*xs))


def assert_close(actual: Tensor, expected: np.ndarray, ulps: int) -> None:
    """NaN and infinities in the same places, the rest within a few float32 steps; denormals may round to
    zero."""
    with np.errstate(all="ignore"):
        expected = expected.astype(np.float32)
    a, tiny = actual.numpy(), np.finfo(np.float32).tiny
    assert a.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(a), np.isnan(expected))
    fine = ~np.isnan(expected)
    with np.errstate(all="ignore"):
        near = np.abs(a - expected) <= ulps * np.spacing(np.abs(expected)) + tiny
    assert (near | (a == expected))[fine].all()


# ---- elementwise


@pytest.mark.parametrize(
    ("name", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide)]
)
@quick
@given(operands=broadcasting())
def test_exact_arithmetic_is_numpys_to_the_bit(
    name: str, function: Callable[..., np.ndarray], operands: tuple[np.ndarray, np.ndarray]
) -> None:
    actual = getattr(ops, name)(*map(Tensor, operands)).numpy()
    np.testing.assert_array_equal(actual, numpy(function, *operands))


@quick
@given(broadcasting())
def test_pow_is_the_nearest_of_float64(operands: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = (x.astype(np.float64) for x in operands)
    # Where all exponents are one value, 0.5, NumPy takes the square root, whose -inf is NaN; pow(-inf, 0.5) is inf.
    expected = np.where(np.isneginf(x) & (y == 0.5), np.inf, numpy(np.power, x, y))
    assert_close(ops.pow(*map(Tensor, operands)), expected, 64)


def _silu(x: np.ndarray) -> np.ndarray:
    return np.where(x == -np.inf, 0, x / (1 + np.exp(-x)))


@pytest.mark.parametrize(
    ("name", "function", "ulps"),
    [
        ("neg", np.negative, 0),
        ("exp", np.exp, 4),
        ("log", np.log, 4),
        ("relu", lambda x: np.where(x > 0, x, np.where(np.isnan(x), x, 0)), 0),
    ],
)
@quick
@given(x=strided())
def test_functions_of_one_value(name: str, function: Callable[..., np.ndarray], ulps: int, x: np.ndarray) -> None:
    assert_close(getattr(ops, name)(Tensor(x)), numpy(function, x.astype(np.float64)), ulps)


@quick
@given(strided(finite))
def test_silu_and_swiglu(x: np.ndarray) -> None:
    expected = numpy(_silu, x.astype(np.float64))
    np.testing.assert_allclose(ops.silu(Tensor(x)).numpy(), expected, rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(ops.swiglu(Tensor(x), Tensor(x)).numpy(), expected * x, rtol=2e-6, atol=1e-30)


# ---- reductions


@quick
@given(strided(), st.data())
def test_sum_and_mean_over_any_axes(x: np.ndarray, data: st.DataObject) -> None:
    axes = data.draw(st.none() | st.sets(st.integers(0, max(0, x.ndim - 1)), max_size=x.ndim).map(tuple))
    if x.ndim == 0:
        axes = None
    keepdims = data.draw(st.booleans())
    wide = x.astype(np.float64)
    expected = numpy(lambda w: w.sum(axes, keepdims=keepdims), wide)
    scale = numpy(lambda w: np.abs(w).sum(axes, keepdims=keepdims), wide)
    actual = ops.sum(Tensor(x), axes, keepdims).numpy()
    assert actual.shape == expected.shape
    clear = np.isfinite(scale) & (scale < 1e38)  # no partial sum overflows
    bound = 1e-6 * scale[clear] + 1e-37
    assert (np.abs(actual[clear] - expected[clear]) <= bound).all()
    assert np.isnan(actual[np.isnan(expected)]).all()
    if x.size:
        mean = ops.mean(Tensor(x), axes, keepdims).numpy()[clear]
        count = x.size // expected.size
        assert (np.abs(mean - expected[clear] / count) <= 2 * bound).all()


def test_the_mean_of_nothing_is_nan() -> None:
    assert np.isnan(Tensor(np.zeros((0, 3))).mean().item())
    assert Tensor(np.zeros((0, 3))).sum(0).numpy().tolist() == [0, 0, 0]


@quick
@given(strided(finite), st.data())
def test_softmax_rows_sum_to_one(x: np.ndarray, data: st.DataObject) -> None:
    if x.ndim == 0:
        x = x.reshape(1)
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    y = ops.softmax(Tensor(x), axis=axis).numpy()
    assert y.shape == x.shape
    assert (y >= 0).all()
    if x.shape[axis]:
        np.testing.assert_allclose(y.sum(axis, dtype=np.float64), 1, atol=1e-5)


def test_softmax_of_large_and_hidden_values() -> None:
    y = ops.softmax(Tensor([[1e38, 1e38, -1e38], [-np.inf, 0.0, -np.inf], [np.nan, 0.0, 1.0]])).numpy()
    np.testing.assert_allclose(y[:2], [[0.5, 0.5, 0], [0, 1, 0]])
    assert np.isnan(y[2]).all()


# ---- moving values


@quick
@given(strided(), st.data())
def test_slice_transpose_reshape_concat_move_bits(x: np.ndarray, data: st.DataObject) -> None:
    t = Tensor(x)
    key = data.draw(hnp.basic_indices(x.shape, allow_newaxis=True))
    np.testing.assert_array_equal(t[key].numpy(), x[key])
    order = tuple(data.draw(st.permutations(range(x.ndim))))
    np.testing.assert_array_equal(ops.transpose(t, order).numpy(), x.transpose(order) if order else x)
    np.testing.assert_array_equal(t.reshape(-1 if x.size else 0).numpy(), x.reshape(-1))
    if x.ndim:
        axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
        np.testing.assert_array_equal(ops.concat([t, t], axis).numpy(), np.concatenate([x, x], axis))


@quick
@given(strided(finite), st.data())
def test_the_gradient_of_a_slice_lands_where_it_was_taken(x: np.ndarray, data: st.DataObject) -> None:
    t = Tensor(x, requires_grad=True)
    key = data.draw(hnp.basic_indices(x.shape, allow_newaxis=True))
    y = t[key]
    g = np.arange(1, y.size + 1, dtype=np.float32).reshape(y.shape)
    y.backward(g)
    expected = np.zeros(x.shape, np.float32)
    expected[key] = g
    np.testing.assert_array_equal(t.grad.numpy(), expected)


@quick
@given(hnp.mutually_broadcastable_shapes(num_shapes=3, max_dims=4, min_side=0, max_side=5))
def test_broadcasting_gradients_are_sums(both: hnp.BroadcastableShapes) -> None:
    a, b, c = (Tensor(np.ones(s), requires_grad=True) for s in both.input_shapes)
    y = (a + b) - c
    y.backward(np.ones(y.shape))
    for x, sign in ((a, 1), (b, 1), (c, -1)):
        assert x.grad.shape == x.shape
        repeats = y.size / x.size if x.size else 0
        np.testing.assert_array_equal(x.grad.numpy(), np.full(x.shape, sign * repeats))


# ---- products


@quick
@given(st.data(), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40), st.booleans(), st.booleans())
def test_matmul_of_any_size_and_order(data: st.DataObject, m: int, k: int, n: int, ta: bool, tb: bool) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    a = rng.normal(size=(k, m) if ta else (m, k)).astype(np.float32)
    b = rng.normal(size=(n, k) if tb else (k, n)).astype(np.float32)
    a, b = a.T if ta else a, b.T if tb else b
    expected = a.astype(np.float64) @ b.astype(np.float64)
    actual = (Tensor(a) @ Tensor(b)).numpy()
    bound = 1e-6 * (np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64))
    assert actual.shape == expected.shape
    assert (np.abs(actual - expected) <= bound).all()


@quick
@given(arrays((3, 5)), arrays((5, 2)))
def test_matmul_lets_nan_and_infinity_through(a: np.ndarray, b: np.ndarray) -> None:
    products = numpy(lambda: a.astype(np.float64)[:, :, None] * b.astype(np.float64)[None])
    expected = numpy(lambda: products.sum(1))
    actual = (Tensor(a) @ Tensor(b)).numpy()
    assert np.isnan(actual[np.isnan(expected)]).all()
    clear = np.abs(products).sum(1) < 1e38
    assert np.isfinite(actual[clear]).all()


@quick
@given(small, st.integers(1, 40), st.integers(0, 2**32))
def test_norms_of_any_size(leading: tuple[int, ...], d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(*leading, d)) * 10.0 ** rng.integers(-3, 4)).astype(np.float32)
    w, b = rng.normal(size=(2, d)).astype(np.float32)
    y = ops.rms_norm(Tensor(x), Tensor(w), 1e-6).numpy()
    wide = x.astype(np.float64)
    expected = w * wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    z = ops.layer_norm(Tensor(x), Tensor(w), Tensor(b)).numpy()
    centred = wide - wide.mean(-1, keepdims=True)
    expected = w * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + b
    np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-4)


def test_norms_let_nan_through() -> None:
    x = Tensor([[1.0, np.nan, 2.0], [1.0, 2.0, 3.0]])
    w = Tensor(np.ones(3))
    for y in (ops.rms_norm(x, w), ops.layer_norm(x, w, w)):
        assert np.isnan(y.numpy()[0]).all()
        assert np.isfinite(y.numpy()[1]).all()
    assert ops.rms_norm(Tensor(np.zeros((2, 3))), w).numpy().tolist() == [[0, 0, 0], [0, 0, 0]]
