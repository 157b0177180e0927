"""Copy, unary and binary kernels against float64, NumPy's broadcasting and any strides."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.checks import BF16, FLOWS, TAILS, assert_close, assert_each_close, floats, wide
from kernels.guard import guarded
from numpy.lib.stride_tricks import as_strided

from entrenar import _native
from entrenar.errors import DTypeError, ShapeError, UsageError

LEVELS = _native.available_isas()
SPECIAL = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, 1, -1])

erfc = np.vectorize(math.erfc, otypes=[np.float64])


def sigmoid(x):
    return np.where(x < 0, np.exp(-np.abs(x)), 1) / (1 + np.exp(-np.abs(x)))


def tanh_argument(x):
    return 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)


def phi(x):
    return np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


UNARY = {
    "neg": np.negative,
    "exp": np.exp,
    "log": np.log,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: x * sigmoid(tanh_argument(x)),
    "silu": lambda x: x * sigmoid(x),
}
SLOPE = {
    "neg": lambda x: -np.ones_like(x),
    "exp": np.exp,
    "log": lambda x: 1 / x,
    "relu": lambda x: np.where(x > 0, 1.0, 0.0),
    "gelu": lambda x: 0.5 * erfc(-x / math.sqrt(2)) + x * phi(x),
    "gelu_tanh": lambda x: (
        sigmoid(tanh_argument(x))
        + x * sigmoid(tanh_argument(x)) * sigmoid(-tanh_argument(x)) * 2 * np.sqrt(2 / np.pi) * (1 + 0.134145 * x * x)
    ),
    "silu": lambda x: sigmoid(x) * (1 + x * sigmoid(-x)),
}
# Where each function has finite results, its extremes included.
RANGE = {"exp": (-104, 88.7), "gelu": (-14.2, 30), "gelu_tanh": (-10.5, 30), "silu": (-105, 105)}


def points(name: str, n: int = 20000) -> np.ndarray:
    low, high = RANGE.get(name, (-1e30, 1e30))
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.uniform(low, high, n), rng.standard_normal(n), rng.standard_normal(n) * 1e-6])
    return np.abs(x).astype(np.float32) if name == "log" else x.astype(np.float32)


@pytest.mark.tier1
@pytest.mark.parametrize("name", UNARY)
def test_unary_is_right_everywhere_even_where_the_result_is_denormal(isa: str, name: str) -> None:
    x = points(name)
    assert_each_close(_native.unary(name, x), UNARY[name](wide(x)), rel=1e-6, floor=1e-43)


@pytest.mark.parametrize(("name", "bound"), [("exp", 1.0), ("log", 1.0)])
def test_exp_and_log_are_within_an_ulp(isa: str, name: str, bound: float) -> None:
    bits = np.random.default_rng(2).integers(0, 2**32, 200000, dtype=np.uint32)
    x = np.concatenate([bits.view(np.float32), points(name), np.linspace(0.5, 2, 50001, dtype=np.float32)])
    x = x[np.isfinite(x) & (x > 0)] if name == "log" else x[(x > -104) & (x < 88.7)]
    want = UNARY[name](wide(x))
    ulps = np.abs(wide(_native.unary(name, x)) - want) / np.spacing(np.abs(want).astype(np.float32))
    assert ulps.max() <= bound


@pytest.mark.parametrize("name", UNARY)
def test_unary_backward_is_g_times_the_slope(isa: str, name: str) -> None:
    x = points(name, 3000)
    if name != "log":
        x = np.clip(x, *RANGE.get(name, (-50, 50)))
    g = floats(3, x.size)
    got, want = _native.unary_backward(name, x, g), wide(g) * SLOPE[name](wide(x))
    if name not in ("gelu", "gelu_tanh", "silu"):
        assert_each_close(got, want, rel=1e-6, floor=1e-44)
        return
    assert_each_close(got, want, rel=1e-6, floor=1e-6)
    far = x < -4  # no root there: the small slopes keep their digits, down to denormal exponentials
    assert_each_close(got[far], want[far], rel=1e-5, floor=1e-42)


def test_special_values(isa: str) -> None:
    def results(name: str) -> list[float]:
        return _native.unary(name, SPECIAL).tolist()

    def same(got: list[float], want: list[float]) -> None:
        np.testing.assert_array_equal(np.signbit(got)[3:], np.signbit(want)[3:])
        np.testing.assert_array_equal(np.float32(got), np.float32(want))

    tiny = float(np.float32(1e-42))
    same(results("neg"), (-SPECIAL).tolist())
    same(results("exp"), [np.nan, np.inf, 0, 1, 1, 1, 1, np.inf, 0, math.exp(1), math.exp(-1)])
    same(results("relu"), [np.nan, np.inf, 0, 0, -0.0, tiny, 0, 3e38, 0, 1, 0])
    log = results("log")
    assert math.isnan(log[0])
    assert log[1:6] == [np.inf, pytest.approx(np.nan, nan_ok=True), -np.inf, -np.inf, pytest.approx(math.log(tiny))]
    for name in ("gelu", "gelu_tanh", "silu"):
        y = results(name)
        assert math.isnan(y[0])
        assert y[1] == np.inf
        assert (y[3], y[4], y[7], y[8]) == (0, 0, pytest.approx(3e38), 0)
        assert y[5] == pytest.approx(tiny / 2, abs=1.5e-45)
    for name in UNARY:
        assert np.isnan(_native.unary_backward(name, np.float32([1.0]), np.float32([np.nan]))).all()
        if name not in ("neg", "relu"):
            assert np.isnan(_native.unary_backward(name, np.float32([np.nan]), np.float32([1.0]))).all()


BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "pow": np.power}


@pytest.mark.tier1
@pytest.mark.parametrize("name", BINARY)
def test_binary_meets_every_tail(isa: str, name: str) -> None:
    for n in TAILS:
        a, b = floats(n, n), floats(n + 1, n)
        if name == "pow":
            a = np.abs(a)
        assert_each_close(_native.binary(name, a, b), BINARY[name](wide(a), wide(b)), rel=2e-7)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_binary_has_ieee_results_for_all_pairs_of_special_values(isa: str, name: str) -> None:
    a, b = np.meshgrid(SPECIAL, SPECIAL)
    with np.errstate(all="ignore"):
        want = BINARY[name](a, b)
    got = _native.binary(name, a, b)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[~np.isnan(want)]), np.signbit(want[~np.isnan(want)]))


def test_pow_at_its_corners(isa: str) -> None:
    cases = [
        (0, 0),
        (-2, 3),
        (-2, 0.5),
        (0, -1),
        (np.inf, -1),
        (np.nan, 0),
        (1, np.nan),
        (2, -140),
        (9, 0.5),
        (-0.0, 3),
    ]
    a, b = np.float32(cases).T
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(_native.binary("pow", a, b), np.power(wide(a), wide(b)).astype(np.float32))


shapes = st.lists(st.integers(0, 5), min_size=0, max_size=5).map(tuple)


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """An array of that shape: contiguous, transposed, reversed, stepped over or repeated."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 2, -1])) for _ in shape]
    base = floats(seed, *(shape[i] * abs(steps[i]) for i in order)).transpose(np.argsort(order))
    x = base[tuple(slice(None, None, step) for step in steps)]
    repeated = [draw(st.integers(0, 5)) == 0 and n > 0 for n in shape]
    x = x[tuple(slice(0, 1) if r else slice(None) for r in repeated)]
    return np.broadcast_to(x, shape)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), shape=shapes, level=st.sampled_from(LEVELS), name=st.sampled_from(["add", "sub", "mul"]))
