"""Sums of products with their epilogue against float64: every type, tail, layout, term, threads, memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.checks import TAILS, floats, wide
from kernels.guard import guarded

from entrenar import _native, backend
from entrenar.backend import cpu
from entrenar.errors import DTypeError, ShapeError, UsageError

BF16 = ml_dtypes.bfloat16
TYPES = [np.float32, BF16, np.float16]


def seen(terms):
    """Terms as (a, b, n0) in float64: as the kernel sees them, rounded to bf16 where it multiplies bf16."""
    rounds = terms[0][0].dtype == BF16 and cpu.fast_bf16()
    for a, b, *n0 in terms:
        yield *((wide(x.astype(BF16)) if rounds else wide(x)) for x in (a, b)), n0[0] if n0 else 0


def assert_product(got, terms, bias=None, residual=None, before=None):
    """Within a few f32 ulp of the sum of the terms' sizes, and half an ulp of bf16 where out is that."""
    want, size = np.zeros(got.shape), np.zeros(got.shape)
    for a, b, n0 in seen(terms):
        want[:, n0 : n0 + b.shape[1]] += a @ b
        size[:, n0 : n0 + b.shape[1]] += np.abs(a) @ np.abs(b)
    for more in (bias, residual, before):
        if more is not None:
            want += wide(more)
            size += np.abs(wide(more))
    bound = 2e-6 * size + 1e-37
    if got.dtype == BF16:
        bound += np.abs(want) * 2**-8
    assert (np.abs(wide(got) - want) <= bound).all()


def operand(seed, rows, columns, transposed, dtype):
    return floats(seed, columns, rows).astype(dtype).T if transposed else floats(seed, rows, columns).astype(dtype)


@pytest.mark.tier1
@pytest.mark.parametrize("transposes", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_every_tail_of_every_dimension_in_bf16(isa, transposes):
    ta, tb = transposes
    for tail in TAILS:
        for m, k, n in ((tail, 9, 5), (15, tail, 9), (19, 5, tail), (tail, tail, tail)):
            terms = [(operand(1, m, k, ta, BF16), operand(2, k, n, tb, BF16))]
            assert_product(cpu.product(terms, np.full((m, n), np.nan, BF16)), terms)


@pytest.mark.parametrize("out_type", [np.float32, BF16])
@pytest.mark.parametrize("types", [(BF16, BF16), (BF16, np.float32), (BF16, np.float16), (np.float32, BF16),
                                   (np.float16, np.float32)])
def test_terms_bias_and_residual_are_one_sum(isa, types, out_type):
    for m, k, n in ((37, 70, 90), (3, 300, 41), (60, 2500, 70)):
        for tb in (False, True):
            x, w = floats(1, m, k).astype(types[0]), operand(2, k, n, tb, types[1])
            low, b, c = floats(3, m, 16).astype(types[0]), floats(4, n - 35, 16), floats(5, 9, k).astype(types[1])
            terms = [(x, w), (low, b.T, 30), (x, c.T, 5)]
            bias, residual = floats(6, n), floats(7, m, n).astype(out_type)
            out = np.full((m, n), np.nan, out_type)
            assert cpu.product(terms, out, bias=bias, residual=residual) is out
            assert_product(out, terms, bias, residual)
            before = out.copy()
            cpu.product(terms, out, accumulate=True)
            assert_product(out, terms, before=before)
            before = out.copy()
            cpu.product(terms, out, residual=out)
            assert_product(out, terms, residual=before)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_terms_of_any_strides(data):
    draw = data.draw
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 80))

    def view(seed, rows, columns):
        steps = draw(st.sampled_from([1, 2, -1, -2])), draw(st.sampled_from([1, 2, -1, -2]))
        swap, dtype = draw(st.booleans()), draw(st.sampled_from(TYPES))
        return operand(seed, rows * abs(steps[0]), columns * abs(steps[1]), swap, dtype)[:: steps[0], :: steps[1]]

    terms, shared = [], None
    for i in range(draw(st.integers(1, 5))):
        n0 = draw(st.integers(0, n - 1))
        width, k = draw(st.integers(0, n - n0)), draw(st.integers(0, 70))
        a = shared if shared is not None and draw(st.booleans()) else view(i, m, k)
        shared = a
        terms.append((a, view(9 + i, a.shape[1], width), n0))
    wider = np.full((m, n + 3), 7, draw(st.sampled_from([np.float32, BF16])))
    cpu.product(terms, wider[:, 1 : n + 1])
    assert_product(wider[:, 1 : n + 1], terms)
    assert (wider[:, [0, n + 1, n + 2]] == 7).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [1, 6, 40])
