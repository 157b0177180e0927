"""Attention against softmax in float64, forward and backward: tails, groups, windows, packed sequences, caches."""

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from kernels.guard import guarded

from entrenar import _native, backend
from entrenar.backend import cpu
from entrenar.errors import DTypeError, ShapeError, UsageError


def mask(b, t, s, causal, window, starts):
    position = np.arange(s - t, s)[:, None]
    key = np.arange(s)[None]
    seen = np.ones((t, s), bool)
    if causal:
        seen &= key <= position
    if window:
        seen &= key > position - window
    seen = np.broadcast_to(seen, (b, t, s)).copy()
    if starts is not None:
        seen &= key[None] >= starts[:, :, None]
    return seen[:, None]


def reference(q, k, v, g, scale, causal, window, starts):
    """o, lse, dq, dk, dv in float64."""
    group = q.shape[2] // k.shape[2]
    q, g = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (q, g))
    k, v = (np.repeat(x.astype(np.float64), group, 2).transpose(0, 2, 1, 3) for x in (k, v))
    b, _, t, _ = q.shape
    s = k.shape[2]
    scores = np.where(mask(b, t, s, causal, window, starts), q @ k.swapaxes(-1, -2) * scale, -np.inf)
    top = scores.max(-1, keepdims=True)
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True)
    p = e / total
    o = p @ v
    dp = g @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale

    def grouped(x):
        return x.reshape(b, -1, group, *x.shape[2:]).sum(2)

    outs = o, ds @ k, grouped(ds.swapaxes(-1, -2) @ q), grouped(p.swapaxes(-1, -2) @ g)
    o, dq, dk, dv = (x.transpose(0, 2, 1, 3) for x in outs)
    return o, (top + np.log(total))[..., 0], dq, dk, dv


BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
# Largest error over the largest value (or 1). f32: sums of up to some hundred products. bf16: weights, gradients of
# scores and results are each rounded, by up to 2^-8 of themselves; three such errors met along the way to dq and dk.
BOUND = {F32: 1e-5, BF16: 3 * 2**-8}
# Where scores are of order 8: the softmax is peaked, large numbers cancel in dP - D, and D is made of the rounded o.
PEAKED = {F32: 1e-4, BF16: 0.15}

both_types = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def error(got, want):
    return np.abs(got.astype(np.float64) - want).max() / max(1.0, np.abs(want).max())


def close(got, want, bound=1e-5):
    return error(got, want) <= bound


def draw(rng, dtype, *shapes):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def assert_attention(q, k, v, g, scale, causal=True, window=0, starts=None, into=None):
    """Both directions against float64; o, lse and the gradients."""
    o, lse = cpu.attention(q, k, v, scale, causal, window, starts)
    grads = cpu.attention_backward(g, q, k, v, o, lse, scale, causal, window, starts, into)
    want_o, want_lse, *want = reference(q, k, v, g, scale, causal, window, starts)
    assert lse.dtype == np.float32
    assert close(lse, want_lse)
    for got, exact in zip((o, *grads), (want_o, *want), strict=True):
        assert got.dtype == q.dtype
        assert close(got, exact, BOUND[q.dtype])
    return o, lse, *grads


CASES = [
    # b, t, s, h, hkv, d, causal, window, packed
    (1, 1, 1, 1, 1, 2, True, 0, False),
    (2, 7, 7, 4, 2, 6, True, 0, False),
    (1, 33, 33, 3, 1, 80, True, 5, False),
    (2, 65, 65, 2, 2, 64, True, 0, True),
    (1, 130, 130, 2, 1, 16, True, 40, True),
    (1, 300, 300, 2, 1, 96, True, 0, False),
    (1, 257, 600, 2, 2, 10, True, 0, False),
    (1, 1, 519, 8, 4, 64, True, 0, False),
    (2, 3, 300, 2, 1, 128, True, 260, False),
    (1, 9, 1100, 7, 1, 64, True, 700, True),
    (1, 140, 140, 2, 2, 34, False, 0, False),
    (1, 90, 290, 3, 3, 33, False, 150, False),
    (1, 515, 515, 5, 1, 20, True, 0, True),
]


def sequences(rng, b, t, s):
    """starts of packed sequences, none after the query itself."""
    starts = np.sort(rng.integers(0, s, (b, t)), 1)
    return np.minimum(starts, np.arange(s - t, s)).astype(np.int32)


