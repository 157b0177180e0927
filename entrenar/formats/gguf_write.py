"""Write GGUF v3: streaming, one tensor in memory at a time, and atomic.

How a key's value gets its type: a numpy scalar or array has its own; bool is bool, str is string; a Python
int is u32 where it fits, else i32, u64 or i64; a Python float is f32; lists of these become arrays (ints: i32
where they fit, as the ecosystem has token types). `Metadata.typed()` of a file that was read keeps every
type.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from entrenar.errors import UsageError
from entrenar.formats import gguf_types as gt
from entrenar.formats.files import Array, LazyArray, PathType, as_bytes, atomic_file
from entrenar.quant import QTYPES, QType


@dataclass(frozen=True)
class LazyBlocks:
    """A quantized tensor to be written, made only when its turn comes: `load()` gives its blocks, uint8, 1-D."""

    shape: tuple[int, ...]
    qtype: QType
    load: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return self.qtype.nbytes(count)


Item: TypeAlias = Array | LazyArray | LazyBlocks

_BY_DTYPE: dict[Any, QType] = {row.dtype: row for row in QTYPES.values() if row.dtype is not None}


def write(path: PathType, metadata: Mapping[str, Any], tensors: Iterable[tuple[str, Item]]) -> int:
    """Write a GGUF v3 file; it appears under `path` only when complete and on disk. Returns its size in
    bytes.

    `tensors` are (name, array) pairs of float32, float16 or bfloat16 in numpy order (at most 4-D); give a
    `LazyArray` for one that is to be made only when its turn comes, `LazyBlocks` for a quantized one. Raises
    UsageError for a value, name, shape or type that GGUF can't hold, and whatever a tensor's `load` raises;
    then nothing is left behind.
    """
    items = list(tensors)
    pairs = b"".join(_text(_key(key)) + _value(key, value) for key, value in metadata.items())
    alignment = metadata.get("general.alignment", np.uint32(gt.DEFAULT_ALIGNMENT))
    if alignment not in (1 << bit for bit in range(21)) or _value("", alignment)[:4] != bytes([4, 0, 0, 0]):
        raise UsageError(f"general.alignment: {alignment!r} is not a u32 power of two up to {gt.MAX_ALIGNMENT}")
    alignment = int(alignment)
    infos, offset, names = [], 0, set()
    for name, array in items:
        if name in names:
            raise UsageError(f"tensor {name!r} is given twice")
        names.add(name)
        infos.append(_info(name, array, offset))
        offset += array.nbytes + -array.nbytes % alignment
    if len(items) > gt.MAX_TENSORS or len(metadata) > gt.MAX_KEYS:
        raise UsageError(f"{len(items)} tensors and {len(metadata)} keys; at most {gt.MAX_TENSORS} of each are served")
    header = struct.pack("<4sIQQ", gt.MAGIC, gt.VERSIONS[-1], len(items), len(metadata)) + pairs + b"".join(infos)
    with atomic_file(path) as file:
        file.write(header)
        for name, array in items:
            file.write(bytes(-file.size % alignment))
            values = array if isinstance(array, np.ndarray) else array.load()
            if isinstance(array, LazyBlocks):
                if values.dtype != np.uint8 or values.shape != (array.nbytes,):
                    raise UsageError(f"tensor {name!r}: {values.size} bytes are not {array.nbytes}")
            elif values.shape != array.shape or values.dtype != array.dtype:
                announced = f"{array.dtype} {array.shape}"
                raise UsageError(f"tensor {name!r}: {values.dtype} {values.shape} is not {announced}")
            file.write(as_bytes(values))
        file.write(bytes(-file.size % alignment))
        return file.size


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _key(key: str) -> str:
    if not key or len(key.encode()) > gt.MAX_KEY:
        raise UsageError(f"key {key[:40]!r}: keys have 1 to {gt.MAX_KEY} bytes")
    return key


def _info(name: str, array: Item, offset: int) -> bytes:
    qtype = array.qtype if isinstance(array, LazyBlocks) else _BY_DTYPE.get(array.dtype)
    if qtype is None or qtype.ggml_id is None:
        kind = array.qtype.name if isinstance(array, LazyBlocks) else array.dtype
        raise UsageError(f"tensor {name!r}: {kind} can't be written; float32, float16, bfloat16 and ggml's blocks can")
    if isinstance(array, LazyBlocks) and array.shape and array.shape[-1] % qtype.block:
        raise UsageError(f"tensor {name!r}: rows of {array.shape[-1]} do not fill {qtype.name}'s blocks")
    if len(array.shape) > gt.MAX_DIMS or 0 in array.shape:
        raise UsageError(f"tensor {name!r}: shape {array.shape}; GGUF has 0 to {gt.MAX_DIMS} dimensions, none 0")
    if len(name.encode()) > gt.MAX_NAME:
        raise UsageError(f"tensor {name!r}: names have at most {gt.MAX_NAME} bytes")
    rank = len(array.shape)
    return _text(name) + struct.pack(f"<I{rank}QIQ", rank, *reversed(array.shape), qtype.ggml_id, offset)


def _value(key: str, value: Any) -> bytes:
    """Type and bytes of one value."""
    if isinstance(value, str):
        return struct.pack("<I", gt.STRING.id) + _text(value)
    if isinstance(value, (list, tuple)):
        return _array(key, value)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        if value.dtype.kind == "U":
            return _strings(value.tolist())
        kind = _kind(key, value.dtype)
        return struct.pack("<IIQ", gt.ARRAY.id, kind.id, value.size) + bytes(as_bytes(value.astype(kind.dtype)))
    scalar = value if isinstance(value, np.generic) else _scalar(key, value)
    kind = _kind(key, scalar.dtype)
    return struct.pack("<I", kind.id) + scalar.tobytes()


def _scalar(key: str, value: Any) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        smallest: np.generic = _smallest(key, [value], ("<u4", "<i4", "<u8", "<i8"))[0]
        return smallest
    if isinstance(value, float):
        return np.float32(value)
    raise UsageError(f"key {key!r}: a {type(value).__name__} can't be written; bool, int, float, str and lists can")


def _array(key: str, values: Sequence[Any]) -> bytes:
    kinds = {type(value) for value in values}
    if kinds == {str}:
        return _strings(values)
    if kinds == {bool}:
        return _value(key, np.array(values, bool))
    if kinds == {int}:
        return _value(key, _smallest(key, values, ("<i4", "<u4", "<i8", "<u8")))
    if kinds and kinds <= {int, float}:
        return _value(key, np.array(values, np.float32))
    if not kinds:
        raise UsageError(f"key {key!r}: an empty list has no element type; give an empty numpy array, or no key")
    raise UsageError(f"key {key!r}: a list of {', '.join(sorted(kind.__name__ for kind in kinds))} can't be written")


def _strings(values: Sequence[str]) -> bytes:
    return struct.pack("<IIQ", gt.ARRAY.id, gt.STRING.id, len(values)) + b"".join(map(_text, values))


def _smallest(key: str, values: Sequence[int], dtypes: tuple[str, ...]) -> Array:
    for dtype in dtypes:
        limits = np.iinfo(dtype)
        if limits.min <= min(values) and max(values) <= limits.max:
            return np.array(values, dtype)
    raise UsageError(f"key {key!r}: {max(values, key=abs)} does not fit into 64 bits")


def _kind(key: str, dtype: np.dtype[Any]) -> gt.ValueType:
    kind = gt.BY_DTYPE.get(dtype.newbyteorder("<"))
    if kind is None:
        raise UsageError(f"key {key!r}: values of type {dtype} can't be written")
    return kind
