"""Rotary embedding: both pairings, partial rotation, tables per batch, the inverse."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.checks import assert_close, floats, wide

from entrenar import _native
from entrenar.errors import ShapeError


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
@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_turns_pairs(isa: str, interleaved: bool) -> None:
    for d in [2, 4, 6, 10, 16, 34, 64, 80, 96, 130]:
        for rot in {2, d // 4 * 2 or 2, d}:
            x = floats(d, 2, 3, 5, d)
            for table in [(3, rot // 2), (2, 3, rot // 2)]:
                cos, sin = angles(rot, *table)
                y = _native.rope(x, cos, sin, interleaved)
                assert_close(y, rotated(x, cos, sin, interleaved), rel=2e-7)
                np.testing.assert_array_equal(y[..., rot:], x[..., rot:])
                assert_close(_native.rope(y, cos, sin, interleaved, inverse=True), wide(x), rel=5e-7)


def test_every_level_gives_the_same_bits(same_on_any_threads) -> None:
    x, (cos, sin) = floats(1, 2, 300, 7, 66), angles(2, 300, 33)
    before, results = _native.isa(), []
    for level in _native.available_isas():
        _native._set_isa(level)
        results.append([_native.rope(x, cos, sin, pairs).tobytes() for pairs in (True, False)])
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
