"""Where weights lie in memory: those that read the same input are row views of one array, for one product to read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Empty = Callable[[np.dtype[Any]], NDArray[Any]]  # memory for one weight of the type given, to be filled

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


class Rows:
    """Room for weights one below the other: one (rows, …) array a type, made when the first weight of it is taken.

    Weights of the same type thus lie next to each other; one that is stored in another type lies elsewhere.
    """

    def __init__(self, *shape: int) -> None:
        self._shape = shape
        self._arrays: dict[np.dtype[Any], NDArray[Any]] = {}

    def place(self, begin: int, rows: int) -> Empty:
        """Where the weight of the rows from `begin` on goes."""

        def empty(dtype: np.dtype[Any]) -> NDArray[Any]:
            if dtype not in self._arrays:
                self._arrays[dtype] = aligned(self._shape, dtype)
            return self._arrays[dtype][begin : begin + rows]

        return empty


def aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialised contiguous array that begins at a multiple of ALIGNMENT."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(count + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + count].view(dtype).reshape(shape)
