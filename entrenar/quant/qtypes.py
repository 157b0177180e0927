"""Every type a weight can be stored in: one table, a row a type. Its twin in C is csrc/quant/codecs.c.

A row knows its size always, and whether entrenar decodes and encodes the type. Ids and sizes: ggml.h and
ggml-common.h of llama.cpp (MIT); missing ids are types ggml has removed. NF4 and FP4 are bitsandbytes', which no GGUF
file holds.
"""

from __future__ import annotations

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
        name: ggml's name in lower case, or bitsandbytes'. ggml_id: its number in a GGUF file, if it has one.
        block: elements in one block. bytes: stored bytes of one block; of NF4 and FP4 without nested scales.
        dtype: the numpy type with the same bytes, for plain numbers that entrenar computes with.
        decodes, encodes: what `dequantize` and `quantize` serve, of quantized types.
    """

    name: str
    ggml_id: int | None
    block: int
    bytes: int
    dtype: np.dtype[Any] | None = None
    decodes: bool = False
    encodes: bool = False

    @property
    def served(self) -> bool:
        """True where values can be had."""
        return self.dtype is not None or self.decodes

    @property
    def flat(self) -> bool:
        """True where blocks run over the whole row-major array and scales lie apart (NF4, FP4); else rows are whole
        blocks."""
        return self.ggml_id is None

    def nbytes(self, elements: int, block: int = 64) -> int:
        """Stored bytes of `elements` values, which must fill whole blocks; `block` counts where the type is flat."""
        if self.flat:
            return int(native().packed_bytes(self.name, elements, block))
        if elements % self.block:
            raise ShapeError(f"{self.name}: {elements} elements do not fill blocks of {self.block}")
        return elements // self.block * self.bytes

    def dequantize(self, raw: Array, dtype: DTypeLike = np.float32) -> Array:
        """Values of `raw` (uint8, 1-D, whole blocks) as a new 1-D array of `dtype` (float32, float16 or bfloat16).

        Raises DTypeError for a type that entrenar knows by size alone, ShapeError for a broken block. Of a flat type
        the bytes don't tell the number of elements: `QTensor.dense`.
        """
        if raw.dtype != np.uint8 or raw.ndim != 1:
            raise DTypeError(f"{self.name}: raw bytes are a 1-D uint8 array, not {raw.ndim}-D {raw.dtype}")
        if raw.size % self.bytes and not self.flat:
            raise ShapeError(f"{self.name}: {raw.size} bytes are not whole blocks of {self.bytes}")
        if self.dtype is not None:
            return raw.view(self.dtype).astype(dtype)
        if not self.decodes:
            raise DTypeError(f"values of type {self.name} can't be decoded; served are: {', '.join(SERVED)}")
        values: Array = native().dequantize(self.name, np.ascontiguousarray(raw), dtype)
        return values


def native() -> Any:
    """The kernels' module."""
    from entrenar import backend  # here, so that looking into a file does not load the kernels

    return backend.cpu


_F32, _F16, _BF16 = np.dtype("<f4"), np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16)

_ROWS = (
    QType("f32", 0, 1, 4, dtype=_F32),
    QType("f16", 1, 1, 2, dtype=_F16),
    QType("q4_0", 2, 32, 18, decodes=True, encodes=True),
    QType("q4_1", 3, 32, 20, decodes=True, encodes=True),
    QType("q5_0", 6, 32, 22, decodes=True, encodes=True),
    QType("q5_1", 7, 32, 24, decodes=True, encodes=True),
    QType("q8_0", 8, 32, 34, decodes=True, encodes=True),
    QType("q8_1", 9, 32, 36),
    QType("q2_k", 10, 256, 84, decodes=True, encodes=True),
    QType("q3_k", 11, 256, 110, decodes=True, encodes=True),
    QType("q4_k", 12, 256, 144, decodes=True, encodes=True),
    QType("q5_k", 13, 256, 176, decodes=True, encodes=True),
    QType("q6_k", 14, 256, 210, decodes=True, encodes=True),
    QType("q8_k", 15, 256, 292),
    QType("iq2_xxs", 16, 256, 66, decodes=True),
    QType("iq2_xs", 17, 256, 74, decodes=True),
    QType("iq3_xxs", 18, 256, 98, decodes=True),
    QType("iq1_s", 19, 256, 50, decodes=True),
    QType("iq4_nl", 20, 32, 18, decodes=True, encodes=True),
    QType("iq3_s", 21, 256, 110, decodes=True),
    QType("iq2_s", 22, 256, 82, decodes=True),
    QType("iq4_xs", 23, 256, 136, decodes=True, encodes=True),
    QType("i8", 24, 1, 1),
    QType("i16", 25, 1, 2),
    QType("i32", 26, 1, 4),
    QType("i64", 27, 1, 8),
    QType("f64", 28, 1, 8),
    QType("iq1_m", 29, 256, 56, decodes=True),
    QType("bf16", 30, 1, 2, dtype=_BF16),
    QType("tq1_0", 34, 256, 54, decodes=True),
    QType("tq2_0", 35, 256, 66, decodes=True),
    QType("mxfp4", 39, 32, 17, decodes=True),
    QType("nvfp4", 40, 64, 36),
    QType("q1_0", 41, 128, 18),
    QType("q2_0", 42, 64, 18),
    QType("nf4", None, 64, 32, decodes=True, encodes=True),
    QType("nf4-f32", None, 64, 36, decodes=True, encodes=True),
    QType("fp4", None, 64, 32, decodes=True, encodes=True),
    QType("fp4-f32", None, 64, 36, decodes=True, encodes=True),
)

QTYPES = {row.name: row for row in _ROWS}
SERVED = tuple(row.name for row in _ROWS if row.served)
_BY_ID = {row.ggml_id: row for row in _ROWS if row.ggml_id is not None}


def by_id(ggml_id: int) -> QType | None:
    """The type that a GGUF file numbers `ggml_id`, None where ggml has no such type."""
    return _BY_ID.get(ggml_id)
