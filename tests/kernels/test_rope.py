"""Rotary embedding: both pairings, partial rotation, tables per batch, the inverse."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.checks import BF16, FLOWS, assert_close, floats, wide
from kernels.guard import guarded

from entrenar import _native
from entrenar.errors import DTypeError, ShapeError


def rotated(x, cos, sin, interleaved):
    """Pairs as complex numbers, turned."""
    half = cos.shape[-1]
    out = wide(x).copy()
    first = np.s_[..., 0 : 2 * half : 2] if interleaved else np.s_[..., :half]
    second = np.s_[..., 1 : 2 * half : 2] if interleaved else np.s_[..., half : 2 * half]
    turn = (wide(cos) + 1j * wide(sin))[..., :, None, :]
    z = (out[first] + 1j * out[second]) * turn
    out[first], out[second] = z.real, z.imag
    return out


def angles(seed: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    theta = floats(seed, *shape, scale=100)
    return np.cos(theta), np.sin(theta)


@pytest.mark.tier1
@pytest.mark.parametrize("dtype", FLOWS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_turns_pairs(isa: str, interleaved: bool, dtype: type) -> None:
    for d in [2, 4, 6, 10, 16, 34, 64, 80, 96, 130, 300]:
        for rot in {2, d // 4 * 2 or 2, d}:
            x = floats(d, 2, 3, 5, d).astype(dtype)
            for table in [(3, rot // 2), (2, 3, rot // 2)]:
                cos, sin = angles(rot, *table)
                y = _native.rope(guarded(x), guarded(cos), guarded(sin), interleaved)
                assert_close(y, rotated(x, cos, sin, interleaved), rel=2e-7, dtype=dtype)
                np.testing.assert_array_equal(y[..., rot:], x[..., rot:])
                back = _native.rope(y, cos, sin, interleaved, inverse=True)
                assert_close(back, rotated(y, cos, -sin, interleaved), rel=2e-7, dtype=dtype)


@pytest.mark.tier1
@pytest.mark.parametrize("dtype", FLOWS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_in_place_turns_some_heads_of_rows_and_leaves_the_others(isa: str, interleaved: bool, dtype: type) -> None:
    for d, h, rest in [(6, 3, 5), (34, 2, 0), (64, 4, 64)]:
        rows = guarded(floats(d, 2, 7, rest + h * d).astype(dtype))
        cos, sin = angles(1, 7, d // 2)
        before = rows.copy()
        x = rows[:, :, rest:].reshape(2, 7, h, d)  # the last heads: they end at the forbidden page
        assert np.shares_memory(x, rows)
        want = _native.rope(x, cos, sin, interleaved)
        assert _native.rope_(x, cos, sin, interleaved) is x
        np.testing.assert_array_equal(x, want)
        np.testing.assert_array_equal(rows[:, :, :rest], before[:, :, :rest])
        _native.rope_(x, cos, sin, interleaved, inverse=True)
        np.testing.assert_array_equal(x, _native.rope(want, cos, sin, interleaved, inverse=True))
    x = floats(1, 5, 2, 3, 4).transpose(1, 0, 2, 3)  # tokens farther apart than sequences
    cos, sin = angles(1, 5, 1)
    want = _native.rope(x, cos, sin, interleaved)
    np.testing.assert_array_equal(_native.rope_(x, cos, sin, interleaved), want)


def test_every_level_gives_the_same_bits(same_on_any_threads) -> None:
    x, (cos, sin) = floats(1, 2, 300, 7, 66), angles(2, 300, 33)
    before, results = _native.isa(), []
    for level in _native.available_isas():
        _native._set_isa(level)
        results.append([_native.rope(a, cos, sin, pairs).tobytes() for a in (x, x.astype(BF16)) for pairs in (0, 1)])
        same_on_any_threads(lambda: _native.rope(x, cos, sin, True))
    _native._set_isa(before)
    assert all(r == results[0] for r in results)


def test_no_rotation_and_no_elements(isa: str) -> None:
    x = floats(1, 2, 3, 4, 6)
    nothing = np.zeros((3, 0), np.float32)
    np.testing.assert_array_equal(_native.rope(x, nothing, nothing, True), x)
    for shape in [(0, 3, 4, 6), (2, 0, 4, 6), (2, 3, 0, 6)]:
        table = np.zeros((shape[1], 3), np.float32)
        assert _native.rope(np.zeros(shape, np.float32), table, table, False).shape == shape


def test_errors_name_both_shapes() -> None:
    x = np.zeros((2, 3, 4, 6), np.float32)
    for table in [(4, 3), (3, 4), (1, 3, 3), (3,), (2, 3, 1, 3)]:
        t = np.zeros(table, np.float32)
        with pytest.raises(ShapeError, match=r"rope: cos and sin have shape .*, x \(2, 3, 4, 6\)"):
            _native.rope(x, t, t, True)
    with pytest.raises(ShapeError, match=r"rope: x must be \(B, T, H, D\)"):
        _native.rope(x[0], np.zeros((3, 3), np.float32), np.zeros((3, 3), np.float32), True)
    with pytest.raises(ShapeError, match=r"rope: cos has shape \(3, 3\), sin \(3, 2\)"):
        _native.rope(x, np.zeros((3, 3), np.float32), np.zeros((3, 2), np.float32), True)
    table = np.zeros((3, 3), np.float32)
    with pytest.raises(ShapeError, match=r"rope_: the last two dimensions of x must be contiguous"):
        _native.rope_(np.zeros((2, 3, 4, 12), np.float32)[..., ::2], table, table)
    with pytest.raises(ShapeError, match=r"rope_: x is written in place, but its elements overlap"):
        _native.rope_(np.lib.stride_tricks.as_strided(x, x.shape, (0, *x.strides[1:])), table, table)
    with pytest.raises(DTypeError, match="rope_: x must be float32 or bfloat16, not float16"):
        _native.rope_(x.astype(np.float16), table, table)
    with pytest.raises(DTypeError, match="rope_: cos must be float32, not bfloat16"):
        _native.rope_(x, table.astype(BF16), table)
    x.flags.writeable = False
    with pytest.raises(DTypeError, match="rope_: x is written in place but read-only"):
        _native.rope_(x, table, table)
