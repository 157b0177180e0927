"""QTensor, quantize and dequantize: shapes, types, rows, threads, round trips, error bounds, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels.guard import guarded

import entrenar as en
from entrenar import backend
from entrenar.errors import DataError, DTypeError, NonFiniteError, ShapeError, UsageError
from entrenar.quant import QTYPES, QTensor, dequantize, fitting, quantize

cpu = backend.cpu
DECODED = [row.name for row in QTYPES.values() if row.decodes]
ENCODED = [row.name for row in QTYPES.values() if row.encodes]
BLOCKS = [row.name for row in QTYPES.values() if row.decodes and not row.flat]
FLAT = ["nf4", "nf4-f32", "fp4", "fp4-f32"]


def values(*shape: int, seed: int = 0) -> np.ndarray:
    """A mixture that weights are made of: a normal bulk and a few values far out."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=shape) * draw.choice([1, 1, 1, 8], size=shape)
    return x.astype(np.float32)


def random_bytes(name: str, elements: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, QTYPES[name].nbytes(elements), dtype=np.uint8)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)


@pytest.fixture
def threads() -> Iterator[None]:
    before = backend.get_num_threads()
    yield
    backend.set_num_threads(before)


# ---- values ----


@pytest.mark.parametrize("name", ENCODED)
def test_a_quantized_array(name: str) -> None:
    x = values(5, 512)
    q = en.quant.quantize(x, name)
    assert (q.qtype.name, q.shape, q.ndim, q.size, q.width) == (name, (5, 512), 2, 2560, 512)
    assert q.nbytes == q.bytes.size == q.qtype.nbytes(2560)
    assert repr(q) == f"QTensor({name}, (5, 512), {q.nbytes} bytes)"
    dense = q.dense()
    assert dense.dtype == np.float32
    assert same(dense, dequantize(q))
    assert same(dense, dequantize(q.bytes, name, x.shape))
    assert same(dense, dequantize(q.bytes.tobytes(), name, x.shape))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert same(q.dense(dtype), dense.astype(dtype))
        assert same(q.rows([3, 0, 3], dtype), dense[[3, 0, 3]].astype(dtype))
        narrow = x.astype(dtype)
        assert same(quantize(narrow, name).bytes, quantize(narrow.astype(np.float32), name).bytes)
    assert same(q.rows(np.array([[4], [1]])), dense[[[4], [1]]])
    assert q.rows(np.array([], int)).shape == (0, 512)
    assert same(quantize(x.T.copy().T, name).bytes, q.bytes)
    assert not q.bytes.flags.writeable
    with pytest.raises(AttributeError):
        q.shape = (1,)  # type: ignore[misc]


@pytest.mark.parametrize("name", DECODED)
def test_any_bytes_have_values_and_the_plain_decoder_agrees(name: str) -> None:
    raw = random_bytes(name, 3 * 512)
    q = QTensor(QTYPES[name], (3, 512), raw)
    with np.errstate(all="ignore"):
        dense = q.dense()
        assert dense.shape == (3, 512)
        assert same(cpu.packed_rows(name, raw, 3, 512), dense)
        assert same(cpu.packed_rows(name, raw, 512, 3), dense.reshape(512, 3))  # rows that begin within blocks
        assert same(q.rows([2, 1]), dense[[2, 1]])
        assert same(q.dense(np.float16), dense.astype(np.float16))


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("name", FLAT)
def test_blocks_of_every_length(name: str, block: int) -> None:
    x = values(3, 4097)  # the last block is not full, and rows begin at odd nibbles
    q = quantize(x, name, block)
    levels = cpu.packed_rows(f"{name[:3]}-f32", np.r_[np.arange(16, dtype=np.uint8) << 4, np.zeros(48, np.uint8),
                                                     np.float32([1]).view(np.uint8)], 1, 32)[0, ::2]  # fmt: skip
    codes = np.stack([q.bytes >> 4, q.bytes & 15], -1).reshape(-1)[: x.size]
    scale = np.abs(np.pad(x.reshape(-1), (0, -x.size % block))).reshape(-1, block).max(1)
    if not name.endswith("f32"):
        scales, nested, offset, _ = cpu.flat_parts(name, x.size, block)
        mean = q.bytes[offset:].view(np.float32)[0]
        assert mean == np.float32(np.float64(scale).mean())
        table = dynamic_map()
        of_256 = q.bytes[nested:offset].view(np.float32).repeat(256)[: scale.size]
        restored = table[q.bytes[scales : scales + scale.size]] * of_256 + mean
        assert np.abs(restored - scale).max() <= 0.01 * of_256.max() + 1e-6
        scale = restored
    want = levels[codes] * scale.repeat(block)[: x.size]
    assert same(q.dense().reshape(-1), want)
    halfway = np.diff(np.sort(levels)).max() / 2
    assert np.all(np.abs(want - x.reshape(-1)) <= (halfway + 0.02) * scale.max())


