"""How and where weights are kept: as numbers, those that read the same input as row views of one array, for one product
to read; or quantized, each by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import ConfigError
from entrenar.models.dtype import DTYPES
from entrenar.models.mixture import OUTER, layer_type
from entrenar.models.spec import ModelConfig
from entrenar.ops.parts import Weight
from entrenar.quant import QTYPES, QTensor, QType, fitting, quantize
from entrenar.tensor import Tensor

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


@dataclass(frozen=True)
class Plain:
    """A weight kept as numbers of one type, in memory that the caller places."""

    dtype: np.dtype[Any]

    @property
    def qtype(self) -> QType:
        return next(QTYPES[name] for name, dtype in DTYPES.items() if dtype == self.dtype)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def room(self, shape: tuple[int, ...], empty: Empty) -> NDArray[Any]:
        """Where its values are to be written."""
        return empty(self.dtype)

    def placed(self, values: NDArray[Any], empty: Empty) -> NDArray[Any]:
        """The values in that room."""
        room = empty(self.dtype)
        room[...] = values
        return room

    def weight(self, values: NDArray[Any], trainable: bool) -> Weight:
        return Tensor(values, requires_grad=trainable)


@dataclass(frozen=True)
class Quantized:
    """A weight quantized to the type `name`, and frozen."""

    name: str

    @property
    def qtype(self) -> QType:
        return QTYPES[self.name]

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return QTYPES[self.name].nbytes(math.prod(shape))

    def room(self, shape: tuple[int, ...], empty: Empty) -> NDArray[Any]:
        return np.empty(shape, np.float32)

    def placed(self, values: NDArray[Any], empty: Empty) -> NDArray[Any]:
        return values if values.dtype in DTYPES.values() else values.astype(np.float32)

    def weight(self, values: NDArray[Any], trainable: bool) -> Weight:
        return quantize(values, self.name)


def qtype_of(weight: Weight) -> QType:
    """The type of a weight in memory."""
    return weight.qtype if isinstance(weight, QTensor) else Plain(weight.dtype).qtype


def kept_as(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], quant: str | None, config: ModelConfig
) -> Plain | Quantized:
    """How a weight is kept where matrices are `dtype`, and those of linear layers but the head are to be `quant`: that,
    or what llama.cpp takes where the rows do not fill its blocks. Norms and biases are f32.

    Raises:
        ConfigError: `quant` is no type or mixture that weights can be quantized to.
    """
    if len(shape) < 2:
        return Plain(DTYPES["f32"])
    if quant is None or name in OUTER:
        return Plain(dtype)
    fits = fitting(layer_type(quant, name, config), shape[-1])
    return Plain(DTYPES[fits]) if fits in DTYPES else Quantized(fits)


def kept_from(
    stored: Mapping[str, QType],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype[Any] | None,
    quant: str | None,
    config: ModelConfig,
) -> dict[str, Plain | Quantized | QType]:
    """How the weights of a file are kept, by name: `stored` says how they are there, a QType as the result that they
    stay so. `dtype`: of all matrices; without it each keeps its own.

    Raises:
        ConfigError: `quant` is no type that weights can be quantized to, or the file's are quantized already.
    """
    kept: dict[str, Plain | Quantized | QType] = {}
    for name, shape in shapes.items():
        kind = stored[name]
        own = DTYPES.get(kind.name)
        if kind.decodes:
            if quant is not None:
                raise ConfigError("quant", f"{quant!r}: {name} is quantized already, to {kind.name}; leave it out")
            if dtype is None and len(shape) == 2:
                kept[name] = kind
                continue
            own = DTYPES["f16"]
        kept[name] = kept_as(name, shape, DTYPES["f32"] if own is None else dtype or own, quant, config)
    return kept
