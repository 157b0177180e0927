"""Read and write safetensors: single files, and directories sharded by `model.safetensors.index.json`.

The header is scanned entry by entry, so that a hostile one costs no more memory than its own size, and
tensors are views of the mapped file: the `safetensors` package would copy each and keep both in memory
(docs/decisions/safetensors.md). Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from entrenar.errors import FormatError, UnsupportedError, UsageError
from entrenar.formats.files import (
    Array,
    Buffer,
    LazyArray,
    PathType,
    as_bytes,
    atomic_file,
    forget_pages,
    map_file,
    read_json,
    view,
    write_json,
)

MAX_HEADER = 100_000_000  # bytes
MAX_TENSORS = 1 << 17  # in one file
MAX_RANK = 32
MAX_SIZE = 2**63 - 1
SHARD_SIZE = 5_000_000_000  # bytes, as transformers has it
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# name in the file -> (bits of one element, numpy type; None where numpy has none)
DTYPES: dict[str, tuple[int, np.dtype[Any] | None]] = {
    "F64": (64, np.dtype("<f8")),
    "F32": (32, np.dtype("<f4")),
    "F16": (16, np.dtype("<f2")),
    "BF16": (16, np.dtype(ml_dtypes.bfloat16)),
    "I64": (64, np.dtype("<i8")),
    "I32": (32, np.dtype("<i4")),
    "I16": (16, np.dtype("<i2")),
    "I8": (8, np.dtype("i1")),
    "U64": (64, np.dtype("<u8")),
    "U32": (32, np.dtype("<u4")),
    "U16": (16, np.dtype("<u2")),
    "U8": (8, np.dtype("u1")),
    "BOOL": (8, np.dtype("?")),
    "F8_E4M3": (8, np.dtype(ml_dtypes.float8_e4m3fn)),
    "F8_E5M2": (8, np.dtype(ml_dtypes.float8_e5m2)),
    "F8_E8M0": (8, np.dtype(ml_dtypes.float8_e8m0fnu)),
    "C64": (64, np.dtype("<c8")),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
}
_NAMES = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's bytes are: `offset` from the start of file number `part`; `dtype` is the name in the
    file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    nbytes: int
    part: int = 0


class SafeTensors(Mapping[str, Array]):
    """name -> array: a read-only view of the mapped file, made when asked for.

    Attributes:
        path: the file or directory; paths: its files; metadata: the first file's `__metadata__`;
        tensors: name -> TensorInfo, in the order of the files' bytes.
    """

    def __init__(self, path: str, files: list[_File]) -> None:
        self.path = path
        self.paths = [file.path for file in files]
        self.metadata = files[0].metadata if files else {}
        self.tensors = {info.name: info for file in files for info in file.tensors}
        self._buffers = [file.buffer for file in files]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def array(self, name: str) -> Array:
        """`self[name]`; a name that is not there is a FormatError, as in `GGUF.array`."""
        if name not in self.tensors:
            raise FormatError(self.path, f"tensor {name!r}", "is not in the file")
        return self[name]

    def __getitem__(self, name: str) -> Array:
        """Raises KeyError for an unknown name, UnsupportedError for an element type that numpy does not
        have."""
        info = self.tensors[name]
        dtype = DTYPES[info.dtype][1]
        if dtype is None:
            raise UnsupportedError(self.paths[info.part], f"tensor {name!r}", f"is of type {info.dtype}")
        if info.nbytes == 0:
            return np.empty(info.shape, dtype)
        return view(self._buffers[info.part], dtype, info.nbytes // dtype.itemsize, info.offset).reshape(info.shape)

    @property
    def file_bytes(self) -> int:
        """Size of the file or files."""
        return sum(map(len, self._buffers))

    def release(self, name: str) -> None:
        """Let the system drop the tensor's pages from memory; they are read again if touched."""
        info = self.tensors[name]
        forget_pages(self._buffers[info.part], info.offset, info.offset + info.nbytes)


def read(path: PathType) -> SafeTensors:
    """Open a safetensors file, or a directory with `model.safetensors` or its sharded index.

    Raises FormatError where a file is missing, malformed or cut short.
    """
    path = Path(path)
    if not path.is_dir():
        return SafeTensors(str(path), [_parse(str(path), map_file(path), 0)])
    if (path / SINGLE).is_file():  # where both are, transformers takes this one, too
        return SafeTensors(str(path), [_parse(str(path / SINGLE), map_file(path / SINGLE), 0)])
    if (path / INDEX).is_file():
        return SafeTensors(str(path), _shards(path / INDEX))
    raise FormatError(path, "", f"has neither {SINGLE} nor {INDEX}")


