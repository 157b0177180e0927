"""GGUF's value types and limits, shared by reader and writer.

Source: ggml's docs/gguf.md, and what llama.cpp accepts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # the layouts are equal; 1 had 32-bit counts
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4
MAX_NAME = 63  # bytes of a tensor's name; ggml keeps 64 with the final zero
MAX_KEY = 65_535  # bytes of a key
MAX_KEYS = MAX_TENSORS = 16_384  # the largest models have about 100 keys and 3,000 tensors
MAX_ELEMENTS = 2**63 - 1
NO_ID = 0xFFFFFFFF  # a token id that means "none"


@dataclass(frozen=True, slots=True)
class ValueType:
    """One of GGUF's value types; `dtype` is None for strings and arrays."""

    name: str
    id: int
    dtype: np.dtype[Any] | None = None


STRING = ValueType("string", 8)
ARRAY = ValueType("array", 9)
BOOL = ValueType("bool", 7, np.dtype("?"))

VALUE_TYPES = (
    ValueType("u8", 0, np.dtype("<u1")),
    ValueType("i8", 1, np.dtype("<i1")),
    ValueType("u16", 2, np.dtype("<u2")),
    ValueType("i16", 3, np.dtype("<i2")),
    ValueType("u32", 4, np.dtype("<u4")),
    ValueType("i32", 5, np.dtype("<i4")),
    ValueType("f32", 6, np.dtype("<f4")),
    BOOL,
    STRING,
    ARRAY,
    ValueType("u64", 10, np.dtype("<u8")),
    ValueType("i64", 11, np.dtype("<i8")),
    ValueType("f64", 12, np.dtype("<f8")),
)
BY_ID = {kind.id: kind for kind in VALUE_TYPES}
BY_DTYPE = {kind.dtype: kind for kind in VALUE_TYPES if kind.dtype is not None}
