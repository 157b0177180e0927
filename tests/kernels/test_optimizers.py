"""Optimizer steps against float64, over several steps."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.checks import BF16, TAILS, assert_close, floats, wide
from kernels.guard import guarded
from kernels.test_dropout import words

from entrenar import _native
from entrenar.errors import DTypeError, ShapeError, UsageError


@pytest.mark.tier1
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam(isa: str, decoupled: bool) -> None:
    lr, b1, b2, eps, decay = 3e-3, 0.9, 0.999, 1e-8, 0.1
    for n in [*TAILS, 3001]:
        p, m, v = floats(n, n), np.zeros(n, np.float32), np.zeros(n, np.float32)
        wp, wm, wv = wide(p).copy(), wide(m).copy(), wide(v).copy()
        for step in (1, 2, 3):
            g = floats(n + step, n)
            _native.adam_step([p], [g], [m], [v], [step], lr, b1, b2, eps, decay, decoupled)
            grad = wide(g) if decoupled else g + decay * wp
            wm, wv = b1 * wm + (1 - b1) * grad, b2 * wv + (1 - b2) * grad**2
            if decoupled:
                wp *= 1 - lr * decay
            wp -= lr * (wm / (1 - b1**step)) / (np.sqrt(wv / (1 - b2**step)) + eps)
            assert_close(p, wp)
            assert_close(m, wm)
            assert_close(v, wv)


def test_adam_far_into_training_and_with_tiny_gradients(isa: str) -> None:
    p, g = np.ones(70, np.float32), floats(1, 70) * np.float32(1e-12)
    m, v = np.zeros(70, np.float32), np.zeros(70, np.float32)
    _native.adam_step([p], [g], [m], [v], [1], 0.1, 0.9, 0.95, 0.0, 0.0, True)
    assert_close(p, 1 - 0.1 * np.sign(g))
    _native.adam_step([p], [g], [m], [v], [10**7], 0.0, 0.9, 0.999, 1e-8, 0.5, True)
    assert np.isfinite(p).all()


@pytest.mark.tier1
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd(isa: str, momentum: float, nesterov: bool) -> None:
    lr, decay = 0.05, 0.01
    for n in [*TAILS, 3001]:
        p, buf = floats(n, n), np.zeros(n, np.float32) if momentum else None
        wp, wb = wide(p).copy(), np.zeros(n)
        for step in range(3):
            g = floats(n + step, n)
            _native.sgd_step([p], [g], None if buf is None else [buf], lr, momentum, decay, nesterov)
            grad = g + decay * wp
            wb = momentum * wb + grad
            wp -= lr * (grad + momentum * wb if nesterov else wb)
            assert_close(p, wp)


SIZES = (300, 1, 255, 65536, 0, 70001)  # of parameters in one call: pieces and blocks, whole and not


def test_results_do_not_depend_on_threads(isa: str, same_on_any_threads) -> None:
    def adam() -> tuple[np.ndarray, ...]:
        p, m, v = many(1), many(2), [np.abs(v) for v in many(3)]
        _native.adam_step(p, many(4), m, v, [5] * len(p), 1e-3, 0.9, 0.999, 1e-8, 0.01, True, 0.7)
        return (*p, *m, *v)

    def adam8() -> tuple[np.ndarray, ...]:
        p, (m, v, ms, vs) = many(1), moments8(SIZES)
        for step in (1, 2, 3):
            _native.adam_step(p, many(4 + step), m, v, [step] * len(p), *SETTINGS8, 0.7, ms, vs)
        return (*p, *m, *v, *ms, *vs)

    def sgd() -> tuple[np.ndarray, ...]:
        p, buf = many(1), many(2)
        _native.sgd_step(p, many(4), buf, 1e-3, 0.9, 0.01, True)
        return (*p, *buf)

    def half() -> tuple[np.ndarray, ...]:
        p, (m, v, ms, vs) = [x.astype(BF16) for x in many(1)], moments8(SIZES)
        where = [(3, 1000 * i) for i in range(len(p))]
        _native.adam_step(p, many(4), m, v, [1] * len(p), *SETTINGS8, 0.7, ms, vs, where)
        _native.sgd_step(p, many(5), None, 0.1, 0.0, 0.1, False, 1.0, where)
        return (*p, *m, *v)

    for call in (adam, adam8, sgd, half, lambda: np.array(_native.square_sums(many(1)))):
        same_on_any_threads(call)


def many(seed: int) -> list[np.ndarray]:
    return [floats(seed + 10 * i, n) for i, n in enumerate(SIZES)]


def test_parameters_in_one_call_are_as_by_themselves(isa: str) -> None:
    """And the scale of the gradients is the bits of gradients scaled before."""
    p, g, m, v = many(1), many(2), many(3), [np.abs(v) for v in many(4)]
    steps = list(range(1, len(p) + 1))
    alone = [[x.copy() for x in arrays] for arrays in zip(p, m, v, strict=True)]
    for (one, first, second), grad, step in zip(alone, g, steps, strict=True):
        scaled = grad * np.float32(0.3)
        _native.adam_step([one], [scaled], [first], [second], [step], 1e-3, 0.9, 0.99, 1e-8, 0.1, False)
    before = [grad.copy() for grad in g]
    _native.adam_step(p, g, m, v, steps, 1e-3, 0.9, 0.99, 1e-8, 0.1, False, 0.3)
    for together, apart in zip(zip(p, m, v, strict=True), alone, strict=True):
        assert [x.tobytes() for x in together] == [x.tobytes() for x in apart]
    assert [grad.tobytes() for grad in g] == [grad.tobytes() for grad in before]


def test_square_sums(isa: str) -> None:
    arrays = [*many(1), np.full(10, 1e30, np.float32), floats(3, 6, 4).T]
    np.testing.assert_allclose(_native.square_sums(arrays), [(wide(x) ** 2).sum() for x in arrays], rtol=1e-13)
    assert _native.square_sums([]) == []
    assert np.isnan(_native.square_sums([np.array([1, np.nan], np.float32)])[0])
    assert np.isinf(_native.square_sums([np.array([1, -np.inf], np.float32)])[0])


# ---- moments of one byte, against a model in NumPy ----

SETTINGS8 = (3e-3, 0.9, 0.999, 1e-8, 0.1, True)  # lr, betas, eps, decay, decoupled
BLOCK = 256


def cells(lowest: int) -> tuple[np.ndarray, np.ndarray]:
    """(bounds, values) of the codes from 1 up: each decade from 1e-7 to 1 cut into equal cells, `lowest` of them in
    the lowest one, twice as many in each next. Above them 1 itself; below the first bound 0."""
    bounds = np.concatenate([np.linspace(10.0**e, 10.0 ** (e + 1), lowest * 2**i, endpoint=False)
                             for i, e in enumerate(range(-7, 0))])  # fmt: skip
    bounds = np.append(bounds, 1.0)
    return bounds, np.append((bounds[:-1] + bounds[1:]) / 2, 1.0)


M_BOUNDS, M_VALUES = cells(1)
V_BOUNDS, V_VALUES = cells(2)
M_MAP = np.concatenate([-M_VALUES[126::-1], [0], M_VALUES])  # by code
V_MAP = np.concatenate([[0], V_VALUES])


def moments8(sizes: tuple[int, ...]) -> tuple[list[np.ndarray], ...]:
    codes = lambda: [np.zeros(n, np.uint8) for n in sizes]  # noqa: E731
    scales = lambda: [np.zeros(-(-n // BLOCK), np.float32) for n in sizes]  # noqa: E731
    return codes(), codes(), scales(), scales()


def decoded(table: np.ndarray, codes: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    return table[codes] * np.repeat(wide(absmax), BLOCK)[: codes.size]


def blocks(x: np.ndarray) -> np.ndarray:
    return np.pad(x, (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def in_its_cell(codes: np.ndarray, values: np.ndarray, absmax: np.ndarray, signed: bool) -> np.ndarray:
    """Is each value, within rounding and the cells' overlap of a thousandth, in the cell that its code stands for?"""
    bounds, zero = (M_BOUNDS, 127) if signed else (V_BOUNDS, 0)
    y = np.abs(values) / np.repeat(np.where(absmax > 0, wide(absmax), 1), BLOCK)[: values.size]
    cell = np.abs(codes.astype(int) - zero)
    low = np.concatenate([[0], bounds])[cell]
    high = np.concatenate([bounds, [1.0]])[cell]
    negative_top = signed & (codes == 0)  # the largest magnitude has no code where it is negative
    slack = 2e-3 * (high - low) + 1e-6 * y
    sign_right = ~signed | (codes == 127) | ((codes < 127) == (values < 0))
    return sign_right & (y >= low - slack) & ((y <= high + slack) | negative_top)


