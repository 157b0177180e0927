"""Bytes and values of every type against what ggml and bitsandbytes gave for the same input, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from entrenar import backend
from entrenar.quant import QTYPES, QTensor, dequantize, quantize

GGML = [row.name for row in QTYPES.values() if row.decodes and not row.flat]
INPUTS = ("babyllama_blk0_ffn_up", "babyllama_tok_embd", "stories260K_blk2_ffn_down", "absmax_ties", "zeros", "outlier",
          "tiny")  # fmt: skip
cpu = backend.cpu


@pytest.fixture(scope="module")
def ggml(shared_data: Path) -> Mapping[str, np.ndarray]:
    with np.load(shared_data / "quant/llama_cpp_reference_vectors.npz") as file:
        return {key.lower(): file[key] for key in file.files}


@pytest.fixture(scope="module")
def bnb(shared_data: Path) -> Mapping[str, np.ndarray]:
    with np.load(shared_data / "quant/bitsandbytes_cpu_reference.npz") as file:
        return dict(file)


def same(got: np.ndarray, want: np.ndarray) -> bool:
    return got.dtype == want.dtype and got.tobytes() == want.tobytes()


def test_every_type_of_the_vectors_is_served(ggml: Mapping[str, np.ndarray]) -> None:
    assert {key.split("/")[0] for key in ggml} == {*GGML, "input"}
    assert len(GGML) == 22


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("which", [which.lower() for which in INPUTS])
def test_ggml(ggml: Mapping[str, np.ndarray], name: str, which: str) -> None:
    x, raw, want = ggml[f"input/{which}"], ggml[f"{name}/{which}/bytes"], ggml[f"{name}/{which}/dequant"]
    assert same(dequantize(raw, name, x.shape), want)
    assert same(cpu.packed_rows(name, raw, *x.shape), want)  # the plain decoder
    if QTYPES[name].encodes:
        assert same(quantize(x, name).bytes, raw)


@pytest.mark.parametrize("block", [64, 128])
def test_nf4(bnb: Mapping[str, np.ndarray], block: int) -> None:
    x = bnb["input"]
    q = quantize(x, "nf4-f32", block)
    scales, end = cpu.flat_parts("nf4-f32", x.size, block)[::3]
    assert (scales, end) == (x.size // 2, q.nbytes)
    assert same(q.bytes[:scales], bnb[f"nf4/bs{block}/packed"])
    assert same(q.bytes[scales:].view(np.float32), bnb[f"nf4/bs{block}/absmax"])
    assert same(q.dense(), bnb[f"nf4/bs{block}/dequant"].reshape(x.shape))


def test_double_quantization(bnb: Mapping[str, np.ndarray]) -> None:
    x = bnb["input"]
    q = quantize(x, "nf4")
    scales, nested, offset, end = cpu.flat_parts("nf4", x.size)
    codes, absmax, mean = q.bytes[scales:nested][: x.size // 64], q.bytes[nested:offset], q.bytes[offset:end]
    assert same(q.bytes[:scales], bnb["nf4/bs64/packed"])
    assert same(codes, bnb["double_quant/codes"])
    assert same(absmax.view(np.float32), bnb["double_quant/absmax2"])
    assert same(mean.view(np.float32), bnb["double_quant/offset"])
    restored = bnb["double_quant/dequant"] + bnb["double_quant/offset"]
    levels = bnb["nf4_code_from_bnb"][np.stack([bnb["nf4/bs64/packed"] >> 4, bnb["nf4/bs64/packed"] & 15], -1)]
    assert same(q.dense(), (levels.reshape(-1, 64) * restored[:, None]).reshape(x.shape))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_every_code(bnb: Mapping[str, np.ndarray], name: str) -> None:
    raw = np.concatenate([np.arange(256, dtype=np.uint8), np.ones(8, np.float32).view(np.uint8)])
    assert same(QTensor(QTYPES[f"{name}-f32"], (512,), raw).dense(), bnb[f"{name}/all_bytes_dequant_absmax1_bs64"])