def dynamic_map() -> np.ndarray:
    """What each byte of a double-quantized scale means: one block of 64 codes, 1.0, whose scale is that byte."""
    out = []
    for byte in range(256):
        raw = np.zeros(cpu.packed_bytes("nf4", 64), np.uint8)
        raw[:32] = 255
        raw[64] = byte
        raw[128:132] = np.float32([1]).view(np.uint8)
        out.append(cpu.packed_rows("nf4", raw, 1, 64)[0, 0])
    return np.array(out)


def test_the_dynamic_map_is_symmetric_and_rises() -> None:
    table = dynamic_map()
    assert np.all(np.diff(table) > 0)
    assert (table[127], table[255]) == (0, 1)
    assert same(table[:127], -table[128:255][::-1])


@pytest.mark.parametrize("name", ["nf4", "fp4-f32"])
@pytest.mark.parametrize("shape", [(), (1,), (63,), (65,), (3, 5, 7), (0,), (4, 0), (2, 3, 129)])
def test_flat_types_take_any_shape(name: str, shape: tuple[int, ...]) -> None:
    x = np.asarray(values(*shape), np.float32)
    q = quantize(x, name)
    assert q.dense().shape == shape
    assert np.all(np.abs(q.dense() - x) <= 0.2 * np.abs(x).max(initial=0))


def test_zeros_and_equal_values() -> None:
    for name in ENCODED:
        assert not quantize(np.zeros((2, 256), np.float32), name).dense().any()
        for tiny in (1e-20, 1e-38, 1e-44):  # scales without an inverse
            x = values(2, 256) * np.float32(tiny)
            assert np.all(np.abs(quantize(x, name).dense()) <= 2.0**-24 * 128), tiny
    assert np.all(quantize(np.ones(512, np.float32), "nf4").dense() == 1)  # scales equal their mean
    assert not quantize(np.float32([]), "nf4").dense().size


@pytest.mark.parametrize("name", ENCODED)
def test_bytes_do_not_depend_on_threads(name: str, threads: None) -> None:
    x = values(37, 2048)
    found = []
    for count in (1, 2, 3, 7):
        backend.set_num_threads(count)
        q = quantize(x, name)
        found.append((q.bytes.tobytes(), q.dense().tobytes(), q.rows(range(36, -1, -1)).tobytes()))
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", DECODED)
def test_nothing_beyond_an_array_is_touched(name: str) -> None:
    for rows in (1, 3):
        raw = random_bytes(name, rows * 256)
        near = guarded(raw)
        with np.errstate(all="ignore"):
            for dtype in (np.float32, np.float16):
                shape = (rows, 256, None, dtype)
                assert same(cpu.packed_rows(name, near, *shape), cpu.packed_rows(name, raw, *shape))
            if name in BLOCKS:
                assert same(cpu.dequantize(name, near), cpu.dequantize(name, raw))
        for dtype in (np.float32, ml_dtypes.bfloat16):
            x = values(rows, 256).astype(dtype)
            if name in ENCODED:
                assert same(cpu.quantize(name, guarded(x)), cpu.quantize(name, x))
    if name in FLAT:
        x = values(1, 77)
        assert same(cpu.packed_rows(name, guarded(cpu.quantize(name, guarded(x))), 1, 77), quantize(x, name).dense())


# ---- how well ----

# type -> values that share a range, and the largest error as a part of it, without the rounding of 16-bit scales
STEPS = {"q8_0": (32, 1 / 254), "q5_1": (32, 1 / 31), "q5_0": (32, 1 / 16), "q4_1": (32, 1 / 15), "q4_0": (32, 1 / 8),
         "nf4-f32": (64, 0.152), "fp4-f32": (64, 1 / 6), "q6_k": (256, 1 / 24), "q5_k": (256, 1 / 16),
         "q4_k": (256, 1 / 8), "q3_k": (256, 1 / 2), "q2_k": (256, 1 / 2), "iq4_nl": (32, 1 / 4),
         "iq4_xs": (256, 1 / 4)}  # fmt: skip

arrays = st.builds(
    lambda seed, scale, spread: np.float32(
        np.random.default_rng(seed).normal(size=(2, 256))
        * scale
        * np.exp(spread * np.random.default_rng(seed + 1).normal(size=(2, 256)))
    ),
    # not smaller: a K-quant's 16-bit scale of scales would be denormal, and its rounding the larger error
    st.integers(0, 2**32 - 2), st.sampled_from([0.05, 1.0, 30.0]), st.sampled_from([0, 0.5, 1.0]),
)  # fmt: skip