def parse(buffer: Buffer, path: str = "(memory)") -> SafeTensors:
    """A single file from its bytes; `path` is what errors call it."""
    return SafeTensors(path, [_parse(path, buffer, 0)])


def _shards(index: Path) -> list[_File]:
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise FormatError(index, "weight_map", "must be an object of tensor names and file names")
    files = []
    for part, name in enumerate(sorted(set(weights.values()))):
        if name != Path(name).name or "\\" in name or "\0" in name or name in ("", ".", ".."):
            raise FormatError(index, "weight_map", f"{name!r} is not the name of a file beside it")
        file = _parse(str(index.with_name(name)), map_file(index.with_name(name)), part)
        listed = [info for info in file.tensors if weights.get(info.name) == name]
        files.append(_File(file.path, file.buffer, file.metadata, listed))
    if missing := weights.keys() - {info.name for file in files for info in file.tensors}:
        name = min(missing)
        raise FormatError(index, "weight_map", f"tensor {name!r} is not in {weights[name]}")
    return files


# --- the header -----------------------------------------------------------------------------------------

_JSON = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_ENTRY = re.compile(r"\{[^{}]{0,4096}\}")  # a tensor's entry: flat, short


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    buffer: Buffer
    metadata: dict[str, str]
    tensors: list[TensorInfo]


