"""The GGUF reader against llama.cpp's verdicts, hostile files and every small damage."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from formats.gguf_bytes import array, gguf, small, text, u32, u64
from hypothesis import given
from hypothesis import strategies as st

from entrenar.errors import FormatError, UnsupportedError
from entrenar.formats import gguf_read

pytestmark = pytest.mark.tier2

VALID = small()
TENSORS = [("a", (8,), 0, 0), ("b", (4, 2), 1, 32)]


def test_every_kind_of_value() -> None:
    model = gguf_read.parse(VALID)
    values = {key: model.metadata[key] for key in model.metadata}
    assert values["u8"] == 7
    assert values["i16"] == -2
    assert values["f64"] == 0.5
    assert values["flag"] is True
    assert values["name"] == "é"
    assert values["words"] == ["a", "", "bc"]
    assert values["numbers"].tolist() == [1, -2, 3]
    assert values["flags"].tolist() == [False, True]
    assert model.metadata.type_name("numbers") == "array of i32"
    assert model.metadata.type_name("u8") == "u8"
    assert model.metadata.length("words") == 3
    assert model.metadata.length("u8") is None
    assert len(model.metadata) == 9
    assert "u8" in model.metadata
    assert model.metadata["words"] is values["words"]  # decoded once
    assert model.metadata.get("absent") is None


def test_tensors_have_numpy_order_and_read_only_views() -> None:
    model = gguf_read.parse(VALID)
    assert model.tensors["a.weight"].shape == (2, 3)
    values = model.array("a.weight")
    assert values.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert values.dtype == np.float32
    assert not values.flags.writeable
    assert model.raw("b.weight").size == 34
    assert model.file_bytes == len(VALID)
    assert model.problems() == []


def test_a_tensor_that_is_not_there() -> None:
    model = gguf_read.parse(VALID, "x.gguf")
    with pytest.raises(FormatError, match=r"x\.gguf: tensor 'c': is not in the file"):
        model.array("c")


@pytest.mark.parametrize("version", [2, 3])
def test_versions_2_and_3(version: int) -> None:
    assert gguf_read.parse(gguf(version=version)).version == version


@pytest.mark.parametrize("alignment", [1, 2, 8, 64, 1 << 20])
def test_any_power_of_two_aligns(alignment: int) -> None:
    offset = -(-32 // alignment) * alignment
    tensors = [("a", (8,), 0, 0), ("b", (4,), 0, offset)]
    values = np.arange(12, dtype="<f4")
    data = values[:8].tobytes() + bytes(offset - 32) + values[8:].tobytes()
    file = gguf([("general.alignment", 4, u32(alignment))], tensors, data, alignment=alignment)
    model = gguf_read.parse(file)
    assert model.array("a").tolist() + model.array("b").tolist() == values.tolist()


def test_the_largest_that_is_allowed() -> None:
    most = 2**63 - 1
    model = gguf_read.parse(gguf([("k" * 65_535, 4, u32(1))], [("n" * 63, (most,), 24, 0)]))
    assert model.metadata["k" * 65_535] == 1
    assert model.tensors["n" * 63].nbytes == most
    assert gguf_read.parse(gguf()).problems() == []


def test_the_last_padding_may_be_absent_but_not_cut() -> None:
    file = gguf((), [("a", (2,), 0, 0)], bytes(8))
    assert gguf_read.parse(file).array("a").tolist() == [0, 0]
    with pytest.raises(FormatError, match="cut short"):
        gguf_read.parse(file + bytes(3))


def test_a_header_without_data_reads_and_says_so() -> None:
    model = gguf_read.parse(gguf((), TENSORS), "x.gguf")
    assert model.problems() == ["x.gguf: well formed, but the data of its 2 tensors is not in the file"]
    for touch in (model.raw, model.array):
        with pytest.raises(FormatError, match=r"x\.gguf: tensor 'b': has no data"):
            touch("b")


def test_text_that_is_no_utf8_is_an_error_when_asked_for() -> None:
    pairs = [("good", 4, u32(1)), ("one", 8, text(b"ab\xff")), ("many", 9, array(8, 2, text("a") + text(b"\x80")))]
    file = gguf(pairs)
    model = gguf_read.parse(file, "x.gguf")
    assert model.metadata["good"] == 1
    for key, byte in (("one", b"\xff"), ("many", b"\x80")):
        with pytest.raises(FormatError, match=rf"x\.gguf: byte {file.index(byte)}: key '{key}'.*UTF-8"):
            model.metadata[key]


# --- faults, each with the reason that must be given ---------------------------------------------------

BIG = 2**63
STRING = [("k", 8, u64(BIG))]
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "begins with"),
    "magic": (gguf(magic=b"GGML"), "byte 0: begins with b'GGML'"),
    "only magic": (b"GGUF", "byte 4: version takes 4 bytes"),
    "version 1": (gguf(version=1), "version 1"),
    "version 4": (gguf(version=4), "version 4"),
    "version 0": (gguf(version=0), "version 0"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "key count": (gguf(n_keys=2**64 - 1), "byte 16: number of keys"),
    "tensor count": (gguf(n_tensors=2**64 - 1), "byte 8: number of tensors"),
    "counts together": (gguf(n_tensors=2, n_keys=2) + bytes(50), "do not fit"),
    "count beyond the limit": (gguf(n_keys=20_000) + bytes(13 * 20_000), "at most 16384"),
    "key length": (gguf(n_keys=1) + u64(BIG) + bytes(20), "a key is 9223372036854775808 bytes long"),
    "key goes on": (gguf(n_keys=1) + u64(60) + bytes(20), "a key takes 60 bytes"),
    "key's UTF-8": (gguf(n_keys=1) + text(b"a\xc3\x28") + u32(4) + u32(0), "byte 33: a key is not valid UTF-8"),
    "duplicate key": (gguf([("k", 4, u32(1)), ("k", 4, u32(1))]), "key 'k' is there twice"),
    "value type": (gguf([("k", 13, u64(0))]), "unknown type 13"),
    "element type": (gguf([("k", 9, array(99, 0, b""))]), "unknown type 99"),
    "nested array": (gguf([("k", 9, array(9, 1, array(0, 1, b"a")))]), "byte 37: key 'k' is an array of"),
    "array length": (gguf([("k", 9, array(0, BIG, b"abc"))]), "the 3 bytes left can't hold that"),
    "string array length": (gguf([("k", 9, array(8, 2, text("ab")))]), "the 10 bytes left can't hold that"),
    "string length": (gguf(STRING), "beyond the end of the file"),
    "string in an array": (gguf([("k", 9, array(8, 2, u64(BIG) + u64(0)))]), "ends inside its strings"),
    "wrapping strings": (gguf([("k", 9, array(8, 2, u64(2**64 - 8) * 2))]), "ends inside its strings"),
    "value cut": (gguf([("k", 10, b"1234")]), "key 'k' takes 8 bytes, the file has 4 left"),
    "alignment 0": (gguf([("general.alignment", 4, u32(0))]), "is 0, not a power of two"),
    "alignment 13": (gguf([("general.alignment", 4, u32(13))]), "is 13, not a power of two"),
    "alignment 2 MiB": (gguf([("general.alignment", 4, u32(1 << 21))]), "not a power of two up to"),
    "alignment u64": (gguf([("general.alignment", 10, u64(32))]), "must be a single u32"),
    "alignment array": (gguf([("general.alignment", 9, array(4, 1, u32(32)))]), "must be a single u32"),
    "tensor's name": (gguf((), [("n" * 64, (8,), 0, 0)], bytes(32)), "64 bytes long; at most 63"),
    "rank 5": (gguf((), [("a", (1,) * 5, 0, 0)], bytes(32)), "5 dimensions"),
    "dimension 0": (gguf((), [("a", (8, 0), 0, 0)], bytes(32)), "impossible shape"),
    "negative dimension": (gguf((), [("a", (2**64 - 1,), 0, 0)], bytes(32)), "impossible shape"),
    "product wraps": (gguf((), [("a", (2**32, 2**32), 0, 0)], bytes(32)), "impossible shape"),
    "product wraps to 1": (gguf((), [("a", (2**63, 2, 1, 1), 0, 0)], bytes(32)), "impossible shape"),
    "bytes wrap": (gguf((), [("a", (2**62,), 0, 0)], bytes(32)), "impossible shape"),
    "tensor type": (gguf((), [("a", (8,), 200, 0)], bytes(32)), "unknown type 200"),
    "removed tensor type": (gguf((), [("a", (32,), 4, 0)], bytes(32)), "unknown type 4"),
    "broken block": (gguf((), [("a", (48, 2), 8, 0)], bytes(64)), "rows of 48 don't fill q8_0 blocks of 32"),
    "duplicate tensor": (gguf((), [("a", (8,), 0, 0), ("a", (8,), 0, 32)], bytes(64)), "tensor 'a': is there twice"),
    "first offset": (gguf((), [("a", (8,), 0, 32)], bytes(64)), "has offset 32; 0 comes next"),
    "overlap": (gguf((), [("a", (8,), 0, 0), ("b", (8,), 0, 0)], bytes(64)), "has offset 0; 32 comes next"),
    "hole": (gguf((), [("a", (8,), 0, 0), ("b", (8,), 0, 64)], bytes(96)), "has offset 64; 32 comes next"),
    "unaligned": (gguf((), [("a", (2,), 0, 0), ("b", (8,), 0, 8)], bytes(64)), "has offset 8; 32 comes next"),
    "offset wraps": (gguf((), [("a", (8,), 0, 2**64 - 32)], bytes(64)), "comes next"),
    "data cut": (gguf((), TENSORS, bytes(40)), "tensor 'b': ends at byte"),
    "no room for padding": (gguf((), TENSORS, alignment=1), "ends before its tensor data"),
}  # fmt: skip


@pytest.mark.tier1
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_typed_error_that_says_why(name: str) -> None:
    file, reason = FAULTS[name]
    with pytest.raises(FormatError) as caught:
        gguf_read.parse(file, "x.gguf")
    assert caught.value.path == "x.gguf"
    assert caught.value.where
    assert reason in str(caught.value)


def test_faults_cost_no_memory() -> None:
    """A length of 2^63 in a file of 1 MB: what is allocated stays far below the file's size."""
    filler = bytes(1 << 20)
    hostile = [
        gguf(n_keys=1) + text("k") + u32(9) + array(8, len(filler) // 8, filler[:-8] + u64(BIG)),
        gguf(n_keys=1) + text("k") + u32(9) + array(0, BIG, filler),
        gguf(n_keys=16_000, n_tensors=16_000) + filler,
        gguf(n_tensors=1) + text("a") + u32(4) + u64(BIG) * 4 + u32(0) + u64(0) + filler,
    ]
    for file in hostile:
        tracemalloc.start()
        with pytest.raises(FormatError):
            gguf_read.parse(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 16


def test_the_most_keys_and_tensors_fit_into_16_mib() -> None:
    tensors = [(f"{i}", (1,), 24, i * 32) for i in range(16_384)]
    pairs = [(f"{i}", 0, b"1") for i in range(16_384)]
    file = gguf(pairs, tensors)
    tracemalloc.start()
    model = gguf_read.parse(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(model.tensors) == len(model.metadata) == 16_384
    assert peak < 16 << 20


def accepts(file: bytes) -> bool:
    """True for a valid read with every value and tensor touched; a FormatError is False; anything else raises."""
    try:
        model = gguf_read.parse(file)
        for key in model.metadata:
            assert model.metadata[key] is not None
        for name, info in model.tensors.items():
            if info.qtype.name == "f32":
                assert model.array(name).shape == info.shape
            else:
                assert model.raw(name).size == info.nbytes
    except FormatError:
        return False
    return True


def test_every_truncation_is_refused_or_reads() -> None:
    header_alone = len(VALID) - 96
    unpadded = len(VALID) - 30
    readable = [cut for cut in range(len(VALID)) if accepts(VALID[:cut])]
    assert readable == [unpadded]
    assert gguf_read.parse(VALID[:header_alone]).problems()


def test_every_flipped_byte_is_refused_or_reads() -> None:
    rng = random.Random(0)
    outcomes = set()
    for at in range(len(VALID)):
        for mask in (1, 0x80, 0xFF, rng.randrange(1, 256)):
            damaged = bytearray(VALID)
            damaged[at] ^= mask
            outcomes.add(accepts(bytes(damaged)))
    assert outcomes == {True, False}


@given(st.data())
def test_several_damages_at_once(data: st.DataObject) -> None:
    damaged = bytearray(VALID)
    for at in data.draw(st.lists(st.integers(0, len(VALID) - 1), min_size=1, max_size=8)):
        damaged[at] = data.draw(st.integers(0, 255))
    accepts(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))


# --- typed getters ------------------------------------------------------------------------------------


def test_expect_gives_values_of_the_kind_asked_for() -> None:
    keys = gguf_read.parse(VALID).metadata
    assert keys.expect("u8", "int") == 7
    assert keys.expect("u8", "float") == 7
    assert keys.expect("f64", "float") == 0.5
    assert keys.expect("flag", "bool") is True
    assert keys.expect("name", "str") == "é"
    assert keys.expect("words", "list of str", length=3) == ["a", "", "bc"]
    assert list(keys.expect("numbers", "list of int")) == [1, -2, 3]
    assert keys.expect("absent", "int", 5) == 5


@pytest.mark.parametrize(
    ("key", "kind", "length", "reason"),
    [
        ("absent", "int", None, "is missing"),
        ("f64", "int", None, "is of type f64; int is expected"),
        ("flag", "int", None, "is of type bool; int is expected"),
        ("u8", "bool", None, "is of type u8; bool is expected"),
        ("u8", "str", None, "is of type u8; str is expected"),
        ("words", "str", None, "is of type array of string; str is expected"),
        ("name", "list of str", None, "is of type string; list of str is expected"),
        ("numbers", "list of str", None, "is of type array of i32; list of str is expected"),
        ("numbers", "list of int", 4, "has 3 elements; 4 are expected"),
    ],
)
def test_expect_refuses_other_kinds(key: str, kind: str, length: int | None, reason: str) -> None:
    with pytest.raises(FormatError, match=f"x: key '{key}': {reason}"):
        gguf_read.parse(VALID, "x").metadata.expect(key, kind, length=length)


# --- types --------------------------------------------------------------------------------------------


def test_types_that_are_known_by_size_alone_are_listed_not_decoded() -> None:
    model = gguf_read.parse(gguf((), [("a", (256,), 9, 0)], bytes(288)))
    assert model.tensors["a"].qtype.name == "q8_1"
    assert model.raw("a").size == 288
    with pytest.raises(UnsupportedError, match="tensor 'a': is of type q8_1"):
        model.array("a")


def test_quantized_types_become_f16_or_f32_where_f16_overflows() -> None:
    block = struct.pack("<e32b", 0.5, *range(-16, 16))
    huge = struct.pack("<e32b", 60000.0, *range(-16, 16))
    model = gguf_read.parse(gguf((), [("a", (32, 2), 8, 0), ("b", (32,), 8, 96)], block * 2 + bytes(28) + huge))
    small_values, large_values = model.array("a"), model.array("b")
    assert small_values.dtype == np.float16
    assert small_values.shape == (2, 32)
    assert small_values[1].tolist() == [0.5 * q for q in range(-16, 16)]
    assert large_values.dtype == np.float32
    assert large_values.tolist() == [float(np.float16(60000.0)) * q for q in range(-16, 16)]


# --- files --------------------------------------------------------------------------------------------


def shards(folder: Path, count: int = 3) -> list[Path]:
    """`count` shards, shard i with the tensor "t<i>" of value i."""
    paths = []
    for i in range(count):
        pairs = [
            ("split.no", 2, struct.pack("<H", i)),
            ("split.count", 2, struct.pack("<H", count)),
            ("split.tensors.count", 5, u32(count)),
        ]
        path = folder / f"m-{i + 1:05}-of-{count:05}.gguf"
        path.write_bytes(gguf(pairs, [(f"t{i}", (1,), 0, 0)], struct.pack("<f", i)))
        paths.append(path)
    return paths


def test_shards_are_one_model_whichever_is_named(tmp_path: Path) -> None:
    for path in shards(tmp_path):
        model = gguf_read.read(path)
        assert [model.array(f"t{i}").item() for i in range(3)] == [0, 1, 2]
        assert model.file_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
        model.release("t2")
        assert model.array("t2").item() == 2


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    paths[1].unlink()
    with pytest.raises(FormatError, match=r"m-00002-of-00003\.gguf: can't be read: No such file"):
        gguf_read.read(paths[0])


def test_shards_must_be_what_their_names_say(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    contents = [path.read_bytes() for path in paths]
    paths[2].write_bytes(contents[1])
    with pytest.raises(FormatError, match=r"m-00003.*'split\.no': is 1; by its name the file is 2"):
        gguf_read.read(paths[0])
    paths[2].write_bytes(contents[2].replace(b"t2", b"t1"))
    with pytest.raises(FormatError, match=r"m-00003.*tensor 't1': is in an earlier shard"):
        gguf_read.read(paths[0])
    paths[0].write_bytes(contents[0].replace(u32(5) + u32(3), u32(5) + u32(4)))
    paths[2].write_bytes(contents[2])
    with pytest.raises(FormatError, match=r"split\.tensors\.count': is 4; the shards hold 3"):
        gguf_read.read(paths[1])
    renamed = paths[0].rename(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match="is 3, but the name lacks"):
        gguf_read.read(renamed)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="can't be read: No such file"):
        gguf_read.read(tmp_path / "absent.gguf")
    with pytest.raises(FormatError, match="can't be read: Is a directory"):
        gguf_read.read(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(FormatError, match="begins with b''"):
        gguf_read.read(tmp_path / "empty.gguf")
    with pytest.raises(FormatError, match="is not a regular file"):
        gguf_read.read("/dev/null")


def test_verdicts_are_llama_cpps(shared_data: Path) -> None:
    verdicts = json.loads((shared_data / "gguf/verdicts.json").read_text())
    ours = {}
    for name in verdicts:
        try:
            gguf_read.validate(shared_data / "gguf" / name)
            ours[name] = True
        except FormatError as error:
            ours[name] = not error.where  # every refusal says where
    assert ours == {name: verdict["accept"] for name, verdict in verdicts.items()}


def test_real_vocabularies(shared_data: Path) -> None:
    for name, words, first, last in (
        ("qwen2", 151936, "!", "[PAD151935]"),
        ("phi-3", 32064, "<unk>", "<|placeholder6|>"),
        ("gpt-2", 50257, "!", "<|endoftext|>"),
    ):
        keys = gguf_read.read(shared_data / f"tokenizers/ggml-vocab-{name}.gguf").metadata
        tokens = keys.expect("tokenizer.ggml.tokens", "list of str")
        assert len(tokens) == words
        assert tokens[0] == first
        assert len(keys.expect("tokenizer.ggml.token_type", "list of int", length=words)) == words
        assert last in tokens