@given(arrays)
def test_errors_are_bounded_by_the_block(x: np.ndarray) -> None:
    for name, (length, part) in STEPS.items():
        blocks = x.reshape(-1, length)
        error = np.abs(quantize(x, name).dense().reshape(-1, length) - blocks).max(1)
        extent = np.abs(blocks).max(1)
        assert np.all(error <= extent * (part + 2.0**-9) + 1e-6), name


@given(arrays)
def test_quantizing_again_changes_nothing(x: np.ndarray) -> None:
    for name in ("q8_0", "q5_0", "q4_0", "nf4-f32", "fp4-f32"):
        once = quantize(x, name).dense()
        again = quantize(once, name).dense()
        assert same(again, once), name


def test_more_bits_err_less() -> None:
    x = values(64, 1024, seed=3)
    order = ["q8_0", "q6_k", "q5_k", "q4_k", "q3_k", "q2_k"]
    errors = [np.square(quantize(x, name).dense() - x).mean() for name in order]
    assert all(2 * a < b for a, b in pairwise(errors))
    rms = {name: np.sqrt(np.square(quantize(x, name).dense() - x).mean() / np.square(x).mean()) for name in ENCODED}
    assert max(rms[name] for name in ("q4_k", "q5_0", "q4_1", "iq4_nl", "iq4_xs", "q4_0")) < 0.14
    assert abs(rms["nf4"] / rms["nf4-f32"] - 1) < 0.02


# ---- what is refused ----


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_element_that_is_not_finite_is_named(name: str, bad: float) -> None:
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        x = values(40, 512).astype(dtype)
        x[31, 99] = x[33, 1] = bad
        with pytest.raises(NonFiniteError, match=rf"quantize: the element at \(31, 99\) is {bad}"):
            quantize(x, name)


def test_values_too_large_for_a_16_bit_scale() -> None:
    for name in ENCODED:
        x = np.zeros((2, 512), np.float32)
        x[1, 300] = -1e30
        if name in FLAT:
            assert quantize(x, f"{name[:3]}-f32").dense()[1, 300] == np.float32(-1e30)
            continue
        place = r"\(1, 288\)" if QTYPES[name].block == 32 else r"\(1, 256\)"
        for large in (-1e30, -1e20, -1e12, 1e9, 5e8):
            x[1, 300] = large
            with pytest.raises(NonFiniteError, match=rf"the block from {place} has values too large for {name}'s 16-"):
                quantize(x, name)


@pytest.mark.parametrize("name", ["iq1_s", "tq2_0", "mxfp4", "q8_1", "f16"])
def test_types_that_are_not_written(name: str) -> None:
    with pytest.raises(UsageError, match=f"quantize: {name} is not written; written are: q4_0, "):
        quantize(values(1, 256), name)


def test_what_can_not_be_quantized() -> None:
    with pytest.raises(UsageError, match="quantize: no type 'q9'; it is one of f32, f16"):
        quantize(values(1, 256), "q9")
    with pytest.raises(ShapeError, match=r"rows of 255 elements do not fill q4_k's blocks of 256; .* \(256, 255\)"):
        quantize(values(256, 255), "q4_k")
    with pytest.raises(ShapeError, match="rows of 1 elements"):
        quantize(np.zeros((), np.float32), "q8_0")
    with pytest.raises(DTypeError, match="x must be float32, float16 or bfloat16, not float64"):
        quantize(np.zeros((1, 256)), "q4_0")
    with pytest.raises(DTypeError, match="must be a NumPy array"):
        quantize([1.0] * 64, "nf4")  # type: ignore[arg-type]
    for block in (0, 16, 48, 8192, 64.5, "64", None, -64):
        with pytest.raises(UsageError, match=r"block=.*must be a power of two from 32 to 4096"):
            quantize(values(1, 64), "nf4", block)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="block=128: q4_0's are of 32; only NF4 and FP4 have a choice"):
        quantize(values(1, 128), "q4_0", 128)
    for name in ([], 7, None):
        with pytest.raises(UsageError, match="quantize: no type"):
            quantize(values(1, 64), name)  # type: ignore[arg-type]


def test_names_of_types_in_any_case() -> None:
    assert quantize(values(2, 256), "Q4_K").qtype is quantize(values(2, 256), "q4_k").qtype
    assert fitting("Q4_K", 896) == "q5_0"
    assert fitting("NF4", 7) == "nf4"