def test_any_strides_and_broadcasts_are_numpys(
    data: st.DataObject, shape: tuple[int, ...], level: str, name: str
) -> None:
    before = _native.isa()
    _native._set_isa(level)
    try:
        drop = data.draw(st.integers(0, len(shape)))
        ones = [1 if data.draw(st.booleans()) else n for n in shape[drop:]]
        a, b = data.draw(views(shape, 1)), data.draw(views(tuple(ones), 2))
        if data.draw(st.booleans()):
            a, b = b, a
        np.testing.assert_array_equal(_native.binary(name, a, b), BINARY[name](a, b))
        np.testing.assert_array_equal(_native.copy(a), a)
        np.testing.assert_array_equal(_native.unary("relu", b), np.maximum(b, 0))
    finally:
        _native._set_isa(before)


def test_two_views_of_one_array_with_different_strides(isa: str) -> None:
    x = floats(1, 40, 40)
    np.testing.assert_array_equal(_native.binary("sub", x, x.T), x - x.T)
    np.testing.assert_array_equal(_native.binary("sub", x, x[0]), x - x[0])
    windows = as_strided(x, (30, 10), (4, 4))
    np.testing.assert_array_equal(_native.binary("add", windows, windows[0]), windows + windows[0])


def test_long_rows_cross_the_tile(isa: str) -> None:
    x, column = floats(1, 7, 4999), floats(2, 7, 1)
    np.testing.assert_array_equal(_native.binary("mul", x, column), x * column)
    np.testing.assert_array_equal(_native.copy(x.T), x.T)
    np.testing.assert_array_equal(_native.binary("add", x[:, ::3], floats(3, 1667)), x[:, ::3] + floats(3, 1667))


