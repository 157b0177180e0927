"""QTensor: a quantized array as its stored bytes, and the two ways between it and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from operator import index
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from entrenar.errors import DTypeError, ShapeError, UsageError
from entrenar.quant.qtypes import QTYPES, Array, QType, native


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """A quantized array; it never changes.

    Attributes:
        qtype: how it is stored. shape: of the values.
        bytes: the whole stored form, uint8, 1-D, read-only: of ggml's types the blocks in a GGUF file's order, of NF4
            and FP4 the parts that `struct en_flat` in csrc/entrenar.h describes.
        block: elements to a scale of NF4 and FP4; no other type has the choice.

    Raises DTypeError, ShapeError or UsageError where the bytes can't be such an array.
    """

    qtype: QType
    shape: tuple[int, ...]
    bytes: Array
    block: int = 64
    _data: Any = field(default=None, init=False, repr=False)

    requires_grad: ClassVar[bool] = False
    version: ClassVar[int] = 0

    def __post_init__(self) -> None:
        name, raw = self.qtype.name, self.bytes
        if not self.qtype.decodes:
            raise DTypeError(f"QTensor: type {name} can't be decoded; {', '.join(DECODED)} can")
        if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8 or raw.ndim != 1:
            raise DTypeError(f"QTensor: bytes of {name} are a 1-D uint8 array, not {_kind(raw)}")
        shape = _shape(self.shape)
        object.__setattr__(self, "shape", shape)
        if not self.qtype.flat and self.width % self.qtype.block:
            raise ShapeError(f"QTensor: rows of {self.width} do not fill {name}'s blocks of {self.qtype.block}")
        size = self.qtype.nbytes(self.size, self.block)
        if raw.size != size:
            raise ShapeError(f"QTensor: {self.shape} of {name} takes {size} bytes, not {raw.size}")
        view = np.ascontiguousarray(raw).view()
        view.flags.writeable = False
        object.__setattr__(self, "bytes", view)

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return int(self.bytes.size)

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def width(self) -> int:
        """Values in a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def data(self) -> Any:
        """What products take for it (`Packed` of the kernels): a matrix with `.T`. NF4 and FP4 need blocks of 64."""
        if self._data is None:
            if self.block != 64:
                raise UsageError(f"QTensor: products read {self.qtype.name} in blocks of 64, not of {self.block}")
            object.__setattr__(self, "_data", native().Packed(self.qtype.name, self.bytes, self.shape))
        return self._data

    def source_bytes(self) -> Array:
        """The stored form, as `bytes`."""
        return self.bytes

    def dense(self, dtype: DTypeLike = np.float32) -> Array:
        """The values as a new array of `dtype`: float32, float16 or bfloat16."""
        if not self.qtype.flat:
            return self.qtype.dequantize(self.bytes, dtype).reshape(self.shape)
        values: Array = native().packed_rows(
            self.qtype.name, self.bytes, self.size // (self.width or 1), self.width, None, dtype, self.block
        )
        return values.reshape(self.shape)

    def rows(self, ids: Array | Sequence[int], dtype: DTypeLike = np.float32) -> Array:
        """Rows of a matrix by their numbers, (*ids.shape, width); no others are decoded. DataError for a wrong one."""
        if self.ndim != 2:
            raise ShapeError(f"QTensor.rows: it takes a matrix, not {self.shape}")
        ids = np.asarray(ids)
        values: Array = native().packed_rows(self.qtype.name, self.bytes, *self.shape, ids, dtype, self.block)
        return values.reshape(*ids.shape, self.width)

    def permuted(self, order: Array | Sequence[int]) -> QTensor:
        """The same matrix with rows in another order, without loss; of ggml's types alone, whose rows lie apart."""
        if self.ndim != 2 or self.qtype.flat:
            raise UsageError(f"QTensor.permuted: rows of {self.shape} of {self.qtype.name} are not stored apart")
        order = np.asarray(order)
        if sorted(order.tolist()) != list(range(self.shape[0])):
            raise ShapeError(f"QTensor.permuted: order is no permutation of {self.shape[0]} rows")
        lines = self.bytes.reshape(self.shape[0], -1)
        return QTensor(self.qtype, self.shape, lines[order].reshape(-1))

    def __copy__(self) -> QTensor:
        return self  # it never changes

    def __deepcopy__(self, memo: object) -> QTensor:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return QTensor, (self.qtype, self.shape, self.bytes, self.block)

    def __repr__(self) -> str:
        return f"QTensor({self.qtype.name}, {self.shape}, {self.nbytes} bytes)"