@pytest.mark.tier1
def test_adam_with_moments_of_a_byte(isa: str) -> None:
    lr, b1, b2, eps, decay, _ = SETTINGS8
    for n in [*TAILS, 255, 256, 257, 3001]:
        p, (m, v, ms, vs) = floats(n, n), moments8((n,))
        for step in (1, 2, 3):
            g = (floats(n + step, n) * 10.0 ** np.random.default_rng(n).integers(-6, 2, n)).astype(np.float32)
            wm = b1 * decoded(M_MAP, m[0], ms[0]) + (1 - b1) * wide(g)
            wv = b2 * decoded(V_MAP, v[0], vs[0]) + (1 - b2) * wide(g) ** 2
            wp = wide(p) * (1 - lr * decay) - lr * (wm / (1 - b1**step)) / (np.sqrt(wv / (1 - b2**step)) + eps)
            _native.adam_step([p], [g], m, v, [step], *SETTINGS8, 1.0, ms, vs)
            assert_close(p, wp)
            assert_close(ms[0], np.abs(blocks(wm)).max(1))
            assert_close(vs[0], blocks(wv).max(1))
            assert in_its_cell(m[0], wm, ms[0], signed=True).all()
            lowest = (v[0] == 1) & (wv > 0)  # also for what is below its cell: v never becomes 0
            assert (in_its_cell(v[0], wv, vs[0], signed=False) | lowest).all()
            assert (v[0][wv > 0] > 0).all()