def test_a_number_is_an_array_of_no_dimensions(isa: str) -> None:
    x = floats(1, 3, 4)
    np.testing.assert_array_equal(_native.binary("sub", x, 1), x - 1)
    np.testing.assert_array_equal(_native.binary("div", np.float32(2), x), np.float32(2) / x)
    assert _native.binary("mul", np.float32([3])[0], np.array(2, np.float32)) == 6


def test_in_place(isa: str) -> None:
    for n in (0, 1, 63, 5000):
        x, y = floats(1, n), floats(2, n)
        want = x + y
        assert _native.add_(x, y) is x
        np.testing.assert_array_equal(x, want)
        _native.scale_(x, 0.3)
        np.testing.assert_array_equal(x, want * np.float32(0.3))
    x = floats(1, 2001)
    want = x * 2
    _native.add_(x, x)
    np.testing.assert_array_equal(x, want)
    want = x[:-1] + x[1:]
    _native.add_(x[:-1], x[1:])
    np.testing.assert_array_equal(x[:-1], want)


def test_results_do_not_depend_on_threads(isa: str, same_on_any_threads) -> None:
    x, y = floats(1, 401, 997), floats(2, 997)
    for name in UNARY:
        same_on_any_threads(lambda name=name: _native.unary(name, x))
        same_on_any_threads(lambda name=name: _native.unary_backward(name, x, x))
    for name in BINARY:
        same_on_any_threads(lambda name=name: _native.binary(name, x, y))
    same_on_any_threads(lambda: _native.copy(x.T))


def test_errors_name_the_operation_and_both_shapes() -> None:
    a, b = np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32)
    with pytest.raises(ShapeError, match=r"add: shapes \(2, 3\) and \(4, 3\)"):
        _native.binary("add", a, b)
    with pytest.raises(ShapeError, match=r"add_: x has shape \(2, 3\), y \(4, 3\)"):
        _native.add_(a, b)
    with pytest.raises(ShapeError, match=r"silu: x has shape \(2, 3\), g \(4, 3\)"):
        _native.unary_backward("silu", a, b)
    with pytest.raises(UsageError, match=r"'tanhh'.*gelu_tanh"):
        _native.unary("tanhh", a)
    with pytest.raises(UsageError, match=r"'mod'.*pow"):
        _native.binary("mod", a, a)
    with pytest.raises(ShapeError, match="9 dimensions are too many"):
        _native.copy(np.zeros((1,) * 9, np.float32))