MOST = 1 << 59  # elements of an array
DECODED = tuple(row.name for row in QTYPES.values() if row.decodes)
ENCODED = tuple(row.name for row in QTYPES.values() if row.encodes)

# wanted -> what llama.cpp takes for a row that does not fill blocks of 256
_NARROWER = {
    "q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0",
}  # fmt: skip


def _kind(value: object) -> str:
    return f"{value.ndim}-D {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def _row(name: str, op: str) -> QType:
    """A type by its name, in any case."""
    key = name.lower() if isinstance(name, str) else name
    if not isinstance(key, str) or key not in QTYPES:
        raise UsageError(f"{op}: no type {name!r}; it is one of {', '.join(QTYPES)}")
    return QTYPES[key]


def _shape(shape: object) -> tuple[int, ...]:
    """A shape as a tuple of sizes, whose product memory could hold."""
    try:
        sizes = tuple(index(size) for size in shape)  # type: ignore[attr-defined]
    except TypeError:
        raise ShapeError(f"QTensor: {shape!r} is no shape; give a tuple of sizes") from None
    if any(size < 0 for size in sizes) or prod(sizes) >= MOST:
        raise ShapeError(f"QTensor: {sizes} is no shape")
    return sizes


def fitting(name: str, width: int) -> str:
    """The type that llama.cpp stores rows of `width` in where `name` is wanted: itself where its blocks fill them,
    else a type of blocks of 32, else "f16". NF4 and FP4 take any width."""
    row = _row(name, "fitting")
    if row.flat or width % row.block == 0:
        return row.name
    smaller = _NARROWER.get(row.name, "f16")
    return smaller if smaller == "f16" or width % QTYPES[smaller].block == 0 else "f16"


def quantize(array: Array, name: str, block: int = 64) -> QTensor:
    """`array` (float32, float16 or bfloat16, any shape) stored as type `name`, with the bytes that ggml or
    bitsandbytes gives it; `block` is NF4's and FP4's, 32 to 4096.

    Raises UsageError for a type that is not written, ShapeError where rows don't fill its blocks (`fitting` tells what
    does), NonFiniteError where a value is NaN or infinite, or too large for the type.
    """
    row = _row(name, "quantize")
    if not row.encodes:
        raise UsageError(f"quantize: {name} is not written; written are: {', '.join(ENCODED)}")
    if block != 64 and not row.flat:
        raise UsageError(f"quantize: block={block}: {row.name}'s are of {row.block}; only NF4 and FP4 have a choice")
    return QTensor(row, np.shape(array), native().quantize(row.name, array, block), block)


def dequantize(
    q: QTensor | Array | bytes, name: str | None = None, shape: Sequence[int] | None = None,
    dtype: DTypeLike = np.float32, block: int = 64,
) -> Array:  # fmt: skip
    """The values of a QTensor, or of raw bytes of type `name` and `shape`, as a new array of `dtype`.

    Raises UsageError without the name and shape of raw bytes, ShapeError where they take another number of bytes.
    """
    if isinstance(q, QTensor):
        return q.dense(dtype)
    if name is None or shape is None:
        raise UsageError("dequantize: raw bytes need the name of their type and their shape")
    raw = np.frombuffer(q, np.uint8) if isinstance(q, (bytes, bytearray, memoryview)) else q
    return QTensor(_row(name, "dequantize"), _shape(shape), raw, block).dense(dtype)
