"""safetensors: round trips, the safetensors package as a second opinion, hostile headers, sharded directories."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from entrenar.errors import FormatError, UnsupportedError, UsageError
from entrenar.formats import safetensors as ours
from entrenar.formats.files import LazyArray

pytestmark = pytest.mark.tier2

BF16 = np.dtype(ml_dtypes.bfloat16)
BOTH_KNOW = [np.dtype(t) for t in ("f4", "f2", "f8", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")] + [BF16]


def entry(dtype: str, shape: Any, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pack(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"a": entry("F32", [2, 3], 0, 24)}
VALID = pack({"__metadata__": {"format": "pt", "é": '"'}, "b": entry("BF16", [3], 24, 30), **ONE}, bytes(range(30)))


@given(st.data())
def test_round_trips_agree_with_the_safetensors_package(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    tensors = {}
    for name in data.draw(st.lists(st.text(max_size=5).filter(lambda s: s != "__metadata__"), unique=True, max_size=4)):
        dtype = data.draw(st.sampled_from(BOTH_KNOW))
        shape = data.draw(hn.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        raw = data.draw(hn.arrays(np.uint8, (*shape, dtype.itemsize), elements=st.integers(0, 1)))
        tensors[name] = raw.view(dtype).reshape(shape)
    size = ours.write(folder / "a", tensors)
    theirs = safetensors.numpy.load_file(folder / "a")
    safetensors.numpy.save_file(tensors, folder / "b")
    for result in (ours.read(folder / "a"), ours.read(folder / "b"), theirs):
        assert set(result) == set(tensors)
        for name, array in tensors.items():
            assert result[name].dtype == array.dtype
            assert result[name].shape == array.shape
            assert result[name].tobytes() == array.tobytes()
    assert size == (folder / "a").stat().st_size


def test_metadata_is_that_of_pytorch_by_default(tmp_path: Path) -> None:
    array = {"a": np.zeros(1, np.float32)}
    ours.write(tmp_path / "a", array)
    ours.write(tmp_path / "b", array, {"k": "é\n"})
    with safetensors.safe_open(tmp_path / "a", "np") as file:
        assert file.metadata() == {"format": "pt"} == ours.read(tmp_path / "a").metadata
    with safetensors.safe_open(tmp_path / "b", "np") as file:
        assert file.metadata() == {"k": "é\n"} == ours.read(tmp_path / "b").metadata


def test_views_are_lazy_and_read_only() -> None:
    weights = ours.parse(VALID)
    assert list(weights) == ["a", "b"]
    assert "a" in weights
    assert weights.file_bytes == len(VALID)
    assert len(weights) == 2
    assert weights.tensors["a"].shape == (2, 3)
    assert not weights["a"].flags.writeable
    assert weights["b"].tobytes() == bytes(range(24, 30))
    assert weights.metadata == {"format": "pt", "é": '"'}
    assert weights.array("a").tolist() == weights["a"].tolist()
    with pytest.raises(KeyError):
        weights["c"]
    with pytest.raises(FormatError, match="tensor 'c': is not in the file"):
        weights.array("c")


def test_types_that_numpy_lacks_are_listed_not_given() -> None:
    weights = ours.parse(pack({"a": entry("F4", [4], 0, 2)}, b"12"), "x")
    assert weights.tensors["a"].nbytes == 2
    with pytest.raises(UnsupportedError, match="x: tensor 'a': is of type F4"):
        weights["a"]


def test_types_that_safetensors_lacks_are_refused(tmp_path: Path) -> None:
    for tensors in ({"a": np.zeros(1, np.complex128)}, {"__metadata__": np.zeros(1, np.float32)}):
        with pytest.raises(UsageError, match="can't be written"):
            ours.write(tmp_path / "x", tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_lazy_array_must_be_what_it_announced(tmp_path: Path) -> None:
    wrong = LazyArray((2,), np.dtype(np.float32), lambda: np.zeros(2, np.float16))
    with pytest.raises(UsageError, match=r"tensor 'a': float16 \(2,\) is not float32 \(2,\)"):
        ours.write(tmp_path / "x", {"a": wrong})
    assert list(tmp_path.iterdir()) == []


FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "byte 0: the file has 0 bytes"),
    "short": (b"1234567", "the file has 7 bytes"),
    "length beyond the file": (pack(ONE, bytes(24))[:-60], "can be at most"),
    "length 2^63": (struct.pack("<Q", 2**63) + b"{}", "the header's length is 9223372036854775808"),
    "length a little beyond": (struct.pack("<Q", 4) + b"{}", "the header's length is 4; here it can be at most 2"),
    "no object": (pack(b"[]"), "begins with b'['"),
    "no header": (pack(b""), "begins with b''"),
    "leading space": (pack(b" {}"), "begins with b' '"),
    "UTF-8": (pack(b'{"\xff":1}'), "byte 10: the header is not valid UTF-8"),
    "unclosed": (pack(b"{"), "is expected"),
    "no key": (pack(b"{1:2}"), "\" is expected"),
    "no colon": (pack(b'{"a" 1}'), ": is expected"),
    "bad string": (pack(b'{"a\\x": 1}'), "a bad string"),
    "trailing comma": (pack(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},}'), "is expected"),
    "trailing text": (pack(b"{} x"), "goes on after its end"),
    "trailing newline": (pack(b"{}\n"), "goes on after its end"),
    "entry is a number": (pack(b'{"a":1}'), "must be a flat object"),
    "entry is deep": (pack(b'{"a":{"dtype":{"x":1}}}'), "must be a flat object"),
    "entry is long": (pack(b'{"a":{"shape":[' + b"1," * 3000 + b"1]}}"), "must be a flat object"),
    "entry nests lists": (pack(b'{"a":{"shape":' + b"[" * 2000 + b"]" * 2000 + b"}}"), "a tensor's entry"),
    "entry is no JSON": (pack(b'{"a":{dtype}}'), "is not valid JSON"),
    "endless integer": (pack(b'{"a":{"shape":[' + b"9" * 4000 + b"]}}"), "a tensor's entry must have"),
    "field twice": (pack(b'{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"1"), "once each"),
    "field missing": (pack({"a": {"dtype": "U8", "shape": [1]}}, b"1"), "once each"),
    "field unknown": (pack({"a": entry("U8", [1], 0, 1) | {"x": 1}}, b"1"), "once each"),
    "tensor twice": (pack(b'{"a":%b,"a":%b}' % ((json.dumps(entry("U8", [1], 0, 1)).encode(),) * 2), b"1"), "twice"),
    "metadata twice": (pack(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "metadata's key twice": (pack(b'{"__metadata__":{"k":"1","k":"2"}}'), "'k' is there twice"),
    "metadata is no text": (pack({"__metadata__": {"a": 1}}), '" is expected'),
    "metadata is a list": (pack({"__metadata__": []}), "{ is expected"),
    "unknown dtype": (pack({"a": entry("F3", [1], 0, 1)}, b"1"), "tensor 'a': has the unknown dtype 'F3'"),
    "dtype is a number": (pack({"a": entry(3, [1], 0, 1)}, b"1"), "has the unknown dtype 3"),
    "shape is a number": (pack({"a": entry("U8", 1, 0, 1)}, b"1"), "impossible shape 1"),
    "negative dimension": (pack({"a": entry("U8", [-1], 0, 1)}, b"1"), "impossible shape"),
    "boolean dimension": (pack({"a": entry("U8", [True], 0, 1)}, b"1"), "impossible shape"),
    "real dimension": (pack({"a": entry("U8", [1.0], 0, 1)}, b"1"), "impossible shape"),
    "many dimensions": (pack({"a": entry("U8", [1] * 33, 0, 1)}, b"1"), "impossible shape"),
    "product beyond 2^63": (pack({"a": entry("U8", [2**32, 2**32], 0, 0)}), "impossible shape"),
    "product wraps to 0": (pack({"a": entry("F32", [2**62, 4], 0, 0)}), "impossible shape"),
    "negative offset": (pack({"a": entry("U8", [1], -1, 0)}), "impossible data_offsets"),
    "one offset": (pack({"a": entry("U8", [1], 0, 1) | {"data_offsets": [1]}}, b"1"), "impossible data_offsets"),
    "offsets swapped": (pack({"a": entry("U8", [1], 1, 0)}, b"1"), "give -1 bytes"),
    "size": (pack({"a": entry("F32", [2], 0, 4)}, b"1234"), "takes 64 bits; data_offsets [0, 4] give 4 bytes"),
    "half a byte": (pack({"a": entry("F4", [1], 0, 0)}), "takes 4 bits"),
    "hole before": (pack({"a": entry("U8", [1], 1, 2)}, b"12"), "the data before it ends at"),
    "hole between": (pack({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"123"), "tensor 'b': begins"),
    "overlap": (pack({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"), "tensor 'b': begins"),
    "same bytes": (pack({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, b"12"), "tensor 'b': begins"),
    "data cut": (pack(ONE, bytes(23)), "the tensors end at byte"),
    "data goes on": (pack(ONE, bytes(25)), "the tensors end at byte"),
}  # fmt: skip


@pytest.mark.tier1
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_typed_error_that_says_why(name: str) -> None:
    file, reason = FAULTS[name]
    with pytest.raises(FormatError) as caught:
        ours.parse(file, "x")
    assert caught.value.path == "x"
    assert caught.value.where
    assert reason in str(caught.value)


def test_the_number_of_tensors_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "MAX_TENSORS", 2)
    assert len(ours.parse(VALID)) == 2
    monkeypatch.setattr(ours, "MAX_TENSORS", 1)
    with pytest.raises(FormatError, match="more than 1 tensors"):
        ours.parse(VALID)


def test_faults_cost_no_memory() -> None:
    for text in (
        b'{"a":' + b"[" * (1 << 20),
        b'{"__metadata__":{"a":[' + b"[]," * (1 << 19),
        b'{"a":' + b"{" * (1 << 20),
    ):
        file = pack(text)
        tracemalloc.start()
        with pytest.raises(FormatError):
            ours.parse(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2.1 * len(text)  # the header's bytes and its text


def accepts(file: bytes) -> bool:
    """True for a valid read with every tensor touched; a FormatError is False; anything else raises."""
    try:
        weights = ours.parse(file)
        for name, info in weights.tensors.items():
            assert weights[name].shape == info.shape
    except FormatError:
        return False
    return True


def test_every_truncation_is_refused() -> None:
    assert accepts(VALID)
    assert not any(accepts(VALID[:cut]) for cut in range(len(VALID)))


def test_every_flipped_bit_is_refused_or_reads() -> None:
    outcomes = set()
    for at in range(len(VALID)):
        for bit in range(8):
            damaged = bytearray(VALID)
            damaged[at] ^= 1 << bit
            outcomes.add(accepts(bytes(damaged)))
    assert outcomes == {True, False}


@given(st.data())
def test_what_we_accept_the_safetensors_package_accepts(data: st.DataObject) -> None:
    damaged = bytearray(VALID)
    for at in data.draw(st.lists(st.integers(0, len(VALID) - 1), max_size=4)):
        damaged[at] = data.draw(st.sampled_from(b'0123456789"{}[]:, aFU\\') | st.integers(0, 255))
    if accepts(bytes(damaged)):
        theirs = dict(safetensors.deserialize(bytes(damaged)))
        for name, array in ours.parse(bytes(damaged)).items():
            assert bytes(theirs[name]["data"]) == array.tobytes()
            assert theirs[name]["shape"] == list(array.shape)


# --- directories --------------------------------------------------------------------------------------

TENSORS = {f"t{i}": np.full((4,), i, np.float32) for i in range(5)}


def test_sharding_follows_the_size(tmp_path: Path) -> None:
    names = ours.write_directory(tmp_path, TENSORS, shard_size=32)
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]
    weights = ours.read(tmp_path)
    assert {name: array.tolist() for name, array in weights.items()} == {n: a.tolist() for n, a in TENSORS.items()}
    assert max((tmp_path / name).stat().st_size for name in names[:3]) < 32 + 300
    index = json.loads((tmp_path / names[3]).read_text())
    assert index["metadata"]["total_size"] == 80
    assert index["weight_map"]["t4"] == names[2]
    weights.release("t4")
    assert weights["t4"].tolist() == [4, 4, 4, 4]
    assert weights.file_bytes == sum((tmp_path / name).stat().st_size for name in names[:3])


def test_saving_again_in_another_form_replaces_the_first(tmp_path: Path) -> None:
    for shard_size in (32, 1000, 32):
        ours.write_directory(tmp_path, {"a": np.full(2, shard_size, np.int64), **TENSORS}, shard_size)
        assert ours.read(tmp_path)["a"].tolist() == [shard_size] * 2


def test_a_small_model_is_one_file(tmp_path: Path) -> None:
    assert ours.write_directory(tmp_path, TENSORS) == ["model.safetensors"]
    assert ours.read(tmp_path)["t3"].tolist() == [3] * 4


def test_the_most_dimensions() -> None:
    assert ours.parse(pack({"a": entry("U8", [1] * 32, 0, 1)}, b"1"))["a"].shape == (1,) * 32


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    assert len(ours.write_directory(tmp_path, TENSORS, shard_size=1)) == 6
    assert set(ours.read(tmp_path)) == set(TENSORS)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "is not the name of a file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "is not the name of a file beside it"),
        ({"weight_map": {"a": ".."}}, "is not the name of a file beside it"),
        ({"weight_map": {"a": ""}}, "is not the name of a file beside it"),
        ({"weight_map": {"a": "b\\c"}}, "is not the name of a file beside it"),
        ({"weight_map": {"a": "b\0c"}}, "is not the name of a file beside it"),
        ({"weight_map": {"a": 1}}, "must be an object of tensor names and file names"),
        ({"weight_map": ["a"]}, "must be an object of tensor names and file names"),
        ({}, "must be an object of tensor names and file names"),
        ({"weight_map": {"t0": "absent.safetensors"}}, r"absent\.safetensors: can't be read: No such file"),
        ({"weight_map": {"t9": "x.safetensors"}}, r"tensor 't9' is not in x\.safetensors"),
        ([], "holds a JSON list; an object is expected"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, index: Any, reason: str) -> None:
    ours.write(tmp_path / "x.safetensors", TENSORS)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=reason):
        ours.read(tmp_path)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"has neither model\.safetensors nor"):
        ours.read(tmp_path)
    with pytest.raises(FormatError, match="can't be read: No such file"):
        ours.read(tmp_path / "absent.safetensors")
