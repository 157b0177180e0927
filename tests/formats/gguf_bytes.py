"""GGUF files byte by byte, right and wrong: independent of the package's writer."""

from __future__ import annotations

import struct
from collections.abc import Sequence

Pair = tuple[str, int, bytes]  # key, type id, bytes of the value
Tensor = tuple[str, Sequence[int], int, int]  # name, ggml's dims, type id, offset


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def array(kind: int, count: int, data: bytes) -> bytes:
    return u32(kind) + u64(count) + data


def gguf(
    pairs: Sequence[Pair] = (),
    tensors: Sequence[Tensor] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    n_tensors: int | None = None,
    n_keys: int | None = None,
) -> bytes:
    """A file as told, counts and all; the data is put where `alignment` says."""
    out = magic + u32(version)
    out += u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(pairs) if n_keys is None else n_keys)
    for key, kind, value in pairs:
        out += text(key) + u32(kind) + value
    for name, dims, kind, offset in tensors:
        out += text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)
    if tensors:
        out += bytes(-len(out) % alignment)
    return out + data


def small() -> bytes:
    """A valid file with every kind of value and two tensors, about 500 bytes."""
    pairs = [
        ("general.alignment", 4, u32(32)),
        ("u8", 0, b"\x07"),
        ("i16", 3, struct.pack("<h", -2)),
        ("f64", 12, struct.pack("<d", 0.5)),
        ("flag", 7, b"\x01"),
        ("name", 8, text("é")),
        ("words", 9, array(8, 3, text("a") + text("") + text("bc"))),
        ("numbers", 9, array(5, 3, struct.pack("<3i", 1, -2, 3))),
        ("flags", 9, array(7, 2, b"\x00\x01")),
    ]
    tensors = [("a.weight", (3, 2), 0, 0), ("b.weight", (32,), 8, 32)]
    block = struct.pack("<e32b", 0.5, *range(-16, 16))
    return gguf(pairs, tensors, struct.pack("<6f", *range(6)) + bytes(8) + block + bytes(30))
