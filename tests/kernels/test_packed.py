"""Products with packed weights: every type, level, layout and tail against those of the expanded weight."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from kernels.checks import floats, wide
from kernels.guard import guarded

from entrenar import _native, backend, quant
from entrenar.backend import cpu
from entrenar.errors import ShapeError, UsageError

BF16 = ml_dtypes.bfloat16
FAST = ["nf4", "nf4-f32", "fp4", "fp4-f32", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "iq4_nl"]
PLAIN = ["q2_k", "q3_k", "iq4_xs"]


def weight(name, rows, columns, seed=1):
    """Quantized random numbers, some blocks of which are larger, smaller or zero."""
    w = floats(seed, rows, columns, scale=0.05)
    w[rows // 2 :, : columns // 3] *= 1e-3
    w[: rows // 3, columns // 2 :] *= 40
    w[-1, :3] = 0
    return quant.quantize(w, name)


def expanded(q, x):
    """The weight as the kernel multiplies it: f32, or rounded to bf16 once."""
    return q.dense(BF16 if x.dtype == BF16 and cpu.fast_bf16() else np.float32)


def assert_product(got, terms):
    want, size = np.zeros(got.shape), np.zeros(got.shape)
    rounds = terms[0][0].dtype == BF16 and cpu.fast_bf16()
    for a, b, *n0 in terms:
        a, b = (wide(x.astype(BF16)) if rounds else wide(x) for x in (a, b))
        at = n0[0] if n0 else 0
        want[:, at : at + b.shape[1]] += a @ b
        size[:, at : at + b.shape[1]] += np.abs(a) @ np.abs(b)
    bound = 2e-6 * size + 1e-37
    if got.dtype == BF16:
        bound += np.abs(want) * 2**-8
    assert (np.abs(wide(got) - want) <= bound).all()


def both_ways(q, m, dtype, out_type=np.float32):
    """Forward, x·Wᵀ, and back, g·W, with packed weights; and the terms with expanded ones."""
    rows, columns = q.shape
    x, g = floats(2, m, columns).astype(dtype), floats(3, m, rows).astype(dtype)
    dense = expanded(q, x)
    for a, packed, b in ((x, q.data.T, dense.T), (g, q.data, dense)):
        out = np.full((m, b.shape[1]), np.nan, out_type)
        yield cpu.product([(a, packed)], out), [(a, b)]


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("name", FAST + PLAIN)
def test_products_have_the_bits_of_the_expanded_weight(isa, name, dtype):
    sizes = [(1, 3, 256), (5, 37, 512), (21, 70, 768), (40, 100, 1536)]
    if quant.QTYPES[name].flat:
        sizes += [(3, 5, 7), (20, 33, 77), (31, 90, 100), (17, 40, 1301)]  # rows that begin inside blocks
    elif quant.QTYPES[name].block == 32:
        sizes += [(2, 9, 32), (20, 45, 96), (33, 70, 1376)]
    if name in PLAIN:
        sizes = sizes[:3]
    for m, rows, columns in sizes:
        q = weight(name, rows, columns)
        for back, (got, terms) in enumerate(both_ways(q, m, dtype)):
            want = cpu.product(terms, np.empty_like(got))
            if not back or (m > 8 and columns > 16):  # with fewer, a plain weight is summed in another order
                np.testing.assert_array_equal(got, want)
            assert_product(got, terms)


@pytest.mark.parametrize("name", [name for name in FAST if not quant.QTYPES[name].flat])
def test_any_bytes_are_the_numbers_they_stand_for(isa, name):
    """Scales that are infinite, NaN, denormal and zero among them; rows and columns in whole panels."""
    rows, columns = 64, 512
    row = quant.QTYPES[name]
    raw = np.random.default_rng(3).integers(0, 256, row.nbytes(rows * columns), np.uint8).reshape(-1, row.bytes)
    scales = np.array([0, 1, 0x3FF, 0x8001, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01, 0x3C00], np.uint16)
    places = {"q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "q4_1": (0, 2), "q5_1": (0, 2)}.get(name, (0,))
    for i, at in enumerate(places):
        some = np.resize(np.roll(scales, i), (len(raw) + 1) // 2)
        raw[::2, at : at + 2] = some.view(np.uint8).reshape(-1, 2)
    q = quant.QTensor(row, (rows, columns), raw.reshape(-1))
    with np.errstate(all="ignore"):
        for back, (got, terms) in enumerate(both_ways(q, 24, BF16)):
            np.testing.assert_array_equal(got, cpu.product(terms, np.empty_like(got)), err_msg=f"back {back}")


@pytest.mark.parametrize("name", ["nf4", "q4_k"])
@pytest.mark.parametrize("shape", [(300, 90, 8192), (1100, 530, 512)], ids=["deep", "tall"])
def test_operands_too_large_for_the_cache_are_multiplied_in_parts(isa, name, shape):
    m, rows, columns = shape
    q = weight(name, rows, columns)
    dtype = BF16 if cpu.fast_bf16() else np.float32
    for got, terms in both_ways(q, m, dtype, dtype):
        np.testing.assert_array_equal(got, cpu.product(terms, np.empty_like(got)))


@pytest.mark.parametrize("m", [1, 7, 30])
def test_packed_and_plain_terms_are_one_sum(isa, m):
    """q, k and v of different types, each with a low rank, and a bias; and the way back."""
    names, rows = ["q4_k", "q6_k", "nf4"], [70, 40, 33]
    qs = [weight(name, n, 512, seed=i) for i, (name, n) in enumerate(zip(names, rows, strict=True))]
    x, low = floats(9, m, 512).astype(BF16), floats(10, m, 12).astype(BF16)
    bs = [floats(11 + i, n, 4) for i, n in enumerate(rows)]
    begins = [0, 70, 110]
    loras = [(low[:, 4 * i : 4 * i + 4], b.T, at) for i, (b, at) in enumerate(zip(bs, begins, strict=True))]
    bias = floats(20, 143)
    packed = [(x, q.data.T, at) for q, at in zip(qs, begins, strict=True)] + loras
    got = cpu.product(packed, np.empty((m, 143), BF16), bias=bias)
    terms = [(x, expanded(q, x).T, at) for q, at in zip(qs, begins, strict=True)] + loras
    np.testing.assert_array_equal(got, cpu.product(terms, np.empty((m, 143), BF16), bias=bias))
    g = floats(30, m, 143).astype(BF16)
    back = [(g[:, at : at + q.shape[0]], q.data) for q, at in zip(qs, begins, strict=True)]
    plain = [(a, expanded(q, g)) for (a, _), q in zip(back, qs, strict=True)]
    more = (low, floats(31, 12, 512))
    assert_product(cpu.product([*back, more], np.empty((m, 512), np.float32)), [*plain, more])


@pytest.mark.parametrize("name", FAST)
def test_nothing_beyond_the_packed_bytes_is_read(isa, name):
    sizes = [(1, 5, 256), (12, 3, 512), (20, 64, 256), (20, 48, 512)]
    if quant.QTYPES[name].flat:
        sizes.append((9, 3, 75))
    for m, rows, columns in sizes:
        q = weight(name, rows, columns)
        raw = guarded(q.bytes)
        assert raw.ctypes.data % 4 == 0 or not q.qtype.flat  # else it would be copied
        packed = cpu.Packed(name, raw, q.shape)
        for dtype in (np.float32, BF16):
            x, g = floats(2, m, columns).astype(dtype), floats(3, m, rows).astype(dtype)
            dense = expanded(q, x)
            assert_product(cpu.product([(x, packed.T)], np.empty((m, rows), np.float32)), [(x, dense.T)])
            assert_product(cpu.product([(g, packed)], np.empty((m, columns), np.float32)), [(g, dense)])


@pytest.mark.parametrize("name", ["nf4", "q6_k"])
def test_bits_do_not_depend_on_threads(isa, same_on_any_threads, name):
    q = weight(name, 600, 1024)
    for m in (1, 8, 100):
        x, g = floats(2, m, 1024).astype(BF16), floats(3, m, 600).astype(BF16)
        same_on_any_threads(lambda x=x, m=m: cpu.product([(x, q.data.T)], np.empty((m, 600), BF16)))
        same_on_any_threads(lambda g=g, m=m: cpu.product([(g, q.data)], np.empty((m, 1024), BF16)))


def test_memory_that_runs_out_is_an_error_and_leaves_no_harm(isa):
    q, x = weight("nf4", 300, 5000), floats(2, 2, 5000).astype(BF16)
    out = np.empty((2, 300), np.float32)

    def failures():
        count = 0
        for nth in range(1, 6):
            _native._fail_allocation(nth)
            try:
                cpu.product([(x, q.data.T)], out)
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
        assert_product(cpu.product([(x, q.data.T)], out), [(x, expanded(q, x).T)])
    finally:
        backend.set_num_threads(threads)


@pytest.mark.tier1
def test_a_packed_matrix_knows_its_shape_and_what_does_not_fit_is_named():
    q = weight("q4_0", 6, 64)
    assert (q.data.shape, q.data.T.shape, q.data.T.T.shape) == ((6, 64), (64, 6), (6, 64))
    assert q.data.nbytes == q.nbytes == 6 * 2 * 18
    with pytest.raises(ShapeError, match=r"\(6, 64\) of q4_0 takes 216 bytes, not 215"):
        cpu.Packed("q4_0", q.bytes[:-1], (6, 64))
    with pytest.raises(ShapeError, match="not whole blocks"):
        cpu.Packed("q4_0", q.bytes, (12, 16))
    with pytest.raises(ShapeError, match="no shape of a matrix"):
        cpu.Packed("q4_0", q.bytes, (1 << 40, 1 << 40))
    with pytest.raises(UsageError, match="no encoding 'q5'"):
        cpu.Packed("q5", q.bytes, (6, 64))
    with pytest.raises(UsageError, match="blocks of 64, not of 128"):
        _ = quant.quantize(floats(1, 4, 128), "nf4", block=128).data
    with pytest.raises(ShapeError, match=r"term 0 is \(3, 6\) times \(64, 6\)"):
        cpu.product([(np.zeros((3, 6), np.float32), q.data.T)], np.empty((3, 6), np.float32))
