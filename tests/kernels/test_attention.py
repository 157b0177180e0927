"""Attention against softmax in float64, forward and backward: tails, groups, windows, packed sequences, caches."""

import ml_dtypes
import numpy as np
import pytest
from kernels.guard import guarded

from entrenar import backend
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


def close(got, want, bound=1e-5):
    return np.abs(got - want).max() <= bound * max(1.0, np.abs(want).max())


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
    (1, 140, 140, 2, 2, 34, False, 0, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_directions_agree_with_float64(isa, case):
    b, t, s, h, hkv, d, causal, window, packed = case
    rng = np.random.default_rng(t * 1000 + d)
    q, g = (rng.standard_normal((b, t, h, d)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((b, s, hkv, d)).astype(np.float32) for _ in range(2))
    starts = None
    if packed:
        starts = np.sort(rng.integers(0, t, (b, t)), 1).astype(np.int32)
        starts = np.minimum(starts, np.arange(t, dtype=np.int32))
    scale = 1 / np.sqrt(d)
    o, lse = cpu.attention(q, k, v, scale, causal, window, starts)
    grads = cpu.attention_backward(g, q, k, v, o, lse, scale, causal, window, starts)
    for got, want in zip((o, lse, *grads), reference(q, k, v, g, scale, causal, window, starts), strict=True):
        assert close(got, want)


def test_every_length_from_1_to_65(isa):
    rng = np.random.default_rng(0)
    for t in range(1, 66):
        q, k, v, g = (rng.standard_normal((1, t, 1, 2 * (t % 9 + 1))).astype(np.float32) for _ in range(4))
        o, lse = cpu.attention(q, k, v, 0.5)
        grads = cpu.attention_backward(g, q, k, v, o, lse, 0.5)
        for got, want in zip((o, lse, *grads), reference(q, k, v, g, 0.5, True, 0, None), strict=True):
            assert close(got, want)


def test_scores_far_apart_neither_overflow_nor_vanish(isa):
    rng = np.random.default_rng(1)
    q, k, v, g = (rng.standard_normal((1, 300, 1, 8)).astype(np.float32) for _ in range(4))
    q *= 100
    k *= np.linspace(1, 30, 300, dtype=np.float32)[:, None, None]  # the maximum moves from block to block
    o, lse = cpu.attention(q, k, v, 1.0)
    want_o, want_lse, *_ = reference(q, k, v, g, 1.0, True, 0, None)
    assert np.isfinite(o).all()
    assert close(o, want_o, 1e-2)  # scores of order 1e4 carry rounding of order 1e-3
    assert close(lse, want_lse)


def test_a_cache_slice_is_read_where_it_lies(isa):
    rng = np.random.default_rng(2)
    cache = rng.standard_normal((2, 40, 2, 16)).astype(np.float32)
    q = rng.standard_normal((2, 3, 4, 16)).astype(np.float32)
    part = cache[:, :21]
    o, lse = cpu.attention(q, part, part, 0.25)
    want_o, want_lse = cpu.attention(q, part.copy(), part.copy(), 0.25)
    assert np.array_equal(o, want_o)
    assert np.array_equal(lse, want_lse)


def test_bits_do_not_depend_on_threads(isa):
    rng = np.random.default_rng(3)
    q, g = (rng.standard_normal((2, 290, 4, 32)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((2, 290, 2, 32)).astype(np.float32) for _ in range(2))
    before, results = backend.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            backend.set_num_threads(threads)
            o, lse = cpu.attention(q, k, v, 0.2)
            results.append((o, lse, *cpu.attention_backward(g, q, k, v, o, lse, 0.2)))
    finally:
        backend.set_num_threads(before)
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


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


def test_nothing_beyond_the_arrays_is_read_or_written(isa):
    rng = np.random.default_rng(5)
    for t, s, h, hkv, d in ((1, 1, 1, 1, 2), (1, 600, 7, 1, 10), (5, 9, 4, 2, 6), (33, 40, 3, 3, 34)):
        q, g = (guarded(rng.standard_normal((1, t, h, d)), np.float32) for _ in range(2))
        k, v = (guarded(rng.standard_normal((1, s, hkv, d)), np.float32) for _ in range(2))
        o, lse = (guarded(x) for x in cpu.attention(q, k, v, 0.3))
        grads = cpu.attention_backward(g, q, k, v, o, lse, 0.3)
        for got, want in zip((o, lse, *grads), reference(q, k, v, g, 0.3, True, 0, None), strict=True):
            assert close(got, want)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
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
    bound = 1e-5 if dtype == np.float32 else 2e-2
    for x, y in zip((o, lse, *got), reference(q, k, v, g, 0.2, True, 0, None), strict=True):
        assert close(x, y, bound)


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


@pytest.mark.parametrize("s", [513, 1024, 1500])
def test_one_query_over_pieces_of_a_long_cache(isa, same_on_any_threads, s):
    rng = np.random.default_rng(s)
    q = rng.standard_normal((2, 1, 6, 16)).astype(np.float32)
    k, v = (rng.standard_normal((2, s, 2, 16)).astype(np.float32) for _ in range(2))
    for window, first in ((0, 0), (100, 0), (0, 700 % s), (s - 1, 3)):
        starts = np.full((2, 1), first, np.int32)
        o, lse = cpu.attention(q, k, v, 0.25, True, window, starts)
        want_o, want_lse, *_ = reference(q, k, v, q, 0.25, True, window, starts)
        assert close(o, want_o)
        assert close(lse, want_lse)
    same_on_any_threads(lambda: cpu.attention(q, k, v, 0.25))