def test_a_special_value_reaches_its_row_and_column_alone(isa, m, value):
    a, b = np.abs(floats(1, m, 33)).astype(BF16), np.abs(floats(2, 33, 37)).astype(BF16)
    for tb in (False, True):

        def run(x, y, tb=tb):
            y = np.ascontiguousarray(y.T).T if tb else y
            return cpu.product([(x, y)], np.empty((m, 37), np.float32))

        clean = run(a, b)
        row, column = a.copy(), b.copy()
        row[m // 2, 32] = value
        column[32, 36] = value
        got = run(row, b)
        np.testing.assert_array_equal(got[m // 2], np.full(37, value, np.float32))
        np.testing.assert_array_equal(np.delete(got, m // 2, 0), np.delete(clean, m // 2, 0))
        got = run(a, column)
        np.testing.assert_array_equal(got[:, 36], np.full(m, value, np.float32))
        np.testing.assert_array_equal(got[:, :36], clean[:, :36])


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_nothing_beyond_the_arrays_is_read_or_written(isa, dtype):
    for m, k, n in ((1, 1, 1), (1, 37, 5), (7, 19, 33), (31, 5, 47), (31, 6, 47), (15, 64, 40)):
        for ta in (False, True):
            for tb in (False, True):
                a = guarded(floats(1, *((k, m) if ta else (m, k))), BF16)
                b = guarded(floats(2, *((n, k) if tb else (k, n))), dtype)
                out, residual = guarded(np.zeros((m, n)), dtype), guarded(floats(3, m, n), dtype)
                bias = guarded(floats(4, n))
                terms = [(a.T if ta else a, b.T if tb else b)]
                cpu.product(terms, out, bias=bias, residual=residual)
                assert_product(out, terms, bias, residual)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_sums_of_rows_of_a_large_operand(isa, dtype, same_on_any_threads):
    """The gradients of low-rank factors: few rows of A against rows of B, and rows of Aᵀ against few columns."""
    for few, k, many in ((9, 21, 25_001), (12, 20, 26_215), (16, 64, 8_193), (33, 131, 4_007), (64, 130, 4_033)):
        low, wide_one = guarded(floats(1, k, few), dtype), guarded(floats(2, k, many), dtype)
        for terms, shape in (([(low.T, wide_one)], (few, many)), ([(wide_one.T, low)], (many, few))):
            out = guarded(floats(3, *shape))
            before = out.copy()
            cpu.product(terms, out, accumulate=True)
            assert_product(out, terms, before=before)
    # in blocks of k, each column by one thread; some columns of a wider array; a bias, a residual, a result in bf16
    low, wide_one = floats(4, 1500, 20).astype(dtype), floats(5, 1500, 900).astype(dtype)[:, 7:707]
    for terms, shape in (([(low.T, wide_one)], (20, 700)), ([(wide_one.T, low)], (700, 20))):
        same_on_any_threads(lambda terms=terms, shape=shape: cpu.product(terms, np.empty(shape, np.float32)))
        bias, residual = floats(6, shape[1]), floats(7, *shape).astype(BF16)
        out = cpu.product(terms, np.empty(shape, BF16), bias=bias, residual=residual)
        assert_product(out, terms, bias, residual)


@pytest.mark.parametrize("shape", [(1, 2000, 600), (300, 300, 300), (40, 700, 1200), (1000, 300, 9), (16, 1000, 900)])
def test_bits_do_not_depend_on_threads(isa, same_on_any_threads, shape):
    m, k, n = shape
    a, b, residual = (floats(i, *size).astype(BF16) for i, size in enumerate(((m, k), (k, n), (m, n))))
    low = floats(4, m, 16)
    terms = [(a, b), (low, floats(5, 16, n))]
    flipped = [(np.asfortranarray(a), np.asfortranarray(b)), (low, floats(5, 16, n))]
    for some in (terms, flipped):
        same_on_any_threads(lambda some=some: cpu.product(some, np.empty((m, n), BF16), residual=residual))


# rows, steps of k, columns: packed, A and B exceed what is shared; and the last one's sums what is kept
DEEP, TALL, WIDE = (300, 8000, 140), (1100, 2000, 530), (1020, 2100, 2100)


def left(seed, m, k, layout):
    """A matrix that is read where it lies ("rows"), or has to be packed: what it is in memory is not rows of words."""
    if layout == "f16":
        return floats(seed, m, k).astype(np.float16)
    type_ = BF16 if layout.startswith("bf16") else np.float32
    return floats(seed, k, m).astype(type_).T if layout.endswith("columns") else floats(seed, m, k).astype(type_)


@pytest.mark.parametrize(
    ("shape", "layout", "out_type"),
    [
        (DEEP, "f32 columns", np.float32),
        (DEEP, "f16", BF16),
        (DEEP, "bf16 columns", np.float32),
        (DEEP, "bf16 columns", BF16),
        (DEEP, "bf16 rows", BF16),
        (TALL, "f32 columns", BF16),
        (TALL, "bf16 columns", np.float32),
        (TALL, "f32 rows", np.float32),
        (WIDE, "f16", BF16),
    ],
)
def test_operands_too_large_for_the_cache_are_multiplied_in_parts(isa, shape, layout, out_type, same_on_any_threads):
    """With a short term whose A is packed, and one whose A is read where it lies."""
    m, k, n = shape
    k *= 2 if cpu.fast_bf16() and layout.startswith("bf16") else 1  # a step is two k
    x, low, more = left(1, m, k, layout), floats(3, 16, m).astype(BF16).T, floats(7, m, 24)
    more = more.astype(BF16) if layout.startswith("bf16") else more
    w = floats(2, n, k).astype(x.dtype)
    terms = [(x, w.T), (low, floats(4, 16, 40), 50), (more, floats(8, 24, 30), 5)]
    bias, residual = floats(5, n), floats(6, m, n).astype(out_type)
    out = cpu.product(terms, np.empty((m, n), out_type), bias=bias, residual=residual)
    rows = np.arange(0, m, 29)
    seen_terms = [(a[rows], b, *n0) for a, b, *n0 in terms]
    assert_product(out[rows], seen_terms, bias, residual[rows])
    before = out.copy()
    cpu.product(terms, out, accumulate=True)
    assert_product(out[rows], seen_terms, before=before[rows])
    if layout in ("f32 columns", "bf16 columns"):
        same_on_any_threads(lambda: cpu.product(terms, np.empty((m, n), out_type), residual=residual))


@pytest.mark.parametrize("out_type", [np.float32, BF16])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_a_deep_product_of_few_columns(isa, dtype, out_type, same_on_any_threads):
    """B, in words of f32, is more than tasks share, parts of it are not. The bits are those of fewer columns, which
    need no parts. At level amx f32 results are cut where a whole tile ends: it begins with what C holds, one that is
    cut off adds C last.
    """
    m, k, n = 250, 6001, 230
    edge = 128 if isa == "amx" and dtype == BF16 and out_type == np.float32 else 120
    x, low = floats(1, m, k).astype(dtype), floats(2, m, 16).astype(dtype)
    bias, residual = floats(5, n), floats(6, m, n).astype(out_type)
    for w in (floats(3, n, k).astype(dtype).T, floats(3, k, n).astype(dtype)):
        terms = [(x, w), (low, floats(4, 16, n))]
        out = cpu.product(terms, np.empty((m, n), out_type), bias=bias, residual=residual)
        assert_product(out, terms, bias, residual)
        for half in (slice(0, edge), slice(edge, n)):
            some = [(a, b[:, half]) for a, b in terms]
            width = half.stop - half.start
            less = cpu.product(some, np.empty((m, width), out_type), bias=bias[half], residual=residual[:, half])
            np.testing.assert_array_equal(out[:, half], less)
        same_on_any_threads(lambda terms=terms: cpu.product(terms, np.empty((m, n), out_type), residual=residual))
        before = out.copy()
        cpu.product(terms, out, accumulate=True)
        assert_product(out, terms, before=before)


def test_a_deep_and_tall_product_of_few_columns(isa):
    """Its sums are more than what is kept for a result in bf16: it is taken in parts of its rows."""
    m, k, n = 2300, 1100, 1000
    terms = [(floats(1, m, k), floats(2, n, k).T)]
    bias, residual = floats(3, n), floats(4, m, n).astype(BF16)
    out = cpu.product(terms, np.empty((m, n), BF16), bias=bias, residual=residual)
    rows = np.arange(0, m, 29)
    assert_product(out[rows], [(terms[0][0][rows], terms[0][1])], bias, residual[rows])


@pytest.mark.parametrize("shape", [(33, 64, 70), (200, 66, 40)])
def test_rows_of_bf16_that_are_no_whole_words_are_packed(isa, shape):
    """An odd distance of rows, an odd address, an odd k (behind which is NaN), one row for all."""
    m, k, n = shape
    apart = np.full((m, k + 1), np.nan, BF16)
    apart[:, :k] = floats(1, m, k)
    even = np.full((m, k + 2), np.nan, BF16)
    even[:, : k - 1] = floats(2, m, k - 1)
    raw = np.empty(m * k + 1, BF16)
    odd = raw[1:] if raw.ctypes.data % 4 == 0 else raw[:-1]
    odd[:] = floats(3, m * k)
    one = np.broadcast_to(floats(4, k).astype(BF16), (m, k))
    for a in (apart[:, :k], even[:, : k - 1], odd.reshape(m, k), one):
        terms = [(a, floats(5, n, a.shape[1]).astype(BF16).T)]
        assert_product(cpu.product(terms, np.empty((m, n), np.float32)), terms)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_a_term_of_no_columns(isa, dtype):
    """Of an A in either layout, beside a term that has some."""
    for ta in (0, 1):
        terms = [(operand(1, 40, 70, ta, dtype), np.zeros((70, 0), np.float32), 3)]
        for some in (terms, [*terms, (operand(2, 40, 80, ta, dtype), floats(3, 80, 6))]):
            assert_product(cpu.product(some, np.zeros((40, 6), np.float32)), some)


@pytest.mark.tier1
def test_no_rows_columns_or_steps():
    some = np.zeros((3, 0), BF16)
    bias = floats(1, 5)
    out = np.full((3, 5), np.nan, np.float32)
    cpu.product([(some, np.zeros((0, 5), BF16))], out, bias=bias)
    np.testing.assert_array_equal(out, np.broadcast_to(bias, (3, 5)))
    for m, n in ((0, 5), (3, 0)):
        cpu.product([(np.zeros((m, 2), BF16), np.zeros((2, n), BF16))], np.zeros((m, n), BF16))


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["f32", "bf16"])
def test_no_steps_on_a_thread_that_has_not_multiplied_yet(isa, dtype):
    bias, out = floats(1, 50), np.full((40, 50), np.nan, np.float32)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(cpu.product, [(np.zeros((40, 0), dtype), np.zeros((0, 50), dtype))], out, bias=bias).result()
    np.testing.assert_array_equal(out, np.broadcast_to(bias, (40, 50)))


@pytest.mark.parametrize("type_", [np.float32, BF16], ids=["f32", "bf16"])
def test_bits_depend_on_neither_where_rows_lie_nor_how(isa, type_):
    """A deep product with short terms, its A read where it is, or packed and then summed in parts."""
    m, k, n = DEEP
    k *= 2 if cpu.fast_bf16() and type_ == BF16 else 1
    x, low = floats(2, m, k).astype(type_), floats(3, m, 16).astype(type_)
    terms = (floats(4, n, k).astype(type_).T, floats(5, 16, n)), (floats(6, 16, n - 40), 40)
    odd = np.empty(m * k + 1, type_)
    odd = (odd[1:] if odd.ctypes.data % 4 == 0 else odd[:-1]).reshape(m, k)
    apart = np.empty((m, k + 1), type_)[:, :k]
    columns = np.empty((k, m), type_).T
    for other in (odd, apart, columns):
        other[...] = x
    same = []
    for a in (x, odd, apart, columns):
        (w, b), (c, n0) = terms
        same.append(cpu.product([(a, w), (low, b), (low, c, n0)], np.empty((m, n), np.float32), bias=floats(7, n)))
        np.testing.assert_array_equal(same[0], same[-1])


def test_bits_of_a_column_do_not_depend_on_how_many_there_are(isa):
    """Of few columns rows of A are read in place, of many they may be packed."""
    m, k, n = 31, 1100, 500
    a, b = floats(1, m, k), floats(2, k, n)
    wide = cpu.product([(a, b)], np.empty((m, n), np.float32))
    for some in (100, 192, 193, 300):
        np.testing.assert_array_equal(cpu.product([(a, b[:, :some])], np.empty((m, some), np.float32)), wide[:, :some])


def test_memory_that_runs_out_is_an_error_and_leaves_no_harm(isa):
    terms = [(floats(1, 50, 5000).astype(BF16), floats(2, 5000, 300).astype(BF16))]
    out = np.empty((50, 300), BF16)

    def failures():
        count = 0
        for nth in range(1, 10):
            _native._fail_allocation(nth)
            try:
                cpu.product(terms, out)
            except MemoryError:
                count += 1
            finally:
                _native._fail_allocation(0)
        return count

    threads = backend.get_num_threads()
    backend.set_num_threads(1)
    try:
        with ThreadPoolExecutor(1) as fresh:  # its scratch memory is empty
            assert fresh.submit(failures).result() >= 2
        assert_product(out, terms)
    finally:
        backend.set_num_threads(threads)


@pytest.mark.tier1
def test_what_does_not_fit_is_named():
    a, b, out = np.zeros((3, 4), np.float32), np.zeros((4, 5), np.float32), np.zeros((3, 5), np.float32)
    with pytest.raises(ShapeError, match=r"term 0 is \(3, 4\) times \(3, 4\)"):
        cpu.product([(a, a)], out)
    with pytest.raises(ShapeError, match="at column 2"):
        cpu.product([(a, np.zeros((4, 4), np.float32), 2)], out)
    with pytest.raises(ShapeError, match="bias"):
        cpu.product([(a, b)], out, bias=np.zeros(3, np.float32))
    with pytest.raises(ShapeError, match="residual"):
        cpu.product([(a, b)], out, residual=a)
    with pytest.raises(ShapeError, match="residual is bfloat16"):
        cpu.product([(a, b)], out, residual=out.astype(BF16))
    with pytest.raises(ShapeError, match="contiguous columns"):
        cpu.product([(a, b)], np.zeros((5, 3), np.float32).T)
    with pytest.raises(DTypeError, match="out must be float32 or bfloat16"):
        cpu.product([(a, b)], out.astype(np.float64))
    with pytest.raises(UsageError, match="0 terms"):
        cpu.product([], out)
    with pytest.raises(UsageError, match="overlaps"):
        cpu.product([(b[:3, :4], b)], b[:3])
    frozen = out.copy()
    frozen.flags.writeable = False
    with pytest.raises(DTypeError, match="read-only"):
        cpu.product([(a, b)], frozen)
