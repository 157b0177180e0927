"""matmul against float64: every tail, transpose, stride and type, special values, threads, memory."""

from __future__ import annotations

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

WEIGHTS = [np.float32, np.float16, ml_dtypes.bfloat16]


def assert_product(got, a, b, before=0.0):
    """Within the bound of any order of summation: a few ulp of the sum of the terms' sizes."""
    want = wide(a) @ wide(b) + before
    bound = 2e-6 * (np.abs(wide(a)) @ np.abs(wide(b)) + np.abs(before)) + 1e-44
    assert got.dtype == np.float32
    assert got.shape == want.shape
    assert (np.abs(got - want) <= bound).all()


def operand(seed, rows, columns, transposed, dtype=np.float32):
    x = floats(seed, columns, rows) if transposed else floats(seed, rows, columns)
    return x.astype(dtype)


@pytest.mark.tier1
@pytest.mark.parametrize("transposes", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_every_tail_of_every_dimension(isa, transposes):
    ta, tb = transposes
    for tail in TAILS:
        for m, k, n in ((tail, 9, 5), (5, tail, 9), (9, 5, tail), (tail, tail, tail)):
            a, b = operand(1, m, k, ta), operand(2, k, n, tb)
            got = cpu.matmul(a, b, bool(ta), bool(tb))
            assert_product(got, a.T if ta else a, b.T if tb else b)


@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("shape", [(1, 700, 131), (8, 300, 70), (9, 513, 40), (30, 257, 65), (250, 600, 100)])
def test_blocks_types_and_accumulation(isa, shape, dtype):
    m, k, n = shape
    for ta, tb in ((False, False), (False, True), (True, True), (True, False)):
        a, b = operand(3, m, k, ta), operand(4, k, n, tb, dtype)
        out = floats(5, m, n)
        before = out.copy()
        pa, pb = (a.T if ta else a), (b.T if tb else b)
        assert cpu.matmul(a, b, ta, tb, out=out, accumulate=True) is out
        assert_product(out, pa, pb, wide(before))
        cpu.matmul(a, b, ta, tb, out=out)
        assert_product(out, pa, pb)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_strides_batches_and_broadcasting(data):
    draw = data.draw
    m, k, n = (draw(st.integers(1, 40)) for _ in range(3))
    batch = draw(st.lists(st.integers(1, 3), max_size=3))

    def view(seed, rows, columns, dtype):
        own = [draw(st.sampled_from([size, 1])) for size in batch[draw(st.integers(0, len(batch))) :]]
        steps = [draw(st.sampled_from([1, 2, -1, -2])) for _ in range(len(own) + 2)]
        shape = [size * abs(step) for size, step in zip([*own, rows, columns], steps, strict=True)]
        swap = draw(st.booleans())
        if swap:
            shape[-1], shape[-2] = shape[-2], shape[-1]
            steps[-1], steps[-2] = steps[-2], steps[-1]
        x = floats(seed, *shape).astype(dtype)[tuple(slice(None, None, step) for step in steps)]
        return x.swapaxes(-1, -2) if swap else x

    a, b = view(1, m, k, np.float32), view(2, k, n, draw(st.sampled_from(WEIGHTS)))
    assert_product(cpu.matmul(a, b), a, b)
    assert_product(cpu.matmul(a.swapaxes(-1, -2), b.swapaxes(-1, -2), True, True), a, b)


def test_one_weight_for_a_batch_of_strided_rows(isa):
    x = floats(1, 3, 4, 5, 12)
    w = floats(2, 7, 12)
    for a in (x, x[:, ::2], x.transpose(1, 0, 2, 3), x[:, :, :1], np.broadcast_to(x[:, :1], x.shape)):
        assert_product(cpu.matmul(a, w, trans_b=True), a, w.T)


def test_misaligned_and_swapped_arrays(isa):
    raw = np.zeros(4 * 35 + 1, np.uint8)
    a = raw[1:].view(np.float32).reshape(5, 7)
    a[...] = floats(1, 5, 7)
    assert_product(cpu.matmul(a, a, trans_b=True), a, a.T)
    with pytest.raises(DTypeError, match="float32"):
        cpu.matmul(a.astype(">f4"), a, trans_b=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [1, 6, 40])
def test_a_special_value_reaches_its_row_and_column_alone(isa, m, value):
    a, b = np.abs(floats(1, m, 33)), np.abs(floats(2, 33, 37))
    for trans_b in (False, True):
        right = np.ascontiguousarray(b.T) if trans_b else b
        clean = cpu.matmul(a, right, trans_b=trans_b)
        row, column = a.copy(), right.copy()
        row[m // 2, 32] = value
        column[(36, 32) if trans_b else (32, 36)] = value
        got = cpu.matmul(row, right, trans_b=trans_b)
        np.testing.assert_array_equal(got[m // 2], np.full(37, value, np.float32))
        np.testing.assert_array_equal(np.delete(got, m // 2, 0), np.delete(clean, m // 2, 0))
        got = cpu.matmul(a, column, trans_b=trans_b)
        np.testing.assert_array_equal(got[:, 36], np.full(m, value, np.float32))
        np.testing.assert_array_equal(got[:, :36], clean[:, :36])


def test_denormals_survive(isa):
    tiny = np.full((40, 3), 1e-40, np.float32)
    one = np.ones((3, 20), np.float32)
    np.testing.assert_array_equal(cpu.matmul(tiny, one), np.full((40, 20), 3 * tiny[0, 0]))


@pytest.mark.parametrize("value", [0.0, 1e-8, 65504.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_every_kind_of_16_bit_number_widens_exactly(isa, dtype, value):
    b = np.full((1, 20), value, dtype)
    a = np.ones((30, 1), np.float32)
    np.testing.assert_array_equal(cpu.matmul(a, b), np.broadcast_to(b.astype(np.float32), (30, 20)))


def test_empty_dimensions(isa):
    assert cpu.matmul(np.zeros((0, 3), np.float32), np.zeros((3, 2), np.float32)).shape == (0, 2)
    assert cpu.matmul(np.zeros((2, 3), np.float32), np.zeros((3, 0), np.float32)).shape == (2, 0)
    nothing = cpu.matmul(np.zeros((4, 2, 0), np.float32), np.zeros((0, 5), np.float32))
    np.testing.assert_array_equal(nothing, np.zeros((4, 2, 5)))
    kept = np.ones((2, 5), np.float32)
    cpu.matmul(np.zeros((2, 0), np.float32), np.zeros((0, 5), np.float32), out=kept, accumulate=True)
    np.testing.assert_array_equal(kept, np.ones((2, 5)))
    assert cpu.matmul(np.zeros((0, 2, 3), np.float32), np.zeros((3, 2), np.float32)).shape == (0, 2, 2)


@pytest.mark.parametrize("shape", [(1, 2000, 600), (300, 300, 300), (40, 700, 1200), (1000, 300, 9)])
def test_bits_do_not_depend_on_threads(isa, same_on_any_threads, shape):
    m, k, n = shape
    a, b = floats(1, m, k), floats(2, k, n)
    flipped = np.ascontiguousarray(b.T)
    same_on_any_threads(lambda: cpu.matmul(a, b))
    same_on_any_threads(lambda: cpu.matmul(a, flipped, trans_b=True))


def test_bits_of_a_batch_do_not_depend_on_threads(isa, same_on_any_threads):
    a, b = floats(1, 5, 64, 70), floats(2, 5, 70, 90)
    same_on_any_threads(lambda: cpu.matmul(a, b))


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_nothing_beyond_the_arrays_is_read_or_written(isa, dtype):
    for m, k, n in ((1, 1, 1), (1, 37, 5), (7, 19, 33), (31, 5, 47)):
        for ta in (False, True):
            for tb in (False, True):
                a, b = guarded(operand(1, m, k, ta)), guarded(operand(2, k, n, tb, dtype))
                out = guarded(np.zeros((m, n), np.float32))
                cpu.matmul(a, b, ta, tb, out=out)
                assert_product(out, a.T if ta else a, b.T if tb else b)


@pytest.mark.tier1
def test_shapes_that_do_not_fit_are_named():
    a, b = np.zeros((2, 3), np.float32), np.zeros((4, 5), np.float32)
    with pytest.raises(ShapeError, match=r"matmul.*\(2, 3\).*\(4, 5\)"):
        cpu.matmul(a, b)
    with pytest.raises(ShapeError, match="batch"):
        cpu.matmul(np.zeros((2, 3, 4), np.float32), np.zeros((5, 4, 3), np.float32))
    with pytest.raises(ShapeError, match="2 to 8 dimensions"):
        cpu.matmul(a[0], b)
    with pytest.raises(ShapeError, match="out has shape"):
        cpu.matmul(a, a, trans_b=True, out=np.zeros((3, 3), np.float32))


@pytest.mark.tier1
def test_arrays_that_can_not_serve_are_refused():
    a = np.zeros((3, 3), np.float32)
    with pytest.raises(DTypeError, match="not float64"):
        cpu.matmul(a.astype(np.float64), a)
    with pytest.raises(DTypeError, match="not int32"):
        cpu.matmul(a, a.astype(np.int32))
    with pytest.raises(DTypeError, match="not list"):
        cpu.matmul(a, [[1.0]])
    with pytest.raises(ShapeError, match="contiguous"):
        cpu.matmul(a, a, out=np.zeros((6, 3), np.float32)[::2])
    frozen = np.zeros((3, 3), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(DTypeError, match="read-only"):
        cpu.matmul(a, a, out=frozen)
    with pytest.raises(UsageError, match="overlaps"):
        cpu.matmul(a, a, out=a)
    with pytest.raises(UsageError, match="accumulate"):
        cpu.matmul(a, a, accumulate=True)


def test_results_are_aligned():
    for n in (1, 3, 1000):
        assert cpu.matmul(floats(1, n, 2), floats(2, 2, n)).ctypes.data % 64 == 0


def test_memory_that_runs_out_is_an_error_and_leaves_no_harm(isa):
    # Shapes that need more scratch than any test before, so that it has to grow.
    _native._set_isa(isa)
    threads = backend.get_num_threads()
    backend.set_num_threads(1)
    try:
        a, b = floats(1, 40, 50), floats(2, 50, 3000 + len(isa) * 1000)
        failures = 0
        for nth in range(1, 10):
            _native._fail_allocation(nth)
            try:
                cpu.matmul(a, b)
            except MemoryError:
                failures += 1
            else:
                break
            finally:
                _native._fail_allocation(0)
        assert failures >= 1
        assert_product(cpu.matmul(a, b), a, b)
    finally:
        backend.set_num_threads(threads)


@pytest.mark.parametrize("dtype", WEIGHTS)
def test_few_columns_are_dot_products_of_rows(isa, dtype, same_on_any_threads):
    for m, k, n in ((40, 64, 1), (33, 130, 5), (50, 257, 16), (7, 300, 9)):
        wider = floats(1, m, k + 3)[:, :k]
        for tb in (False, True):
            b = operand(2, k, n, tb, dtype)
            out = floats(3, m, n)
            before = wide(out)
            cpu.matmul(wider, b, trans_b=tb, out=out, accumulate=True)
            assert_product(out, wider, b.T if tb else b, before)
    a, b = floats(1, 5000, 300), floats(2, 300, 7).astype(dtype)
    same_on_any_threads(lambda: cpu.matmul(a, b))
