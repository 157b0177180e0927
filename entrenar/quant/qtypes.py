"""Every type a weight can be stored in, as ggml numbers them: one table, a row a type.

A row knows its size always, and how to become numbers where entrenar serves the type. To serve another one,
give its row a `decode`. Ids and sizes: ggml.h and ggml-common.h of llama.cpp (MIT); missing ids are types
ggml has removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from entrenar.errors import DTypeError, ShapeError

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class QType:
    """One storage type.

    Attributes:
        name: ggml's name in lower case. ggml_id: its number in a GGUF file.
        block: elements in one block. bytes: stored bytes of one block.
        dtype: the numpy type with the same bytes, for plain numbers that entrenar computes with.
        decode: raw bytes -> values, for quantized types that entrenar serves.
    """

    name: str
    ggml_id: int
    block: int
    bytes: int
    dtype: np.dtype[Any] | None = None
    decode: Callable[[str, Array, DTypeLike], Array] | None = None

    @property
    def served(self) -> bool:
        """True where `dequantize` works."""
        return self.dtype is not None or self.decode is not None

    def nbytes(self, elements: int) -> int:
        """Stored bytes of `elements` values, which must fill whole blocks."""
        if elements % self.block:
            raise ShapeError(f"{self.name}: {elements} elements do not fill blocks of {self.block}")
        return elements // self.block * self.bytes

    def dequantize(self, raw: Array, dtype: DTypeLike = np.float32) -> Array:
        """Values of `raw` (uint8, 1-D, whole blocks) as a new 1-D array of `dtype` (float32 or float16).

        Raises DTypeError for a type that entrenar knows by size alone, ShapeError for a broken block.
        """
        if raw.dtype != np.uint8 or raw.ndim != 1:
            raise DTypeError(f"{self.name}: raw bytes are a 1-D uint8 array, not {raw.ndim}-D {raw.dtype}")
        if raw.size % self.bytes:
            raise ShapeError(f"{self.name}: {raw.size} bytes are not whole blocks of {self.bytes}")
        if self.dtype is not None:
            return raw.view(self.dtype).astype(dtype)
        if self.decode is None:
            raise DTypeError(f"values of type {self.name} can't be decoded; served are: {', '.join(SERVED)}")
        return self.decode(self.name, raw, dtype)


def _native(name: str, raw: Array, dtype: DTypeLike) -> Array:
    from entrenar import backend  # here, so that looking into a file does not load the kernels

    values: Array = backend.cpu.dequantize(name, np.ascontiguousarray(raw), dtype)
    return values


_F32, _F16, _BF16 = np.dtype("<f4"), np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16)

_ROWS = (
    QType("f32", 0, 1, 4, dtype=_F32),
    QType("f16", 1, 1, 2, dtype=_F16),
    QType("q4_0", 2, 32, 18, decode=_native),
    QType("q4_1", 3, 32, 20),
    QType("q5_0", 6, 32, 22),
    QType("q5_1", 7, 32, 24),
    QType("q8_0", 8, 32, 34, decode=_native),
    QType("q8_1", 9, 32, 36),
    QType("q2_k", 10, 256, 84),
    QType("q3_k", 11, 256, 110),
    QType("q4_k", 12, 256, 144, decode=_native),
    QType("q5_k", 13, 256, 176),
    QType("q6_k", 14, 256, 210, decode=_native),
    QType("q8_k", 15, 256, 292),
    QType("iq2_xxs", 16, 256, 66),
    QType("iq2_xs", 17, 256, 74),
    QType("iq3_xxs", 18, 256, 98),
    QType("iq1_s", 19, 256, 50),
    QType("iq4_nl", 20, 32, 18),
    QType("iq3_s", 21, 256, 110),
    QType("iq2_s", 22, 256, 82),
    QType("iq4_xs", 23, 256, 136),
    QType("i8", 24, 1, 1),
    QType("i16", 25, 1, 2),
    QType("i32", 26, 1, 4),
    QType("i64", 27, 1, 8),
    QType("f64", 28, 1, 8),
    QType("iq1_m", 29, 256, 56),
    QType("bf16", 30, 1, 2, dtype=_BF16),
    QType("tq1_0", 34, 256, 54),
    QType("tq2_0", 35, 256, 66),
    QType("mxfp4", 39, 32, 17),
    QType("nvfp4", 40, 64, 36),
    QType("q1_0", 41, 128, 18),
    QType("q2_0", 42, 64, 18),
)

QTYPES = {row.name: row for row in _ROWS}
SERVED = tuple(row.name for row in _ROWS if row.served)
_BY_ID = {row.ggml_id: row for row in _ROWS}


def by_id(ggml_id: int) -> QType | None:
    """The type that a GGUF file numbers `ggml_id`, None where ggml has no such type."""
    return _BY_ID.get(ggml_id)
