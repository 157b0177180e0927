"""Weights that stay in a model's files: each is read when it is touched, and kept by nobody.

For what goes through all weights once, such as merging and converting: memory holds one of them at a time. Whoever
computes with a model touches them again and again, and wants them in memory (`entrenar.load`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.ops.parts import Weight
from entrenar.quant import QTensor, QType
from entrenar.quant.qtypes import native
from entrenar.tensor import Tensor

Read = Callable[[], Weight]


class DiskTensor(Tensor):
    """A frozen weight of plain numbers."""

    __slots__ = ("_dtype", "_read", "_shape")

    def __init__(self, read: Read, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self._read, self._dtype, self._shape = read, dtype, shape
        self.grad, self.requires_grad, self.version, self._node = None, False, 0, None

    @property
    def data(self) -> NDArray[Any]:  # type: ignore[override]  # nothing is written to it
        values: NDArray[Any] = self._read().data
        return values

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def ndim(self) -> int:
        return len(self._shape)

    @property
    def size(self) -> int:
        return math.prod(self._shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype


class DiskQTensor(QTensor):
    """A quantized weight; one that is plain numbers in the file is quantized each time, too."""

    __slots__ = ("_read",)
    _read: Read

    def __init__(self, read: Read, qtype: QType, shape: tuple[int, ...]) -> None:
        for name, value in (("_read", read), ("qtype", qtype), ("shape", shape), ("block", 64)):
            object.__setattr__(self, name, value)

    @property
    def bytes(self) -> NDArray[np.uint8]:
        return self._read().source_bytes()

    @property
    def data(self) -> Any:
        return native().Packed(self.qtype.name, self.bytes, self.shape)

    @property
    def nbytes(self) -> int:
        return self.qtype.nbytes(self.size)


def on_disk(read: Read, qtype: QType, shape: tuple[int, ...]) -> Weight:
    """The weight that `read` gives, of this type and shape, left where it is."""
    if qtype.dtype is not None:
        return DiskTensor(read, qtype.dtype, shape)
    return DiskQTensor(read, qtype, shape)