class _Scanner:
    """A place in the header's JSON text."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text
        self.at = 0

    def error(self, reason: str) -> FormatError:
        return FormatError(self.path, f"header, character {self.at}", reason)

    def take(self, *choices: str) -> str:
        """The next character that is not a space, one of `choices`."""
        self.space()
        found = self.text[self.at : self.at + 1]
        if found not in choices or not found:
            raise self.error(f"{found!r} where {' or '.join(choices)} is expected")
        self.at += 1
        return found

    def space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def string(self) -> str:
        self.take('"')
        try:
            value, self.at = _JSON.raw_decode(self.text, self.at - 1)
        except ValueError as error:
            raise self.error(f"a bad string: {error}") from error
        return str(value)

    def entry(self) -> dict[str, Any]:
        """A tensor's description."""
        self.space()
        match = _ENTRY.match(self.text, self.at)
        if match is None:
            raise self.error("a tensor's entry must be a flat object of at most 4096 characters")
        try:
            pairs: list[tuple[str, Any]] = json.loads(match[0], object_pairs_hook=list)
        except (ValueError, RecursionError) as error:
            raise self.error(f"a tensor's entry is not valid JSON: {error}") from error
        fields = dict(pairs)
        if len(pairs) != 3 or fields.keys() != {"dtype", "shape", "data_offsets"}:
            raise self.error("a tensor's entry must have dtype, shape and data_offsets, once each")
        self.at = match.end()
        return fields

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here; the caller takes each value before it goes on."""
        seen = set()
        self.take("{")
        self.space()
        if self.text.startswith("}", self.at):
            self.at += 1
            return
        while True:
            key = self.string()
            if key in seen:
                raise self.error(f"{key!r} is there twice")
            seen.add(key)
            self.take(":")
            yield key
            if self.take(",", "}") == "}":
                return


def _parse(path: str, buffer: Buffer, part: int) -> _File:
    size = len(buffer)
    if size < 8:
        raise FormatError(path, "byte 0", f"the file has {size} bytes; a safetensors file begins with 8 of length")
    (length,) = struct.unpack_from("<Q", buffer)
    if length > min(MAX_HEADER, size - 8):
        limit = min(MAX_HEADER, size - 8)
        raise FormatError(path, "byte 0", f"the header's length is {length}; here it can be at most {limit}")
    if buffer[8:9] != b"{":
        raise FormatError(path, "byte 8", f"the header begins with {buffer[8:9]!r}, not with b'{{'")
    try:
        text = buffer[8 : 8 + length].decode()
    except UnicodeDecodeError as error:
        raise FormatError(path, f"byte {8 + error.start}", "the header is not valid UTF-8") from error
    scanner = _Scanner(path, text)
    metadata: dict[str, str] = {}
    tensors = []
    for name in scanner.members():
        if name == "__metadata__":
            for key in scanner.members():
                metadata[key] = scanner.string()
            continue
        tensors.append(_tensor(scanner, name, scanner.entry(), 8 + length, part))
        if len(tensors) > MAX_TENSORS:
            raise scanner.error(f"more than {MAX_TENSORS} tensors")
    if scanner.text[scanner.at :].strip(" "):
        raise scanner.error("the header goes on after its end")
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    end = 8 + length
    for info in tensors:
        if info.offset != end:
            reason = f"begins at byte {info.offset}; the data before it ends at {end}"
            raise FormatError(path, f"tensor {info.name!r}", reason)
        end += info.nbytes
    if end != size:
        raise FormatError(path, f"byte {min(end, size)}", f"the tensors end at byte {end}, the file has {size}")
    return _File(path, buffer, metadata, tensors)


def _tensor(scanner: _Scanner, name: str, entry: dict[str, Any], data: int, part: int) -> TensorInfo:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    where = f"tensor {name!r}"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(scanner.path, where, f"has the unknown dtype {dtype!r}")
    if not _sizes(shape) or len(shape) > MAX_RANK:
        raise FormatError(scanner.path, where, f"has the impossible shape {shape!r:.80}")
    bits = DTYPES[dtype][0]
    for n in shape:
        if n and bits > MAX_SIZE // n:
            raise FormatError(scanner.path, where, f"has the impossible shape {shape!r:.80}")
        bits *= n
    if not _sizes(offsets) or len(offsets) != 2:
        raise FormatError(scanner.path, where, f"has the impossible data_offsets {offsets!r:.80}")
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:
        reason = f"{dtype} {shape} takes {bits} bits; data_offsets {offsets} give {end - begin} bytes"
        raise FormatError(scanner.path, where, reason)
    return TensorInfo(name, tuple(shape), dtype, data + begin, bits // 8, part)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n <= MAX_SIZE for n in values)


# --- writing --------------------------------------------------------------------------------------------


def header(tensors: Mapping[str, Array | LazyArray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON of a file with these tensors in this order, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, array in tensors.items():
        if name == "__metadata__" or array.dtype not in _NAMES:
            raise UsageError(f"tensor {name!r}: {array.dtype} can't be written to safetensors under this name")
        end = offset + array.nbytes
        entries[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def chunks(tensors: Mapping[str, Array | LazyArray]) -> Iterator[memoryview]:
    """The bytes after the header; a `LazyArray` is made only when its turn comes."""
    for name, array in tensors.items():
        values = array.load() if isinstance(array, LazyArray) else array
        if values.shape != array.shape or values.dtype != array.dtype:
            raise UsageError(f"tensor {name!r}: {values.dtype} {values.shape} is not {array.dtype} {array.shape}")
        yield as_bytes(values)


def write(path: PathType, tensors: Mapping[str, Array | LazyArray], metadata: Mapping[str, str] | None = None) -> int:
    """Write one file, atomically; returns its size. `metadata` defaults to {"format": "pt"}, which PEFT and
    transformers expect. Raises UsageError for a type that can't be written."""
    head = header(tensors, {"format": "pt"} if metadata is None else metadata)
    with atomic_file(path) as file:
        file.write(head)
        for chunk in chunks(tensors):
            file.write(chunk)
        return file.size


def write_directory(
    path: PathType, tensors: Mapping[str, Array | LazyArray], shard_size: int = SHARD_SIZE
) -> list[str]:
    """Write `model.safetensors` into a directory, or shards of at most `shard_size` bytes of tensors and
    their index, as transformers names them. Returns the names of the files; the index, which makes shards a
    model, comes last, and the single file or index of an earlier save, which would be read instead, goes."""
    path = Path(path)
    groups: list[dict[str, Array | LazyArray]] = [{}]
    filled = 0
    for name, array in tensors.items():
        if groups[-1] and filled + array.nbytes > shard_size:
            groups.append({})
            filled = 0
        groups[-1][name] = array
        filled += array.nbytes
    if len(groups) == 1:
        write(path / SINGLE, tensors)
        (path / INDEX).unlink(missing_ok=True)
        return [SINGLE]
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        write(path / name, group)
    weights = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    total = sum(array.nbytes for array in tensors.values())
    write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weights})
    (path / SINGLE).unlink(missing_ok=True)
    return [*names, INDEX]