@both_types
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_directions_agree_with_float64(isa, case, dtype):
    b, t, s, h, hkv, d, causal, window, packed = case
    rng = np.random.default_rng(t * 1000 + d)
    q, g, k, v = draw(rng, dtype, *[(b, t, h, d)] * 2, *[(b, s, hkv, d)] * 2)
    assert_attention(q, k, v, g, d**-0.5, causal, window, sequences(rng, b, t, s) if packed else None)


@both_types
def test_every_length_from_1_to_65(isa, dtype):
    rng = np.random.default_rng(0)
    for t in range(1, 66):
        s, d = t + t * 7 % 66, 2 * (t % 9) + 1 + t % 2
        q, g, k, v = draw(rng, dtype, *[(1, t, 2, d)] * 2, *[(1, s, 1, d)] * 2)
        assert_attention(q, k, v, g, 0.5)


@both_types
def test_head_sizes(isa, dtype):
    rng = np.random.default_rng(1)
    for d in (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 40, 48, 63, 65, 72, 79, 95, 97, 112, 127, 129, 130, 256):
        q, g, k, v = draw(rng, dtype, *[(1, 11, 3, d)] * 2, *[(1, 13, 1, d)] * 2)
        assert_attention(q, k, v, g, d**-0.5)


@both_types
def test_peaked_softmax_at_scale_1(isa, dtype):
    rng = np.random.default_rng(13)
    q, g, k, v = draw(rng, dtype, *[(1, 200, 4, 64)] * 2, *[(1, 200, 2, 64)] * 2)
    o, lse = cpu.attention(q, k, v, 1.0)
    grads = cpu.attention_backward(g, q, k, v, o, lse, 1.0)
    want_o, _, *want = reference(q, k, v, g, 1.0, True, 0, None)
    for got, exact in zip((o, *grads), (want_o, *want), strict=True):
        assert close(got, exact, PEAKED[dtype])


def test_scores_far_apart_neither_overflow_nor_vanish(isa):
    rng = np.random.default_rng(1)
    q, k, v, g = draw(rng, F32, *[(1, 300, 1, 8)] * 4)
    q *= 100
    k *= np.linspace(1, 30, 300, dtype=np.float32)[:, None, None]  # the maximum moves from block to block
    o, lse = cpu.attention(q, k, v, 1.0)
    want_o, want_lse, *_ = reference(q, k, v, g, 1.0, True, 0, None)
    assert np.isfinite(o).all()
    assert close(o, want_o, 1e-2)  # scores of order 1e4 carry rounding of order 1e-3
    assert close(lse, want_lse)


@both_types
def test_a_cache_slice_is_read_where_it_lies(isa, dtype):
    rng = np.random.default_rng(2)
    cache, q = draw(rng, dtype, (2, 40, 2, 16), (2, 3, 4, 16))
    part = cache[:, :21]
    o, lse = cpu.attention(q, part, part, 0.25)
    want_o, want_lse = cpu.attention(q, part.copy(), part.copy(), 0.25)
    assert np.array_equal(o, want_o)
    assert np.array_equal(lse, want_lse)


