"""Read GGUF v2 and v3 files: `read(path)` gives the keys and, by name, the tensors.

The file is checked whole (gguf_parse.py) and mapped, never copied: keys and tensors are decoded when asked
for, so that a malformed file costs at most its own size + 16 MiB of memory. Every fault is one FormatError
that names the file, the place and the reason. Facts: ggml's docs/gguf.md; the verdicts agree with
llama.cpp's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.errors import FormatError, UnsupportedError
from entrenar.formats import gguf_types as gt
from entrenar.formats.files import Array, Buffer, PathType, copy_pages, forget_pages, map_file, view
from entrenar.formats.gguf_parse import U64, Entry, Part, TensorInfo
from entrenar.formats.gguf_parse import parse as parse_part

_MISSING: Any = object()
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

# kinds of value that `Metadata.expect` knows: kind -> (python classes of a value, or of the values of a list)
_KINDS: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}


class Metadata(Mapping[str, Any]):
    """The key-value pairs: bool, int, float, str, list of str, or a read-only numpy array of numbers.

    Values are decoded when they are asked for, so that a vocabulary of 150,000 strings costs nothing until
    used; a string that is not valid UTF-8 is a FormatError then.
    """

    def __init__(self, path: str, buffer: Buffer, entries: dict[str, Entry]) -> None:
        self.path = path
        self._buffer = buffer
        self._entries = entries
        self._strings: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __getitem__(self, key: str) -> Any:
        entry = self._entries[key]
        if entry.kind.dtype is None:
            if key not in self._strings:
                self._strings[key] = self._take_strings(key, entry)
            return self._strings[key][0] if entry.count is None else self._strings[key]
        count = 1 if entry.count is None else entry.count
        if entry.kind is gt.BOOL:  # ggml takes any byte but 0 for true
            values = view(self._buffer, np.dtype("u1"), count, entry.start) != 0
        else:
            values = view(self._buffer, entry.kind.dtype, count, entry.start)
        return values[0].item() if entry.count is None else values

    def _take_strings(self, key: str, entry: Entry) -> list[str]:
        buffer, unpack, strings, at = self._buffer, U64.unpack_from, [], entry.start
        try:
            for _ in range(1 if entry.count is None else entry.count):
                start = at + 8
                at = start + unpack(buffer, at)[0]
                strings.append(buffer[start:at].decode())
        except UnicodeDecodeError as error:
            at = start + error.start
            raise FormatError(self.path, f"byte {at}", f"key {key!r}: a string is not valid UTF-8") from error
        return strings

    def type_name(self, key: str) -> str:
        """The stored type in words: "u32", "string", "array of i32" …"""
        entry = self._entries[key]
        return entry.kind.name if entry.count is None else f"array of {entry.kind.name}"

    def length(self, key: str) -> int | None:
        """Number of elements of an array, None for a single value; nothing is decoded."""
        return self._entries[key].count

    def typed(self) -> dict[str, Any]:
        """All pairs as `gguf_write` takes them to keep each type: numbers are numpy scalars or arrays."""
        values: dict[str, Any] = {}
        for key, entry in self._entries.items():
            if entry.kind.dtype is not None and entry.count is None:
                values[key] = entry.kind.dtype.type(self[key])
            else:
                values[key] = np.array([], str) if entry.count == 0 and entry.kind is gt.STRING else self[key]
        return values

    def expect(self, key: str, kind: str, default: Any = _MISSING, length: int | None = None) -> Any:
        """The value of `key`, checked to be a "bool", "int", "float" or "str", or a "list of" one of these.

        An integer serves as a float; `length` is that of a list. Raises FormatError that names the key where
        it is absent without a `default`, or of another type or length.
        """
        if key not in self._entries:
            if default is _MISSING:
                raise FormatError(self.path, f"key {key!r}", "is missing")
            return default
        listed = kind.startswith("list of ")
        entry = self._entries[key]
        classes = _KINDS[kind.removeprefix("list of ")]
        sample: object = "" if entry.kind.dtype is None else entry.kind.dtype.type(0).item()
        if listed != (entry.count is not None) or type(sample) not in classes:
            raise FormatError(self.path, f"key {key!r}", f"is of type {self.type_name(key)}; {kind} is expected")
        if length is not None and entry.count != length:
            raise FormatError(self.path, f"key {key!r}", f"has {entry.count} elements; {length} are expected")
        return self[key]


class GGUF:
    """An open GGUF file, or a set of shards that is one model.

    Attributes:
        path, paths: the first file, and all; version, alignment: of the first.
        metadata: the key-value pairs of the first. tensors: name -> TensorInfo, in the files' order.
    """

    def __init__(self, parts: list[Part]) -> None:
        first = parts[0]
        self.path = first.path
        self.paths = [part.path for part in parts]
        self.version = first.version
        self.alignment = first.alignment
        self.metadata = Metadata(first.path, first.buffer, first.entries)
        self.tensors: dict[str, TensorInfo] = {}
        self._parts = parts
        for index, part in enumerate(parts):
            for info in part.tensors:
                if info.name in self.tensors:
                    raise FormatError(part.path, f"tensor {info.name!r}", "is in an earlier shard, too")
                self.tensors[info.name] = replace(info, part=index) if index else info

    @property
    def file_bytes(self) -> int:
        """Size of the file or files."""
        return sum(len(part.buffer) for part in self._parts)

    def problems(self) -> list[str]:
        """What is amiss though the file is well formed: tensors declared whose data is not there."""
        return [
            f"{part.path}: well formed, but the data of its {len(part.tensors)} tensors is not in the file"
            for part in self._parts
            if not part.has_data
        ]

    def raw(self, name: str) -> Array:
        """The tensor's stored bytes: uint8, 1-D, read-only, mapped. FormatError where they are missing."""
        return self._view(self._info(name), np.dtype(np.uint8))

    def array(self, name: str) -> Array:
        """The tensor's values in its numpy shape.

        f32, f16 and bf16 as stored: read-only views of the mapping. Quantized types are expanded to a new
        float16 array where every value is finite in float16 (rounded to nearest, relative error at most
        2^-11 of normal values), otherwise to float32. Raises FormatError where the data is missing,
        UnsupportedError for a type that is known by size alone.
        """
        info = self._info(name)
        if info.qtype.dtype is not None:
            return self._view(info, info.qtype.dtype).reshape(info.shape)
        if not info.qtype.served:
            reason = f"is of type {info.qtype.name}, which can be inspected, not computed with"
            raise UnsupportedError(self.paths[info.part], f"tensor {name!r}", reason)
        raw = self._view(info, np.dtype(np.uint8))
        values = info.qtype.dequantize(raw, np.float16)
        if not np.isfinite(values).all():
            values = info.qtype.dequantize(raw, np.float32)
        self.release(name)
        return values.reshape(info.shape)

    def read_into(self, name: str, out: Array) -> None:
        """The tensor's stored bytes into `out` (uint8, 1-D, as many); hardly any of the mapping stays in memory.

        Raises FormatError where they are missing.
        """
        info = self._info(name)
        self._view(info, np.dtype(np.uint8))
        copy_pages(self._parts[info.part].buffer, info.offset, out)

    def release(self, name: str) -> None:
        """Let the system drop the tensor's pages from memory; they are read again if touched."""
        info = self._info(name)
        forget_pages(self._parts[info.part].buffer, info.offset, info.offset + info.nbytes)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise FormatError(self.path, f"tensor {name!r}", "is not in the file")
        return self.tensors[name]

    def _view(self, info: TensorInfo, dtype: np.dtype[Any]) -> Array:
        part = self._parts[info.part]
        if not part.has_data:
            raise FormatError(part.path, f"tensor {info.name!r}", "has no data: the file ends after its header")
        return view(part.buffer, dtype, info.nbytes // dtype.itemsize, info.offset)


def read(path: PathType) -> GGUF:
    """Open a GGUF file; for one of several shards (`…-00001-of-000NN.gguf`), the whole set.

    Raises FormatError where a file is missing, malformed or cut short.
    """
    model = GGUF([parse_part(str(path), map_file(path))])
    count = model.metadata.expect("split.count", "int", 1)
    return model if count <= 1 else _read_shards(Path(path), count)


def _read_shards(path: Path, count: int) -> GGUF:
    name = SHARD.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise FormatError(path, "key 'split.count'", f"is {count}, but the name lacks -0000i-of-{count:05}")
    parts = []
    for number in range(count):
        shard = path.with_name(f"{name['stem']}-{number + 1:05}-of-{count:05}.gguf")
        part = parse_part(str(shard), map_file(shard))
        keys = Metadata(part.path, part.buffer, part.entries)
        for key, expected in (("split.no", number), ("split.count", count)):
            if (value := keys.expect(key, "int")) != expected:
                raise FormatError(shard, f"key {key!r}", f"is {value}; by its name the file is {expected}")
        parts.append(part)
    model = GGUF(parts)
    total = model.metadata.expect("split.tensors.count", "int", len(model.tensors))
    if total != len(model.tensors):
        raise FormatError(
            path, "key 'split.tensors.count'", f"is {total}; the shards hold {len(model.tensors)} tensors"
        )
    return model


def parse(buffer: Buffer, path: str = "(memory)") -> GGUF:
    """A single GGUF file from its bytes; `path` is what errors call it."""
    return GGUF([parse_part(path, buffer)])


def validate(path: PathType) -> list[str]:
    """Check everything but the weights' values; returns `GGUF.problems()`. Raises FormatError as `read`."""
    return read(path).problems()