def test_every_code_of_a_byte_is_reached_and_comes_back(isa: str) -> None:
    """With β = 0 a step stores the gradient, or its square: each code's own value and both ends of its cell."""
    for sign, bounds, values in ((1, M_BOUNDS, M_VALUES), (-1, M_BOUNDS, M_VALUES), (0, V_BOUNDS, V_VALUES)):
        inset = 2e-3 * np.diff(bounds)
        inside = np.concatenate([values, bounds[:-1] + inset, bounds[1:] - inset, [0, bounds[0] * 0.9]])
        codes = np.concatenate([np.arange(1, values.size + 1), *2 * [np.arange(1, bounds.size)], [0, 0]])
        if sign == 0:
            codes[-1] = 1  # never 0 but for 0
        for y, code in zip(np.array_split(inside, 4), np.array_split(codes, 4), strict=True):
            y, code = np.append(y, 1.0), np.append(code, values.size)
            g = (sign * y if sign else np.sqrt(y)).astype(np.float32)
            p, (m, v, ms, vs) = np.zeros(g.size, np.float32), moments8((g.size,))
            _native.adam_step([p], [g], m, v, [1], 0.0, 0.0, 0.0, 1e-8, 0.0, True, 1.0, ms, vs)
            got, absmax = (m[0], ms[0]) if sign else (v[0], vs[0])
            want = {1: 127 + code, -1: 127 - np.minimum(code, 127), 0: code}[sign]
            np.testing.assert_array_equal(got, want)
            assert absmax.tolist() == [1.0]


def test_a_block_of_zeros_and_one_of_denormals(isa: str) -> None:
    p, (m, v, ms, vs) = np.ones(600, np.float32), moments8((600,))
    g = np.zeros(600, np.float32)
    g[300:] = 1e-30  # its square is 0
    for step in (1, 2):
        _native.adam_step([p], [g], m, v, [step], 0.1, 0.9, 0.999, 1e-8, 0.0, True, 1.0, ms, vs)
    assert (p == 1).all()
    assert (ms[0][0], vs[0].tolist()) == (0, [0, 0, 0])
    g[:] = 1e-19  # what v takes of its square is denormal
    _native.adam_step([p], [g], m, v, [1], 0.1, 0.9, 0.999, 1e-8, 0.0, True, 1.0, ms, vs)
    assert np.isfinite(p).all()


# ---- parameters in bf16 ----