@pytest.mark.tier1
def test_bf16_is_computed_in_f32_and_rounded_once(isa: str) -> None:
    for n in [*TAILS, 1023, 1025, 5000]:
        a, b = (floats(n + k, n).astype(BF16) for k in range(2))
        for name in ("add", "sub", "mul", "div"):
            want = BINARY[name](a.astype(np.float32), b.astype(np.float32)).astype(BF16)
            np.testing.assert_array_equal(_native.binary(name, guarded(a), guarded(b)), want)
        for name in UNARY:
            x = np.abs(a) if name == "log" else a
            want = _native.unary(name, x.astype(np.float32)).astype(BF16)
            np.testing.assert_array_equal(_native.unary(name, guarded(x)), want)
            slope = _native.unary_backward(name, x.astype(np.float32), b.astype(np.float32)).astype(BF16)
            np.testing.assert_array_equal(_native.unary_backward(name, guarded(x), guarded(b)), slope)
        x = guarded(a)
        assert _native.add_(x, guarded(b)) is x
        np.testing.assert_array_equal(x, a + b)
        assert _native.scale_(x, 0.3) is x
        np.testing.assert_array_equal(x, (wide(a + b) * np.float32(0.3)).astype(np.float32).astype(BF16))
    assert (_native.binary("mul", a, 2) == a * 2).all()
    assert _native.binary("mul", 2.0, a).dtype == BF16


def test_bf16_of_any_strides(isa: str, same_on_any_threads) -> None:
    x, y = floats(1, 401, 301).astype(BF16), floats(2, 301).astype(BF16)
    for view in (x.T, x[::2, ::-1], x[:, 3:10], np.broadcast_to(x[:, :1], (401, 7))):
        np.testing.assert_array_equal(_native.copy(view), view)
        np.testing.assert_array_equal(_native.binary("add", view, view[0]), view + view[0])
        np.testing.assert_array_equal(_native.unary("relu", view), np.maximum(view, 0))
    same_on_any_threads(lambda: _native.binary("add", x, y))
    same_on_any_threads(lambda: _native.copy(x.T))


def test_special_values_of_bf16(isa: str) -> None:
    special = SPECIAL.astype(BF16)
    a, b = np.meshgrid(special, special)
    for name in ("add", "sub", "mul", "div"):
        with np.errstate(all="ignore"):
            want = BINARY[name](a.astype(np.float32), b.astype(np.float32)).astype(BF16)
        np.testing.assert_array_equal(wide(_native.binary(name, a, b)), wide(want))
    np.testing.assert_array_equal(_native.copy(special).view(np.uint16), special.view(np.uint16))


def test_two_types_in_one_operation_are_refused() -> None:
    x, half = np.zeros((2, 3), np.float32), np.zeros((2, 3), BF16)
    for call in (
        lambda: _native.binary("add", x, half),
        lambda: _native.add_(half, x),
        lambda: _native.unary_backward("silu", x, half),
        lambda: _native.swiglu(x, half),
        lambda: _native.swiglu_backward(half, x, x),
        lambda: _native.swiglu_backward(x, x, x, h=half),
        lambda: _native.swiglu_backward(x, x, x, into=(half, half)),
    ):
        with pytest.raises(DTypeError, match=r"they must be the same"):
            call()
    with pytest.raises(DTypeError, match="mul: b must be float32 or bfloat16, not float16"):
        _native.binary("mul", 2, x.astype(np.float16))


