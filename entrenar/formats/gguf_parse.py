"""The GGUF parser: one check for every number before it is used.

It looks at every byte up to the tensor data, decodes names alone, and says where everything is. Each check
runs before what it protects, counts are compared with the bytes that are left, and Python's integers can't
wrap.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from entrenar.errors import FormatError
from entrenar.formats import gguf_types as gt
from entrenar.formats.files import Buffer
from entrenar.quant import QType, by_id

U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a key's value is."""

    kind: gt.ValueType  # of the value, or of the array's elements
    count: int | None  # None for a single value
    start: int  # byte of the value or of the first element


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor's bytes are: `shape` in numpy's order, `offset` from the start of file number `part`."""

    name: str
    shape: tuple[int, ...]
    qtype: QType
    offset: int
    nbytes: int
    part: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """A parsed file; `has_data` is False where it ends after its header though it declares tensors."""

    path: str
    buffer: Buffer
    version: int
    alignment: int
    entries: dict[str, Entry]
    tensors: list[TensorInfo]
    has_data: bool


def parse(path: str, buffer: Buffer) -> Part:
    """Check a whole file. Raises FormatError; `path` is what it calls the file."""
    cursor = _Cursor(path, buffer)
    version, n_tensors, n_keys = _header(cursor)
    entries: dict[str, Entry] = {}
    for _ in range(n_keys):
        _pair(cursor, entries)
    alignment = _alignment(cursor, entries)
    tensors = [_tensor(cursor) for _ in range(n_tensors)]
    placed, has_data = _place(cursor, tensors, alignment)
    return Part(path, buffer, version, alignment, entries, placed, has_data)


class _Cursor:
    """A place in the file; every read is bounded by the file's end."""

    def __init__(self, path: str, buffer: Buffer) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.at = 0

    def error(self, reason: str, at: int | None = None) -> FormatError:
        return FormatError(self.path, f"byte {self.at if at is None else at}", reason)

    def skip(self, size: int, what: str) -> int:
        """Step over `size` bytes; returns where they start."""
        start = self.at
        if size > self.size - start:
            raise self.error(f"{what} takes {size} bytes, the file has {self.size - start} left")
        self.at = start + size
        return start

    def u32(self, what: str) -> int:
        value: int = U32.unpack_from(self.buffer, self.skip(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = U64.unpack_from(self.buffer, self.skip(8, what))[0]
        return value

    def count(self, what: str, smallest: int, limit: int) -> int:
        """A u64 count of records of at least `smallest` bytes."""
        start = self.at
        value = self.u64(what)
        if value > (self.size - self.at) // smallest:
            raise self.error(f"{what} is {value}; the {self.size - self.at} bytes left can't hold that", start)
        if value > limit:
            raise self.error(f"{what} is {value}; at most {limit} are served", start)
        return value

    def text(self, what: str, limit: int) -> str:
        """A short string: u64 length and UTF-8."""
        start = self.at
        length = self.u64(f"length of {what}")
        if length > limit:
            raise self.error(f"{what} is {length} bytes long; at most {limit} are allowed", start)
        start = self.skip(length, what)
        try:
            return self.buffer[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not valid UTF-8", start + error.start) from error

    def strings(self, count: int, what: str) -> None:
        """Step over `count` strings. Decoding them checks their UTF-8; llama.cpp accepts any bytes here."""
        buffer, size, unpack, at = self.buffer, self.size, U64.unpack_from, self.at
        last = size - 8
        for _ in range(count):
            if at > last:
                raise self.error(f"{what}: the file ends inside its strings", min(at, size))
            at += 8 + unpack(buffer, at)[0]
        if at > size:
            raise self.error(f"{what}: its last string goes beyond the end of the file", size)
        self.at = at


def _header(cursor: _Cursor) -> tuple[int, int, int]:
    magic = cursor.buffer[:4]
    if magic != gt.MAGIC:
        raise cursor.error(f"begins with {magic!r}; a GGUF file begins with {gt.MAGIC!r}")
    cursor.skip(4, "magic")
    version = cursor.u32("version")
    if version & 0xFFFF == 0 and version:
        raise cursor.error("is a big-endian GGUF file; only little-endian ones are served", 4)
    if version not in gt.VERSIONS:
        raise cursor.error(f"is GGUF version {version}; versions 2 and 3 are served", 4)
    at = cursor.at
    n_tensors = cursor.count("number of tensors", 24, gt.MAX_TENSORS)
    n_keys = cursor.count("number of keys", 13, gt.MAX_KEYS)
    if n_tensors * 24 + n_keys * 13 > cursor.size - cursor.at:
        raise cursor.error(f"{n_tensors} tensors and {n_keys} keys do not fit into the file", at)
    return version, n_tensors, n_keys


def _pair(cursor: _Cursor, entries: dict[str, Entry]) -> None:
    start = cursor.at
    key = cursor.text("a key", gt.MAX_KEY)
    if key in entries:
        raise cursor.error(f"key {key!r} is there twice", start)
    what = f"key {key!r}"
    kind = _value_type(cursor, what)
    if kind is not gt.ARRAY:
        begin = cursor.at
        if kind.dtype is None:
            cursor.strings(1, what)
        else:
            cursor.skip(kind.dtype.itemsize, what)
        entries[key] = Entry(kind, None, begin)
        return
    kind = _value_type(cursor, what)
    if kind is gt.ARRAY:
        raise cursor.error(f"{what} is an array of arrays, which is not allowed", cursor.at - 4)
    width = 8 if kind.dtype is None else kind.dtype.itemsize  # a string has at least its length
    count = cursor.count(f"length of {what}", width, gt.MAX_ELEMENTS)
    entries[key] = Entry(kind, count, cursor.at)
    if kind.dtype is None:
        cursor.strings(count, what)
    else:
        cursor.skip(count * width, what)


def _value_type(cursor: _Cursor, what: str) -> gt.ValueType:
    start = cursor.at
    number = cursor.u32(f"type of {what}")
    if number not in gt.BY_ID:
        raise cursor.error(f"{what} has the unknown type {number}", start)
    return gt.BY_ID[number]


def _alignment(cursor: _Cursor, entries: dict[str, Entry]) -> int:
    entry = entries.get("general.alignment")
    if entry is None:
        return gt.DEFAULT_ALIGNMENT
    what = "key 'general.alignment'"
    if entry.count is not None or entry.kind.name != "u32":
        raise cursor.error(f"{what} must be a single u32", entry.start)
    value: int = U32.unpack_from(cursor.buffer, entry.start)[0]
    if value == 0 or value & (value - 1) or value > gt.MAX_ALIGNMENT:
        raise cursor.error(f"{what} is {value}, not a power of two up to {gt.MAX_ALIGNMENT}", entry.start)
    return value


def _tensor(cursor: _Cursor) -> TensorInfo:
    name = cursor.text("a tensor's name", gt.MAX_NAME)
    what = f"tensor {name!r}"
    start = cursor.at
    n_dims = cursor.u32(f"rank of {what}")
    if n_dims > gt.MAX_DIMS:
        raise cursor.error(f"{what} has {n_dims} dimensions; at most {gt.MAX_DIMS} are allowed", start)
    start = cursor.at
    dims = [cursor.u64(f"a dimension of {what}") for _ in range(n_dims)]
    elements = 1
    for dim in dims:
        if dim == 0 or dim > gt.MAX_ELEMENTS // elements:
            raise cursor.error(f"{what} has the impossible shape {dims}", start)
        elements *= dim
    start = cursor.at
    number = cursor.u32(f"type of {what}")
    qtype = by_id(number)
    if qtype is None:
        raise cursor.error(f"{what} has the unknown type {number}", start)
    row = dims[0] if dims else 1
    if row % qtype.block:
        raise cursor.error(f"{what}: rows of {row} don't fill {qtype.name} blocks of {qtype.block}", start)
    nbytes = elements // qtype.block * qtype.bytes
    if nbytes > gt.MAX_ELEMENTS:
        raise cursor.error(f"{what} has the impossible shape {dims}", start)
    offset = cursor.u64(f"offset of {what}")
    return TensorInfo(name, tuple(reversed(dims)), qtype, offset, nbytes)


def _place(cursor: _Cursor, tensors: list[TensorInfo], alignment: int) -> tuple[list[TensorInfo], bool]:
    """Check names and offsets, make offsets absolute, and say whether the data is there."""
    if not tensors:
        return [], True  # a vocabulary, or nothing but keys
    data = _padded(cursor.at, alignment)
    if data > cursor.size:
        raise cursor.error(f"the file ends before its tensor data, which begins at byte {data}")
    has_data = cursor.size > data
    names: set[str] = set()
    placed = []
    at = end = data
    for info in tensors:
        where = f"tensor {info.name!r}"
        if info.name in names:
            raise FormatError(cursor.path, where, "is there twice")
        names.add(info.name)
        if info.offset != at - data:
            raise FormatError(cursor.path, where, f"has offset {info.offset}; {at - data} comes next")
        end = at + info.nbytes
        if has_data and end > cursor.size:
            raise FormatError(cursor.path, where, f"ends at byte {end}, the file at {cursor.size}: cut short?")
        placed.append(replace(info, offset=at))
        at = _padded(end, alignment)
    # Some writers leave out the last padding, and llama.cpp loads that. A part of it means a file cut short.
    if has_data and end < cursor.size < at:
        raise cursor.error(f"the file is cut short: its last padding ends at byte {at}", cursor.size)
    return placed, has_data


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
