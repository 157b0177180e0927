"""Fresh random matrices against ggml (xllamacpp), its Python port (gguf) and bitsandbytes. Development only."""

from __future__ import annotations

import ctypes
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import need_oracle

from entrenar import backend
from entrenar.quant import QTYPES, dequantize, quantize

pytestmark = pytest.mark.oracle
GGML = [row.name for row in QTYPES.values() if row.decodes and not row.flat]
WRITTEN = [name for name in GGML if QTYPES[name].encodes]
SEED = secrets.randbits(32)  # other matrices each time; a failure prints it


def matrices(seed: int) -> list[np.ndarray]:
    """Weights, and what makes encoders take other ways: outliers, ties, one sign, tiny values, zeros."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(8, 1024))
    rare, rows = draw.random(x.shape) < 0.03, 10.0 ** draw.integers(-20, 3, (8, 1))
    found = [x, x * np.exp(2 * draw.normal(size=x.shape)), np.round(x * 4) / 4, np.abs(x) + 0.5, -np.abs(x), x * 1e-6,
             x * 1e-12, x * rare, x * rows, x * 0]  # fmt: skip
    return [np.float32(each) for each in found]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    xllamacpp = need_oracle("xllamacpp")
    library = ctypes.CDLL(str(next(Path(xllamacpp.__path__[0]).glob("*.so"))))
    i64, floats = ctypes.c_int64, ctypes.POINTER(ctypes.c_float)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, i64, i64, i64, floats]
    library.ggml_get_type_traits.restype = ctypes.POINTER(ctypes.c_void_p)
    for row in QTYPES.values():
        if row.decodes and not row.flat:
            library.ggml_quantize_init(row.ggml_id)
    return library


def pointer(x: np.ndarray) -> Any:
    return x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def to_float(library: ctypes.CDLL, name: str, raw: np.ndarray, count: int) -> np.ndarray:
    """By the function that ggml's table of types has at its sixth word."""
    address = library.ggml_get_type_traits(QTYPES[name].ggml_id)[5]
    decode = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_float), ctypes.c_int64)(address)
    out = np.empty(count, np.float32)
    decode(raw.ctypes.data, pointer(out), count)
    return out


@pytest.mark.parametrize("name", WRITTEN)
def test_ggml_encodes_the_same(library: ctypes.CDLL, name: str) -> None:
    for i, x in enumerate(matrices(SEED)):
        want = np.empty(QTYPES[name].nbytes(x.size), np.uint8)
        assert library.ggml_quantize_chunk(QTYPES[name].ggml_id, pointer(x), want.ctypes.data, 0, *x.shape, None)
        assert np.array_equal(quantize(x, name).bytes, want), (SEED, i)


@pytest.mark.parametrize("name", GGML)
def test_ggml_decodes_the_same(library: ctypes.CDLL, name: str) -> None:
    raw = np.random.default_rng(SEED).integers(0, 256, QTYPES[name].nbytes(64 * 1024), dtype=np.uint8)
    with np.errstate(all="ignore"):
        ours = dequantize(raw, name, (64, 1024)).reshape(-1)
    theirs = to_float(library, name, raw, ours.size)
    number = ~np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), ~number), SEED
    assert np.array_equal(ours[number].view(np.uint32), theirs[number].view(np.uint32)), SEED


@pytest.mark.parametrize("name", GGML)
def test_gguf_decodes_the_same(name: str) -> None:
    quants = need_oracle("gguf").quants
    x = np.random.default_rng(SEED).integers(0, 256, (64, QTYPES[name].nbytes(1024)), dtype=np.uint8)
    kinds = {str(kind.name).lower(): kind for kind in quants._type_traits}
    with np.errstate(all="ignore"):
        theirs = quants.dequantize(x, kinds[name])
        ours = dequantize(x.reshape(-1), name, (64, 1024))
    assert np.allclose(ours, theirs, rtol=1e-6, atol=0, equal_nan=True), SEED


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_bitsandbytes(kind: str, block: int) -> None:
    torch = need_oracle("torch")
    bnb = need_oracle("bitsandbytes").functional
    for i, x in enumerate([*matrices(SEED), np.float32(np.random.default_rng(SEED).normal(size=(5, 1003)))]):
        packed, state = bnb.quantize_4bit(torch.from_numpy(x), blocksize=block, quant_type=kind)
        q = quantize(x, f"{kind}-f32", block)
        scales, end = backend.cpu.flat_parts(f"{kind}-f32", x.size, block)[::3]
        assert np.array_equal(q.bytes[: packed.numel()], packed.numpy().reshape(-1)), (SEED, i)
        assert np.array_equal(q.bytes[scales:end].view(np.float32), state.absmax.numpy()), (SEED, i)
        assert np.array_equal(q.dense(), bnb.dequantize_4bit(packed, state).numpy()), (SEED, i)


@pytest.mark.parametrize("block", [32, 64, 128])
def test_bitsandbytes_double_quantization(block: int) -> None:
    """Given our mean and our dynamic map: torch's mean and linspace differ in last bits from one CPU to another."""
    torch = need_oracle("torch")
    bnb = need_oracle("bitsandbytes").functional
    for i, x in enumerate(matrices(SEED)):
        packed, plain = bnb.quantize_4bit(torch.from_numpy(x), blocksize=block, quant_type="nf4")
        q = quantize(x, "nf4", block)
        scales, nested, offset, end = backend.cpu.flat_parts("nf4", x.size, block)
        mean = q.bytes[offset:end].view(np.float32)
        assert np.allclose(mean[0], plain.absmax.double().mean().item(), rtol=1e-7, atol=0), (SEED, i)
        codes, state = bnb.quantize_blockwise(plain.absmax - torch.from_numpy(mean.copy()), blocksize=256)
        assert np.array_equal(q.bytes[: packed.numel()], packed.numpy().reshape(-1)), (SEED, i)
        assert np.array_equal(q.bytes[scales : scales + codes.numel()], codes.numpy()), (SEED, i)
        assert np.array_equal(q.bytes[nested:offset].view(np.float32), state.absmax.numpy()), (SEED, i)
        _, compressed = bnb.quantize_4bit(
            torch.from_numpy(x), blocksize=block, quant_type="nf4", compress_statistics=True
        )
        theirs = bnb.dequantize_4bit(packed, compressed).numpy()
        assert np.allclose(q.dense(), theirs, rtol=1e-6, atol=1e-6 * np.abs(x).max()), (SEED, i)