@pytest.mark.parametrize("name", DECODED)
def test_bytes_that_lie(name: str) -> None:
    row = QTYPES[name]
    size = row.nbytes(512)
    raw = np.zeros(size, np.uint8)
    assert QTensor(row, (2, 256), raw).nbytes == size
    for wrong in (0, 1, size - 1, size + 1, 2 * size):
        with pytest.raises(ShapeError, match=rf"\(2, 256\) of {name} takes {size} bytes, not {wrong}"):
            QTensor(row, (2, 256), np.zeros(wrong, np.uint8))
        with pytest.raises(ShapeError, match=f"take {size} bytes"):
            cpu.packed_rows(name, np.zeros(wrong, np.uint8), 2, 256)
    for other in (raw.view(np.int8), raw.reshape(1, -1), raw.tolist(), None, raw.astype(object)):
        with pytest.raises(DTypeError, match=f"bytes of {name} are a 1-D uint8 array, not"):
            QTensor(row, (2, 256), other)  # type: ignore[arg-type]
    for shape in ((-2, -256), (-1,), (512, -1, -1), (2**40, 2**40), (2**70,), (2.0, 256), 512, ("2", 256), None):
        with pytest.raises(ShapeError, match="is no shape"):
            QTensor(row, shape, raw)  # type: ignore[arg-type]
        with pytest.raises(ShapeError, match="is no shape") if shape is not None else pytest.raises(UsageError):
            dequantize(raw, name, shape)  # type: ignore[arg-type]
    if not row.flat:
        with pytest.raises(ShapeError, match=f"rows of {512 // 3} do not fill"):
            QTensor(row, (3, 512 // 3), raw)


def test_rows_that_are_not_there() -> None:
    for name in ("q4_0", "iq2_xs", "nf4"):
        q = QTensor(QTYPES[name], (3, 256), np.zeros(QTYPES[name].nbytes(768), np.uint8))
        for wrong in (3, -1, 2**62, -(2**63)):
            with pytest.raises(DataError, match=f"packed_rows: id {wrong} is out of range"):
                q.rows([0, wrong])
        with pytest.raises(DTypeError, match="ids must be integers, not float64"):
            q.rows([0.5])  # type: ignore[list-item]
        with pytest.raises(DTypeError, match="dtype must be"):
            q.rows([0], np.float64)
    with pytest.raises(ShapeError, match="it takes a matrix"):
        quantize(values(64), "nf4").rows([0])
    with pytest.raises(ShapeError, match="is no shape of a matrix"):
        cpu.packed_rows("q4_0", np.zeros(18, np.uint8), -1, -32)
    with pytest.raises(ShapeError, match="is no shape of a matrix"):
        cpu.packed_rows("nf4", np.zeros(18, np.uint8), 2**40, 2**40)


def test_types_without_values() -> None:
    with pytest.raises(DTypeError, match="QTensor: type q8_1 can't be decoded; q4_0, "):
        QTensor(QTYPES["q8_1"], (32,), np.zeros(36, np.uint8))
    with pytest.raises(UsageError, match="raw bytes need the name of their type and their shape"):
        dequantize(b"", "q4_0")
    with pytest.raises(UsageError, match="dequantize: no type 'Q4'"):
        dequantize(b"", "Q4", (0,))


# ---- what llama.cpp takes instead; rows in another order ----


def test_fitting() -> None:
    assert [fitting(name, 896) for name in ("q4_k", "q5_k", "q6_k", "q2_k", "q3_k", "iq4_xs")] == [
        "q5_0", "q5_1", "q8_0", "iq4_nl", "iq4_nl", "iq4_nl"
    ]  # fmt: skip
    assert [fitting(name, 100) for name in ("q4_k", "q8_0", "nf4")] == ["f16", "f16", "nf4"]
    assert [fitting(name, 1024) for name in ("q4_k", "q8_0")] == ["q4_k", "q8_0"]
    with pytest.raises(UsageError, match="fitting: no type"):
        fitting("q7", 1)


def test_permuted() -> None:
    q = quantize(values(6, 256), "q4_k")
    order = [5, 3, 1, 0, 2, 4]
    assert same(q.permuted(order).dense(), q.dense()[order])
    with pytest.raises(ShapeError, match="order is no permutation of 6 rows"):
        q.permuted([0, 1, 2, 3, 4, 4])
    with pytest.raises(UsageError, match="are not stored apart"):
        quantize(values(6, 256), "nf4").permuted(order)


@pytest.mark.parametrize("name", ["q8_0", "nf4"])
def test_copies_are_itself_and_pickles_are_equal(name: str) -> None:
    q = quantize(values(3, 64), name)
    _ = q.data  # what products take has been made
    assert copy.copy(q) is q
    assert copy.deepcopy([q])[0] is q
    again = pickle.loads(pickle.dumps(q))
    assert (again.qtype, again.shape, again.block) == (q.qtype, q.shape, q.block)
    assert same(again.dense(), q.dense())
    assert not again.bytes.flags.writeable