def random_halves(n: int, seed: int, offset: int) -> np.ndarray:
    """16 random bits an element: 256 of them take the low halves of word k of counter j, k outside, then the high."""
    found = []
    for block in range(-(-n // 256)):
        word = words(128, seed, offset + 32 * block).astype(np.int64).reshape(32, 4).T.reshape(-1)
        found += [word & 0xFFFF, word >> 16]
    return np.concatenate(found)[:n]


def rounded(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
    up = np.asarray(x, np.float32).view(np.uint32).astype(np.int64) + bits
    return (up >> 16).astype(np.uint16).view(BF16)


@pytest.mark.tier1
def test_a_step_of_bf16_is_the_step_of_f32_rounded_by_the_random_bits(isa: str) -> None:
    for n in [*range(1, 66, 4), 255, 256, 257, 700]:
        start, seed, offset = floats(n, n).astype(BF16), 7 + (n << 40), 2**64 - 5
        p, wide_p, g = start.copy(), start.astype(np.float32), floats(n + 1, n)
        states = [[np.zeros(n, np.float32) for _ in "mv"] for _ in range(2)]
        coded = [moments8((n,)) for _ in range(2)]
        where = [(seed, offset)]
        for step in (1, 2):
            for one, (m, v) in ((p, states[0]), (wide_p, states[1])):
                _native.adam_step([one], [g], [m], [v], [step], *SETTINGS8, 0.5, random=where)
            wide_p = rounded(wide_p, random_halves(n, seed, offset)).astype(np.float32)
            np.testing.assert_array_equal(p.astype(np.float32), wide_p)
            for one, (mc, vc, ms, vs) in ((p, coded[0]), (wide_p, coded[1])):
                _native.adam_step([one], [g], mc, vc, [step], *SETTINGS8, 0.5, ms, vs, where)
            wide_p = rounded(wide_p, random_halves(n, seed, offset)).astype(np.float32)
            np.testing.assert_array_equal(p.astype(np.float32), wide_p)
            for one in (p, wide_p):
                _native.sgd_step([one], [g], None, 0.01, 0.0, 0.1, False, random=where)
            wide_p = rounded(wide_p, random_halves(n, seed, offset)).astype(np.float32)
            np.testing.assert_array_equal(p.astype(np.float32), wide_p)
        assert [x.tobytes() for x in states[0]] == [x.tobytes() for x in states[1]]
        assert [x[0].tobytes() for x in coded[0]] == [x[0].tobytes() for x in coded[1]]


def test_rounding_is_right_on_average_and_special_values_stay(isa: str) -> None:
    n = 200_000
    for value in (1 + 2**-10, -(1 + 2**-9 + 2**-14), 3e-39):  # between two neighbours
        p = np.zeros(n, BF16)
        _native.sgd_step([p], [np.full(n, -value, np.float32)], None, 1.0, 0.0, 0.0, False, random=[(1, 2)])
        low, high = np.unique(p.astype(np.float64))
        assert low < value < high
        share = (value - low) / (high - low)
        assert (p.astype(np.float64) == high).mean() == pytest.approx(share, abs=4 * (share / n) ** 0.5)
    special = np.array([np.inf, -np.inf, np.nan, 0.0, 1.5, -2.0], np.float32)
    p = np.zeros(6, BF16)
    _native.sgd_step([p], [-special], None, 1.0, 0.0, 0.0, False, random=[(1, 2)])
    np.testing.assert_array_equal(p.astype(np.float32), special)
    p = np.zeros(300, BF16)  # the smallest NaN pattern of f32, and the largest
    for bits in (0x7F800001, 0xFFFFFFFF):
        g = np.full(300, bits, np.uint32).view(np.float32)
        _native.sgd_step([p], [g], None, 1.0, 0.0, 0.0, False, random=[(1, 2)])
        assert np.isnan(p.astype(np.float32)).all()


def test_nothing_beyond_the_arrays_is_touched(isa: str) -> None:
    for n in (1, 17, 255, 257, 513):
        codes, scales = [guarded(np.zeros(n, np.uint8)) for _ in "mv"], np.zeros(-(-n // BLOCK), np.float32)
        absmax = [guarded(scales) for _ in "mv"]
        p, g, m, v = (guarded(np.abs(floats(i, n))) for i in range(4))
        for step in (1, 2):
            _native.adam_step([p], [g], codes[:1], codes[1:], [step], *SETTINGS8, 1.0, absmax[:1], absmax[1:])
        _native.adam_step([p], [g], [m], [v], [1], *SETTINGS8)
        _native.sgd_step([p], [g], [m], 0.1, 0.9, 0.1, True)
        assert _native.square_sums([g])[0] > 0
        half = guarded(floats(9, n), BF16)
        _native.adam_step([half], [g], [m], [v], [1], *SETTINGS8, random=[(1, 2)])
        _native.adam_step([half], [g], codes[:1], codes[1:], [1], *SETTINGS8, 1.0, absmax[:1], absmax[1:], [(1, 2)])
        _native.sgd_step([half], [g], [m], 0.1, 0.9, 0.1, True, random=[(1, 2)])
        assert np.isfinite(p).all()


def test_what_can_not_be_stepped() -> None:
    p, g = np.zeros(4, np.float32), np.zeros(4, np.float32)
    rest = ([1], 1e-3, 0.9, 0.999, 1e-8, 0.0, True)
    with pytest.raises(ShapeError, match=r"adam_step: p has shape \(4,\), g \(3,\)"):
        _native.adam_step([p], [g[:3]], [g], [g], *rest)
    with pytest.raises(ShapeError, match="adam_step: p is written in place and must be C-contiguous"):
        _native.adam_step([np.zeros(8, np.float32)[::2]], [g], [g], [g], *rest)
    with pytest.raises(DTypeError, match="adam_step: m must be float32"):
        _native.adam_step([p], [g], [np.zeros(4)], [g], *rest)
    frozen = np.zeros(4, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(DTypeError, match="sgd_step: p is written in place but read-only"):
        _native.sgd_step([frozen], [g], None, 0.1, 0.0, 0.0, False)
    with pytest.raises(UsageError, match="adam_step: step=0 must count from 1"):
        _native.adam_step([p], [g], [p.copy()], [p.copy()], [0], *rest[1:])
    with pytest.raises(UsageError, match=r"momentum=0\.9 needs buf"):
        _native.sgd_step([p], [g], None, 0.1, 0.9, 0.0, False)
    half = p.astype(BF16)
    with pytest.raises(UsageError, match="p of bfloat16 needs random"):
        _native.sgd_step([half], [g], None, 0.1, 0.0, 0.0, False)
    with pytest.raises(DTypeError, match="p must be float32 or bfloat16, not float16"):
        _native.sgd_step([p.astype(np.float16)], [g], None, 0.1, 0.0, 0.0, False)
    with pytest.raises(ShapeError, match="p is written in place"):
        _native.sgd_step([np.zeros(8, BF16)[::2]], [g], None, 0.1, 0.0, 0.0, False, random=[(1, 2)])
    half.flags.writeable = False
    with pytest.raises(DTypeError, match="read-only"):
        _native.sgd_step([half], [g], None, 0.1, 0.0, 0.0, False, random=[(1, 2)])
    with pytest.raises(UsageError, match="m must be a list with an entry for each of 1 parameters"):
        _native.adam_step([p], [g], [], [g], *rest)


def test_what_are_no_codes() -> None:
    p, g, scales = np.zeros(300, np.float32), np.zeros(300, np.float32), np.zeros(2, np.float32)
    codes = np.zeros(300, np.uint8)

    def step(m: np.ndarray, absmax: np.ndarray | None) -> None:
        _native.adam_step([p], [g], [m], [codes.copy()], [1], *SETTINGS8, 1.0, [absmax], [scales.copy()])

    frozen = codes.copy()
    frozen.flags.writeable = False
    with pytest.raises(DTypeError, match="m must be uint8 where it has magnitudes"):
        step(g.copy(), scales)
    with pytest.raises(DTypeError, match="read-only"):
        step(frozen, scales)
    with pytest.raises(ShapeError, match="C-contiguous"):
        step(np.zeros(600, np.uint8)[::2], scales)
    with pytest.raises(ShapeError, match=r"m has shape \(299,\), g \(300,\)"):
        step(codes[:299], scales)
    with pytest.raises(ShapeError, match=r"m_absmax has shape \(1,\); m has 2 blocks"):
        step(codes, scales[:1])
    with pytest.raises(UsageError, match="go together"):
        step(codes, None)
    with pytest.raises(UsageError, match="overlap"):
        step(codes, p[:2])