@both_types
@pytest.mark.parametrize("heads", [(4, 2), (2, 1), (5, 5)], ids=str)
def test_bits_do_not_depend_on_threads(isa, same_on_any_threads, dtype, heads):
    """Key heads are shared by several tasks here, and there are more than tasks."""
    rng = np.random.default_rng(3)
    h, hkv = heads
    t = 700 // h
    q, g, k, v = draw(rng, dtype, *[(2, t, h, 32)] * 2, *[(2, t, hkv, 32)] * 2)
    starts = np.maximum(np.arange(t, dtype=np.int32) // 50 * 50 - 20, 0)[None].repeat(2, 0)

    def both():
        o, lse = cpu.attention(q, k, v, 0.2, True, 0, starts)
        return o, lse, *cpu.attention_backward(g, q, k, v, o, lse, 0.2, True, 0, starts)

    same_on_any_threads(both)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_key_that_is_not_finite_reaches_just_the_rows_that_see_it(isa, bad):
    rng = np.random.default_rng(4)
    q, k, v = (np.abs(rng.standard_normal((1, 50, 1, 8))).astype(np.float32) for _ in range(3))
    clean, _ = cpu.attention(q, k, v, 0.3)
    k[0, 20, 0, 3] = bad
    o, _ = cpu.attention(q, k, v, 0.3)
    assert np.array_equal(o[0, :20], clean[0, :20])
    if bad == -np.inf:  # its probability is zero, as of a masked key
        assert np.isfinite(o).all()
    else:
        assert np.isnan(o[0, 20:]).all()


def test_impossible_operands_are_typed_errors():
    q, k = np.zeros((1, 4, 4, 8), np.float32), np.zeros((1, 4, 3, 8), np.float32)
    with pytest.raises(ShapeError, match="H a multiple of Hkv"):
        cpu.attention(q, k, k, 1.0)
    with pytest.raises(ShapeError):
        cpu.attention(q, q[:, :3], q[:, :3], 1.0)
    with pytest.raises(UsageError, match="window"):
        cpu.attention(q, q, q, 1.0, True, -1)
    with pytest.raises(UsageError, match="scale"):
        cpu.attention(q, q, q, -1.0)
    for starts in ([[0, 2, 0, 0]], [[-1, 0, 0, 0]]):
        with pytest.raises(UsageError, match="starts"):
            cpu.attention(q, q, q, 1.0, True, 0, np.array(starts, np.int32))


@both_types
def test_nothing_beyond_the_arrays_is_read_or_written(isa, dtype):
    rng = np.random.default_rng(5)
    sizes = (1, 1, 1, 1, 1), (1, 600, 7, 1, 10), (5, 9, 4, 2, 6), (33, 40, 3, 3, 33), (70, 131, 2, 1, 17)
    for t, s, h, hkv, d in sizes:
        shapes = [(1, t, h, d)] * 2 + [(1, s, hkv, d)] * 2
        q, g, k, v = (guarded(x) for x in draw(rng, dtype, *shapes))
        into = [guarded(x) for x in draw(rng, dtype, shapes[0], *shapes[2:])]
        o, lse = (guarded(x) for x in cpu.attention(q, k, v, 0.3))
        grads = cpu.attention_backward(g, q, k, v, o, lse, 0.3, into=into)
        want_o, _, *want = reference(q, k, v, g, 0.3, True, 0, None)
        for got, exact in zip((o, *grads), (want_o, *want), strict=True):
            assert close(got, exact, BOUND[dtype])


@both_types
def test_numbers_of_an_earlier_call_reach_no_result(isa, dtype):
    """Scratch is kept from call to call, and what fills blocks up must be zero: here all of it was NaN before."""
    rng = np.random.default_rng(13)
    threads = backend.get_num_threads()
    backend.set_num_threads(1)
    try:
        sizes = (1, 3, 1, 1, 1), (1, 519, 2, 1, 80), (9, 33, 3, 1, 17), (45, 45, 1, 1, 64), (70, 71, 2, 2, 40)
        for t, s, h, hkv, d in sizes:
            nan = np.full((1, 600, 4, 96), np.nan, dtype)
            o, lse = cpu.attention(nan, nan, nan, 0.3)
            cpu.attention_backward(nan, nan, nan, nan, o, lse, 0.3)
            cpu.attention(nan[:, :1], nan, nan, 0.3)
            q, g, k, v = draw(rng, dtype, *[(1, t, h, d)] * 2, *[(1, s, hkv, d)] * 2)
            assert_attention(q, k, v, g, d**-0.5)
    finally:
        backend.set_num_threads(threads)


@pytest.mark.parametrize("d", [64, 80, 96, 128])
def test_bf16_is_close_to_the_exact_result_of_its_inputs_wherever_a_block_begins(isa, d):
    """Windows and packed sequences begin at any key, also inside what the level multiplies at once."""
    rng = np.random.default_rng(d)
    for t, s, window, first in ((33, 97, 0, 31), (64, 200, 63, 0), (31, 190, 33, 129), (70, 161, 0, 90)):
        q, g, k, v = draw(rng, BF16, *[(2, t, 4, d)] * 2, *[(2, s, 2, d)] * 2)
        assert_attention(q, k, v, g, d**-0.5, True, window, np.full((2, t), first, np.int32))


def test_tokens_that_end_at_a_forbidden_page(isa):
    """Parts of one array, at a token stride, the last of them at its end."""
    rng = np.random.default_rng(8)
    for dtype in (F32, BF16):
        for d in (5, 16, 34):
            qkv, grads = (guarded(x).reshape(1, 19, 4, d) for x in draw(rng, dtype, *[(1, 19, 4 * d)] * 2))
            (g,) = draw(rng, dtype, (1, 19, 2, d))
            cuts = [(slice(None), slice(None), slice(*ends)) for ends in ((0, 2), (2, 3), (3, 4))]
            assert_attention(*(qkv[c] for c in cuts), g, 0.3, into=[grads[c] for c in cuts])


@both_types
def test_memory_that_runs_out_is_an_error_and_leaves_no_harm(isa, dtype):
    rng = np.random.default_rng(9)
    threads = backend.get_num_threads()
    q, g, k, v = draw(rng, dtype, *[(1, 300, 2, 100)] * 2, *[(1, 600, 1, 100)] * 2)
    one = q[:, :1]

    def failures(call):
        count = 0
        for nth in range(1, 20):
            _native._fail_allocation(nth)
            try:
                call()
            except MemoryError:
                count += 1
            else:
                break
            finally:
                _native._fail_allocation(0)
        return count

    backend.set_num_threads(1)
    try:
        o, lse = cpu.attention(q, k, v, 0.1)
        calls = [
            lambda: cpu.attention(q, k, v, 0.1),
            lambda: cpu.attention(one, k, v, 0.1),
            lambda: cpu.attention_backward(g, q, k, v, o, lse, 0.1),
        ]
        for call in calls:
            with ThreadPoolExecutor(1) as fresh:  # its scratch has to grow
                assert 4 <= fresh.submit(failures, call).result() < 19
        assert_attention(q, k, v, g, 0.1)
    finally:
        backend.set_num_threads(threads)


@both_types
def test_parts_of_one_array_are_read_and_written_where_they_lie(isa, dtype):
    rng = np.random.default_rng(6)
    b, t, h, hkv, d = 2, 37, 6, 2, 24
    qkv, grads = (rng.standard_normal((b, t, (h + 2 * hkv) * d)).astype(dtype) for _ in range(2))
    g = rng.standard_normal((b, t, h, d)).astype(dtype)

    def parts(x):
        heads = x.reshape(b, t, h + 2 * hkv, d)
        return heads[:, :, :h], heads[:, :, h : h + hkv], heads[:, :, h + hkv :]

    q, k, v = parts(qkv)
    o, lse = cpu.attention(q, k, v, 0.2)
    want_o, want_lse = cpu.attention(q.copy(), k.copy(), v.copy(), 0.2)
    assert o.dtype == dtype
    assert lse.dtype == np.float32
    assert np.array_equal(o, want_o)
    assert np.array_equal(lse, want_lse)
    into = parts(grads)
    got = cpu.attention_backward(g, q, k, v, o, lse, 0.2, into=into)
    want = cpu.attention_backward(g, q.copy(), k.copy(), v.copy(), o, lse, 0.2)
    for x, y, z in zip(got, into, want, strict=True):
        assert x is y
        assert np.array_equal(x, z)
    want_o, want_lse, *want = reference(q, k, v, g, 0.2, True, 0, None)
    assert close(lse, want_lse)
    for x, y in zip((o, *got), (want_o, *want), strict=True):
        assert close(x, y, BOUND[dtype])


def test_results_are_not_written_where_they_cannot_lie():
    x = np.zeros((1, 4, 2, 8), np.float32)
    o, lse = cpu.attention(x, x, x, 1.0)
    for bad in (x[:, :3], x[..., ::-1], np.broadcast_to(np.zeros((1, 1, 2, 8), np.float32), x.shape)):
        with pytest.raises((ShapeError, DTypeError)):
            cpu.attention_backward(x, x, x, x, o, lse, 1.0, into=(x.copy(), bad, x.copy()))
    with pytest.raises(DTypeError, match="one type"):
        cpu.attention(x, x.astype(ml_dtypes.bfloat16), x, 1.0)
    with pytest.raises(DTypeError, match="float16"):
        cpu.attention(x.astype(np.float16), x, x, 1.0)


@both_types
@pytest.mark.parametrize("s", [513, 1024, 1500])
def test_few_queries_over_pieces_of_a_long_cache(isa, same_on_any_threads, s, dtype):
    rng = np.random.default_rng(s)
    for t in (1, 5, 21, 22):  # a block of rows, several, and where rows are no longer few
        q, k, v = draw(rng, dtype, (2, t, 6, 16), *[(2, s, 2, 16)] * 2)
        for window, first in ((0, 0), (100, 0), (0, 700 % s), (s - 1, 3)):
            starts = np.full((2, t), first, np.int32)
            o, lse = cpu.attention(q, k, v, 0.25, True, window, starts)
            want_o, want_lse, *_ = reference(q, k, v, q, 0.25, True, window, starts)
            assert close(o, want_o, BOUND[dtype])
            assert close(lse, want_lse)
        same_on_any_threads(lambda q=q, k=k, v=v: cpu.attention(q, k, v, 0.25))


@both_types
def test_a_sequence_has_the_bits_it_has_alone(isa, dtype):
    """Packed behind others, at a block's beginning, it sees just itself."""
    rng = np.random.default_rng(10)
    q, k, v = draw(rng, dtype, *[(1, 256 + 70, 2, 32)] * 3)
    starts = np.repeat(np.array([[0, 128, 256]], np.int32), [128, 128, 70], 1)
    o, lse = cpu.attention(q, k, v, 0.2, True, 0, starts)
    alone, alone_lse = cpu.attention(q[:, 256:], k[:, 256:], v[:, 256:], 0.2)
    assert np.array_equal(o[:, 256:], alone)
    assert np.array_equal(lse[..., 256:], alone_lse)


def test_what_is_not_finite_stays_in_the_rows_that_see_it_backwards(isa):
    rng = np.random.default_rng(11)
    for dtype in (F32, BF16):
        q, k, v, g = draw(rng, dtype, *[(1, 150, 1, 8)] * 4)
        o, lse = cpu.attention(q, k, v, 0.3)
        clean = cpu.attention_backward(g, q, k, v, o, lse, 0.3)
        g[0, 70, 0, 3] = np.nan
        dq, dk, dv = cpu.attention_backward(g, q, k, v, o, lse, 0.3)
        assert np.array_equal(np.delete(dq, 70, 1), np.delete(clean[0], 70, 1))
        for x, y in zip((dk, dv), clean[1:], strict=True):
            assert np.array_equal(x[:, 128:], y[:, 128:])  # keys that no row of its block sees
        assert np.isnan(dq[0, 70].astype(np.float32)).all()
        assert np.isnan(dv[0, :71, 0, 3].astype(np.float32)).all()
        g[0, 70, 0, 3] = 0
        clean = cpu.attention_backward(g, q, k, v, o, lse, 0.3)
        v[0, 100, 0, 5] = np.nan
        dq, _, dv = cpu.attention_backward(g, q, k, v, o, lse, 0.3)
        assert np.array_equal(dq[:, :100], clean[0][:, :100])  # queries that don't see it, some in its block
        assert np.array_equal(dv, clean[2])
        assert np.isnan(dq[0, 100:].astype(np.float32)).all()


def test_its_work_is_that_of_the_scores_it_needs():
    rng = np.random.default_rng(12)
    q, k, v = draw(rng, BF16, (2, 5, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    for causal, window, starts in ((True, 0, None), (False, 3, None), (True, 4, np.arange(10).reshape(2, 5) // 3)):
        scores = 4 * mask(2, 5, 9, causal, window, starts).sum()
        cpu.profile_start()
        o, lse = cpu.attention(q, k, v, 1.0, causal, window, starts)
        cpu.attention_backward(o, q, k, v, o, lse, 1.0, causal, window, starts)
        (forward, backward), _ = cpu.profile_stop()
        heads, keys, sums = 2 * 2 * 5 * 4 * 8, 2 * 2 * 9 * 2 * 8, 4 * 2 * 5 * 4
        assert forward[3:5] == (4 * scores * 8, 2 * heads + 2 * keys + sums)
        assert backward[3:5] == (10 * scores * 8, 4 * heads + 4 * keys + sums)
        assert forward[5] == backward[5] == ("bf16" if cpu.fast_bf16() else "f32")
