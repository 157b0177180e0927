"""The GGUF writer: what it writes is what the reader, the gguf package and llama.cpp read."""

from __future__ import annotations

import ctypes
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn
from support import need_oracle

from entrenar.errors import UsageError
from entrenar.formats import gguf_read, gguf_write
from entrenar.formats.files import LazyArray

pytestmark = pytest.mark.tier2

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BF16)

# value -> type it must get in the file
TYPED: dict[str, tuple[Any, str]] = {
    "bool": (True, "bool"),
    "int": (5, "u32"),
    "largest u32": (2**32 - 1, "u32"),
    "negative": (-5, "i32"),
    "u64": (2**32, "u64"),
    "i64": (-(2**40), "i64"),
    "float": (0.5, "f32"),
    "text": ("é\n", "string"),
    "ints": ([1, -2], "array of i32"),
    "large ints": ([1, 2**31], "array of u32"),
    "larger ints": ([-1, 2**31], "array of i64"),
    "floats": ([1, 0.5], "array of f32"),
    "bools": ([True, False], "array of bool"),
    "texts": (["a", ""], "array of string"),
    "u8": (np.uint8(255), "u8"),
    "i8": (np.int8(-1), "i8"),
    "u16": (np.uint16(7), "u16"),
    "i16": (np.int16(-7), "i16"),
    "f64": (np.float64(0.1), "f64"),
    "numpy bool": (np.bool_(False), "bool"),
    "no texts": (np.array([], str), "array of string"),
    "no ints": (np.array([], np.int32), "array of i32"),
    "big-endian": (np.array([1, 2], ">i4"), "array of i32"),
    "f64s": (np.array([0.1, 2.0]), "array of f64"),
}


@pytest.mark.parametrize("name", TYPED)
def test_values_get_their_types(tmp_path: Path, name: str) -> None:
    value, kind = TYPED[name]
    gguf_write.write(tmp_path / "x.gguf", {name: value}, [])
    keys = gguf_read.read(tmp_path / "x.gguf").metadata
    assert keys.type_name(name) == kind
    assert np.array_equal(keys[name], value)


