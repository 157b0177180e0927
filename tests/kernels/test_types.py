"""16-bit types and ggml's block encodings, bit for bit."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from kernels.checks import TAILS, floats
from kernels.guard import guarded

from entrenar import _native
from entrenar.errors import DTypeError, ShapeError, UsageError

HALVES = [np.float16, ml_dtypes.bfloat16]
EVERY = np.arange(65536, dtype=np.uint16)


@pytest.mark.tier1
@pytest.mark.parametrize("dtype", HALVES)
def test_all_16_bit_values_widen_exactly(isa: str, dtype: type) -> None:
    x = EVERY.view(dtype)
    got, want = _native.convert(x, np.float32), x.astype(np.float32)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(got.view(np.uint32)[number], want.view(np.uint32)[number])
    assert np.isnan(got[~number]).all()
    np.testing.assert_array_equal(_native.convert(got, dtype).view(np.uint16)[number], EVERY[number])


@pytest.mark.parametrize("dtype", HALVES)
def test_narrowing_rounds_to_nearest_even(isa: str, dtype: type) -> None:
    """Every 16-bit value, the points halfway between two, their neighbours, and random bits of all kinds."""
    near = _native.convert(EVERY.view(dtype), np.float32).view(np.uint32)
    half = np.uint32(0x8000 if dtype is ml_dtypes.bfloat16 else 0x1000)
    bits = np.concatenate([near + half, near + half - 1, near + half + 1, near - 1, near + 1])
    bits = np.concatenate([bits, np.random.default_rng(1).integers(0, 2**32, 300000, dtype=np.uint32)])
    x = bits.view(np.float32)
    with np.errstate(all="ignore"):
        want = x.astype(dtype).view(np.uint16)
    got, number = _native.convert(x, dtype), ~np.isnan(x)
    np.testing.assert_array_equal(got.view(np.uint16)[number], want[number])
    assert np.isnan(got.astype(np.float32)[~number]).all()
    smallest = np.float32([2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 65504, 65519.996, 65520, -65520, np.inf, np.nan])
    with np.errstate(all="ignore"):
        want = smallest.astype(dtype)
    np.testing.assert_array_equal(_native.convert(smallest, dtype).view(np.uint16), want.view(np.uint16))


@pytest.mark.tier1
def test_convert_meets_every_tail_and_layout(isa: str, same_on_any_threads) -> None:
    for dtype in HALVES:
        for n in TAILS:
            x = guarded(floats(n, n))
            np.testing.assert_array_equal(_native.convert(x, dtype), x.astype(dtype))
            half = guarded(x.astype(dtype))
            np.testing.assert_array_equal(_native.convert(half, np.float32), half.astype(np.float32))
        x = floats(1, 301, 333)
        same_on_any_threads(lambda dtype=dtype, x=x: _native.convert(x, dtype))
        for view in (x.T, x[:, ::3], x[::-1, 5:200], np.broadcast_to(x[:, :1], (301, 40))):
            np.testing.assert_array_equal(_native.convert(view, dtype), view.astype(dtype))
            half = view.astype(dtype) if view.strides[-1] == 4 else x.astype(dtype)[::2].T
            np.testing.assert_array_equal(_native.convert(half, np.float32), half.astype(np.float32))
            np.testing.assert_array_equal(_native.convert(half, dtype), half)
        assert _native.convert(np.array(x[0, 0]), dtype).shape == ()
        assert _native.convert(x[:0], dtype).shape == (0, 333)
    f16 = floats(1, 70).astype(np.float16)
    np.testing.assert_array_equal(_native.convert(f16, ml_dtypes.bfloat16), f16.astype(ml_dtypes.bfloat16))
    same = _native.convert(f16, np.float16)
    assert not np.shares_memory(same, f16)
    np.testing.assert_array_equal(same, f16)
    with pytest.raises(DTypeError, match="convert: x must be float32, float16 or bfloat16, not float64"):
        _native.convert(np.zeros(3), np.float32)
    with pytest.raises(DTypeError, match="convert: dtype must be"):
        _native.convert(np.zeros(3, np.float32), np.int32)


# name -> bytes of a block; the reference files use ggml's own spelling
ENCODINGS = {"q4_0": ("q4_0", 18), "q8_0": ("q8_0", 34), "q4_k": ("q4_K", 144), "q6_k": ("q6_K", 210)}


@pytest.mark.parametrize("name", ENCODINGS)
def test_dequantize_has_ggmls_bits(isa: str, name: str, shared_data: Path) -> None:
    vectors = np.load(shared_data / "quant/llama_cpp_reference_vectors.npz")
    inputs = [key.split("/")[1] for key in vectors if key.startswith("input/")]
    assert len(inputs) == 7
    for which in inputs:
        raw = vectors[f"{ENCODINGS[name][0]}/{which}/bytes"]
        want = vectors[f"{ENCODINGS[name][0]}/{which}/dequant"].reshape(-1)
        np.testing.assert_array_equal(_native.dequantize(name, raw).view(np.uint32), want.view(np.uint32))
        for dtype in HALVES:
            narrow = _native.dequantize(name, raw, dtype)
            np.testing.assert_array_equal(narrow.view(np.uint16), want.astype(dtype).view(np.uint16))


def by_hand(name: str, block: bytes) -> list[float]:
    """One block, element by element, as the formats are described."""

    def half(at: int) -> np.float32:
        return np.frombuffer(block[at : at + 2], "<f2").astype(np.float32)[0]

    def signed(byte: int) -> int:
        return byte - 256 if byte > 127 else byte

    if name == "q4_0":
        low, high = [b & 15 for b in block[2:]], [b >> 4 for b in block[2:]]
        return [half(0) * np.float32(q - 8) for q in low + high]
    if name == "q8_0":
        return [half(0) * np.float32(signed(b)) for b in block[2:]]
    out = []
    if name == "q4_k":
        packed = block[4:16]
        scales = [b & 63 for b in packed[:4]] + [packed[8 + i] & 15 | packed[i] >> 6 << 4 for i in range(4)]
        mins = [b & 63 for b in packed[4:8]] + [packed[8 + i] >> 4 | packed[4 + i] >> 6 << 4 for i in range(4)]
        for i in range(256):
            group, byte = i // 32, block[16 + i // 64 * 32 + i % 32]
            q = byte & 15 if group % 2 == 0 else byte >> 4
            out.append(half(0) * np.float32(scales[group]) * np.float32(q) - half(2) * np.float32(mins[group]))
        return out
    for i in range(256):
        part, within = i // 128, i % 128
        low = block[part * 64 + within % 64]
        high = block[128 + part * 32 + within % 32] >> within // 32 * 2 & 3
        q = (low & 15 if within < 64 else low >> 4) | high << 4
        out.append(half(208) * np.float32(signed(block[192 + i // 16])) * np.float32(q - 32))
    return out


@pytest.mark.tier1
@pytest.mark.parametrize("name", ENCODINGS)
def test_dequantize_follows_the_description_of_the_format(isa: str, name: str, same_on_any_threads) -> None:
    size = ENCODINGS[name][1]
    raw = np.random.default_rng(5).integers(0, 256, 5 * size, dtype=np.uint8)
    for at in {0, 2, 208} if name == "q6_k" else {0, 2}:  # finite scales
        raw[at + 1 :: size] &= 0xBB
    want = [v for i in range(5) for v in by_hand(name, raw[i * size : (i + 1) * size].tobytes())]
    np.testing.assert_array_equal(_native.dequantize(name, raw), np.float32(want))
    many = np.tile(raw, 1000)
    same_on_any_threads(lambda: _native.dequantize(name, many))
    np.testing.assert_array_equal(_native.dequantize(name, many)[-len(want) :], np.float32(want))
    unaligned = np.concatenate([np.zeros(1, np.uint8), raw])[1:]
    np.testing.assert_array_equal(_native.dequantize(name, unaligned), np.float32(want))
    assert _native.dequantize(name, raw[:0]).shape == (0,)
    with pytest.raises(ShapeError, match=rf"dequantize {name}: raw of shape \({size + 1},\) .* {size}-byte blocks"):
        _native.dequantize(name, raw[: size + 1])


def test_dequantize_refuses_what_it_does_not_know() -> None:
    raw = np.zeros(36, np.uint8)
    with pytest.raises(UsageError, match=r"no encoding 'q8_1'.*q4_0"):
        _native.dequantize("q8_1", raw)
    with pytest.raises(UsageError, match="nf4 is not stored in blocks of its own"):
        _native.dequantize("nf4", raw)
    with pytest.raises(DTypeError, match="raw must be an array of uint8, not int8"):
        _native.dequantize("q4_0", raw.view(np.int8))
    with pytest.raises(ShapeError, match=r"raw of shape \(2, 18\)"):
        _native.dequantize("q4_0", raw.reshape(2, 18))
    with pytest.raises(DTypeError, match="dtype must be"):
        _native.dequantize("q4_0", raw, np.float64)