@pytest.mark.parametrize("dtype", FLOWS)
def test_swiglu(isa: str, dtype: type) -> None:
    for n in [*TAILS, 5000]:
        gate, up, g = (guarded((floats(n + k, n) * (3 if k == 0 else 1)).astype(dtype)) for k in range(3))
        x = wide(gate)
        y = _native.swiglu(gate, up)
        assert_each_close(y, x * sigmoid(x) * up, rel=1e-6, dtype=dtype)
        h = guarded(np.zeros_like(y))
        dgate, dup = _native.swiglu_backward(g, gate, up, h=h)
        assert_close(dgate, wide(g) * up * SLOPE["silu"](x), dtype=dtype)
        assert_each_close(dup, g * x * sigmoid(x), rel=1e-6, dtype=dtype)
        np.testing.assert_array_equal(h, y)


@pytest.mark.parametrize("dtype", FLOWS)
def test_swiglu_of_two_halves_of_one_array(isa: str, dtype: type, same_on_any_threads) -> None:
    for rows, n in [(3, 1), (5, 63), (2, 1025), (70, 500)]:
        both, g = guarded(floats(n, rows, 2 * n).astype(dtype)), floats(1, rows, n).astype(dtype)
        gate, up = both[:, :n], both[:, n:]
        y = _native.swiglu(gate, up)
        np.testing.assert_array_equal(y, _native.swiglu(gate.copy(), up.copy()))
        want = _native.swiglu_backward(g, gate.copy(), up.copy())
        apart = guarded(np.zeros_like(both))
        into = apart[:, n:], apart[:, :n]
        got = _native.swiglu_backward(g, gate, up, into=into)
        assert got[0] is into[0]
        assert got[1] is into[1]
        np.testing.assert_array_equal(got, want)
        same_on_any_threads(lambda gate=gate, up=up: _native.swiglu(gate, up))
        same_on_any_threads(lambda g=g, gate=gate, up=up: _native.swiglu_backward(g, gate, up))
        h = g.copy()
        _native.swiglu_backward(h, gate, up, into=(gate, up), h=h)  # all in place
        np.testing.assert_array_equal(np.hstack(want), both)
        np.testing.assert_array_equal(h, y)


def test_swiglu_at_extremes(isa: str) -> None:
    inf, nan = np.inf, np.nan
    for dtype in FLOWS:
        gate = np.array([-inf, -200, -90, -0.0, 0, 90, 3e38, inf, nan], dtype)
        one = np.ones_like(gate)
        y, slope = _native.swiglu(gate, one), _native.swiglu_backward(one, gate, one)[0]
        assert (y[3:7] == gate[3:7]).all() or y[5:7].tolist() == gate[5:7].tolist()
        assert y[1] == 0
        assert y[7] == inf
        assert np.isnan(y[[0, 8]]).all()
        assert slope[1:7].tolist() == pytest.approx([0, 0, 0.5, 0.5, 1, 1], abs=1e-30)


def test_swiglu_backward_refuses_arrays_that_overlap() -> None:
    both, g = np.ones((4, 6), np.float32), np.ones((4, 3), np.float32)
    gate, up = both[:, :3], both[:, 3:]
    other = np.ones((4, 8), np.float32)
    for into in [(up, gate), (gate, gate), (both[:, 1:4], up), (other[:, :3], other[:, 2:5]), (g, up)]:
        with pytest.raises(UsageError, match=r"swiglu_backward: into\[[01]\] overlaps another array"):
            _native.swiglu_backward(g, gate, up, into=into)
    long = np.ones(20, np.float32)
    with pytest.raises(UsageError, match="swiglu_backward: h overlaps"):
        _native.swiglu_backward(long[:12].reshape(4, 3), gate, up, h=long[1:13].reshape(4, 3))
    with pytest.raises(ShapeError, match=r"into\[0\] must be 2-D with contiguous columns"):
        _native.swiglu_backward(g, gate, up, into=(np.ones((3, 4), np.float32).T, up))
    with pytest.raises(ShapeError, match=r"into\[1\] has shape \(4, 2\), gate \(4, 3\)"):
        _native.swiglu_backward(g, gate, up, into=(gate, up[:, 1:]))
    np.testing.assert_array_equal(both, 1)