def test_typed_metadata_keeps_every_type(tmp_path: Path) -> None:
    gguf_write.write(tmp_path / "x", {name: value for name, (value, _) in TYPED.items()}, [])
    first = gguf_read.read(tmp_path / "x").metadata
    gguf_write.write(tmp_path / "y", first.typed(), [])
    assert (tmp_path / "y").read_bytes() == (tmp_path / "x").read_bytes()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "an empty list has no element type"),
        ([1, "a"], "a list of int, str can't be written"),
        ([True, 1], "a list of bool, int can't be written"),
        ([[1]], "a list of list can't be written"),
        (2**64, "does not fit into 64 bits"),
        (None, "a NoneType can't be written"),
        (np.zeros((2, 2)), "a ndarray can't be written"),
        (np.array([1j]), "values of type complex128 can't be written"),
    ],
)
def test_values_that_gguf_can_not_hold(tmp_path: Path, value: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=f"key 'k': .*{reason}"):
        gguf_write.write(tmp_path / "x.gguf", {"k": value}, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("n" * 64, np.zeros(1, np.float32), "names have at most 63 bytes"),
        ("é" * 32, np.zeros(1, np.float32), "names have at most 63 bytes"),
        ("a", np.zeros(1), "float64 can't be written"),
        ("a", np.zeros((1,) * 5, np.float32), "0 to 4 dimensions"),
        ("a", np.zeros((2, 0), np.float32), "0 to 4 dimensions, none 0"),
    ],
)
def test_tensors_that_gguf_can_not_hold(tmp_path: Path, name: str, array: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        gguf_write.write(tmp_path / "x.gguf", {}, [(name, array)])
    assert list(tmp_path.iterdir()) == []


def test_names_and_alignments_that_would_not_be_read_back(tmp_path: Path) -> None:
    one = np.zeros(1, np.float32)
    with pytest.raises(UsageError, match="'a' is given twice"):
        gguf_write.write(tmp_path / "x", {}, [("a", one), ("a", one)])
    for alignment in (0, 13, 1 << 21, "32", np.uint64(32)):
        with pytest.raises(UsageError, match=r"general\.alignment"):
            gguf_write.write(tmp_path / "x", {"general.alignment": alignment}, [])
    with pytest.raises(UsageError, match="keys have 1 to 65535 bytes"):
        gguf_write.write(tmp_path / "x", {"": 1}, [])
    with pytest.raises(UsageError, match="0 tensors and 16385 keys; at most 16384 of each"):
        gguf_write.write(tmp_path / "x", {f"{i}": True for i in range(16_385)}, [])
    gguf_write.write(tmp_path / "x", {"general.alignment": 256}, [("a", one), ("b", one + 1)])
    model = gguf_read.read(tmp_path / "x")
    assert model.tensors["b"].offset % 256 == 0
    assert model.array("b").item() == 1


@given(st.data())
def test_tensors_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "round.gguf"
    tensors = {}
    for i in range(data.draw(st.integers(0, 4))):
        shape = data.draw(hn.array_shapes(min_dims=0, max_dims=4, max_side=5))
        bits = data.draw(hn.arrays(np.uint32, shape))
        dtype = data.draw(st.sampled_from(DTYPES))
        tensors[f"t{i}"] = bits.astype(f"u{dtype.itemsize}").view(dtype)
    size = gguf_write.write(path, {"n": len(tensors)}, tensors.items())
    model = gguf_read.read(path)
    assert size == path.stat().st_size == model.file_bytes
    assert list(model.tensors) == list(tensors)
    for name, array in tensors.items():
        assert model.array(name).dtype == array.dtype
        assert model.array(name).shape == array.shape
        assert model.array(name).tobytes() == array.tobytes()


def test_strided_arrays_are_written_in_c_order(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    gguf_write.write(tmp_path / "x", {}, [("t", array.T), ("s", array[:, ::2, ::-1])])
    model = gguf_read.read(tmp_path / "x")
    assert np.array_equal(model.array("t"), array.T)
    assert np.array_equal(model.array("s"), array[:, ::2, ::-1])


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    shape, made = (1 << 18,), []

    def tensor(i: int) -> LazyArray:
        return LazyArray(shape, np.dtype(np.float32), lambda: made.append(i) or np.full(shape, i, np.float32))

    tracemalloc.start()
    gguf_write.write(tmp_path / "x", {}, [(f"t{i}", tensor(i)) for i in range(16)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made == list(range(16))
    assert peak < 3 << 20  # one is 1 MiB
    assert gguf_read.read(tmp_path / "x").array("t9")[-1] == 9


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"before")

    def fail() -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        gguf_write.write(path, {}, [("a", LazyArray((2,), np.dtype(np.float32), fail))])
    wrong = LazyArray((2,), np.dtype(np.float32), lambda: np.zeros(3, np.float32))
    with pytest.raises(UsageError, match=r"tensor 'a': float32 \(3,\) is not float32 \(2,\)"):
        gguf_write.write(path, {}, [("a", wrong)])
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_a_real_model_is_rewritten_byte_for_byte(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "models/stories260K.gguf"
    model = gguf_read.read(source)
    gguf_write.write(tmp_path / "x.gguf", model.metadata.typed(), ((n, model.array(n)) for n in model.tensors))
    assert (tmp_path / "x.gguf").read_bytes() == source.read_bytes()


# --- oracles -------------------------------------------------------------------------------------------


def example(path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tensors = {
        f"t.{dtype.name}.{len(shape)}": rng.standard_normal(shape).astype(dtype)
        for dtype in DTYPES
        for shape in ((5,), (3, 4), (2, 3, 4), (2, 1, 3, 5))
    }
    metadata = {key: value for key, (value, _) in TYPED.items() if np.size(value)}
    gguf_write.write(path, {"general.architecture": "llama", **metadata}, tensors.items())
    return {"tensors": tensors, "metadata": metadata}


@pytest.mark.oracle
def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    gguf = need_oracle("gguf")
    wrote = example(tmp_path / "x.gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    for key, value in wrote["metadata"].items():
        assert np.array_equal(reader.fields[key].contents(), value), key
    for tensor in reader.tensors:
        ours = wrote["tensors"][tensor.name]
        assert tensor.data.tobytes() == ours.tobytes()
        assert list(reversed(tensor.shape.tolist())) == list(ours.shape)


@pytest.mark.oracle
def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    gguf = need_oracle("gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    array = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    writer.add_array("words", ["a", "é", ""])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("eps", 1e-5)
    writer.add_bool("flag", True)
    writer.add_tensor("a", array)
    writer.add_tensor("b", array.astype(np.float16)[0])
    writer.add_tensor("q", gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q4_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q4_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = gguf_read.read(tmp_path / "x.gguf")
    assert model.metadata["words"] == ["a", "é", ""]
    assert model.metadata["numbers"].tolist() == [1, 2, 3]
    assert model.metadata["eps"] == np.float32(1e-5)
    assert model.metadata["flag"] is True
    assert np.array_equal(model.array("a"), array)
    assert np.array_equal(model.array("b"), array.astype(np.float16)[0])
    assert model.tensors["q"].shape == (4, 64)
    assert model.raw("q").tobytes() == gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q4_0).tobytes()


class Params(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


@pytest.mark.oracle
def test_llama_cpp_reads_what_we_write(tmp_path: Path) -> None:
    xllamacpp = need_oracle("xllamacpp")
    library = ctypes.CDLL(str(next(Path(xllamacpp.__path__[0]).glob("*.so"))))
    library.gguf_init_from_file.argtypes = (ctypes.c_char_p, Params)
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_get_n_tensors.argtypes = library.gguf_get_n_kv.argtypes = (ctypes.c_void_p,)
    library.gguf_get_n_tensors.restype = library.gguf_get_n_kv.restype = ctypes.c_int64
    wrote = example(tmp_path / "x.gguf")
    context = library.gguf_init_from_file(bytes(tmp_path / "x.gguf"), Params(False, ctypes.pointer(ctypes.c_void_p())))
    assert context
    assert library.gguf_get_n_tensors(context) == len(wrote["tensors"])
    assert library.gguf_get_n_kv(context) == len(wrote["metadata"]) + 1
