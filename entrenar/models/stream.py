"""Packed weights of layers that stay in the file: read when a layer's turn comes, two layers in memory at a time.

A layer's weights are used together, and layers one after the other, up in the forward pass and down in the backward
pass. So while one is used the next one in that direction is read, by a thread of its own. Whoever touches a weight of
another layer waits until that is there. Each thread that uses a model has two layers of its own.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import UsageError
from entrenar.models.arch.base import SAME, Transform
from entrenar.models.storage import ALIGNMENT, aligned
from entrenar.quant import QTensor, QType
from entrenar.quant.qtypes import native

ROOMS = "(two layers)"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
Bytes = NDArray[np.uint8]
Read = Callable[[str, Bytes], None]  # a tensor's stored bytes, by the file's name, into an array


def layer_of(name: str) -> int | None:
    """The number of the layer that a weight belongs to, by its Hugging Face name."""
    match = _LAYER.match(name)
    return None if match is None else int(match[1])


def streamed_layers(kept: Mapping[str, object]) -> dict[str, int]:
    """The layer of each weight that can be streamed: of a layer, and kept as the file has it, quantized."""
    layers = {name: layer_of(name) for name, kind in kept.items() if isinstance(kind, QType) and kind.decodes}
    return {name: layer for name, layer in layers.items() if layer is not None}


def resident(sizes: Mapping[str, int], streamed: Mapping[str, int]) -> dict[str, int]:
    """Bytes in memory by weight, the streamed ones as the two rooms that they take turns in."""
    layers = Counter[int]()
    for name, layer in streamed.items():
        layers[layer] += sizes[name] + ALIGNMENT
    rooms = {ROOMS: 2 * max(layers.values())} if layers else {}
    return {name: size for name, size in sizes.items() if name not in streamed} | rooms


class StreamedQTensor(QTensor):
    """A QTensor whose bytes are in memory only while its layer's turn lasts: `bytes` and `data` are good until the same
    thread asks for another layer's."""

    __slots__ = ("_layer", "_place", "_stream")
    _layer: int
    _place: slice
    _stream: LayerStream

    def __init__(self, stream: LayerStream, layer: int, place: slice, qtype: QType, shape: tuple[int, ...]) -> None:
        for name, value in (("_stream", stream), ("_layer", layer), ("_place", place), ("qtype", qtype),
                            ("shape", shape), ("block", 64)):  # fmt: skip
            object.__setattr__(self, name, value)

    @property
    def bytes(self) -> Bytes:
        return self._stream.layer(self._layer)[self._place]

    @property
    def data(self) -> Any:
        return native().Packed(self.qtype.name, self.bytes, self.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        raise UsageError("a streamed weight stays in its file and can't be pickled; load the model where it is needed")

    @property
    def nbytes(self) -> int:
        return int(self._place.stop - self._place.start)


class LayerStream:
    """The layers of one file."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._tensors: dict[int, list[tuple[str, slice, int, Transform]]] = {}  # of a layer: name, place, rows
        self._of_thread = threading.local()

    @property
    def room_bytes(self) -> int:
        """Memory that one layer takes at most."""
        return max(map(self._size, self._tensors), default=0)

    def weight(
        self, layer: int, name: str, qtype: QType, shape: tuple[int, ...], nbytes: int, transform: Transform
    ) -> StreamedQTensor:
        """A weight of a layer, which the file calls `name`; all are asked for before the first is used."""
        begin = -(-self._size(layer) // ALIGNMENT) * ALIGNMENT
        place = slice(begin, begin + nbytes)
        self._tensors.setdefault(layer, []).append((name, place, shape[0], transform))
        return StreamedQTensor(self, layer, place, qtype, shape)

    def layer(self, index: int) -> Bytes:
        """The bytes of a layer, until the calling thread asks for another one.

        Raises:
            FormatError: the file can't be read any more.
        """
        rooms: _Rooms | None = getattr(self._of_thread, "rooms", None)
        if rooms is None or rooms.process != os.getpid():  # a forked process lacks the thread that reads
            rooms = self._of_thread.rooms = _Rooms(self)
        return rooms.layer(index)

    def __contains__(self, layer: int) -> bool:
        return layer in self._tensors

    def read(self, layer: int, room: Bytes) -> None:
        for name, place, rows, transform in self._tensors[layer]:
            target = room[place]
            if transform is SAME:
                self._read(name, target)
                continue
            stored = np.empty_like(target)
            self._read(name, stored)
            target.reshape(rows, -1)[...] = transform.from_gguf(stored.reshape(rows, -1))

    def _size(self, layer: int) -> int:
        tensors = self._tensors.get(layer)
        return tensors[-1][1].stop if tensors else 0


class _Rooms:
    """Two layers in memory, for one thread of one process, and the thread that reads ahead for it.

    It may be interrupted anywhere: what a room holds is known when it has been read whole, and whoever wants to fill
    one waits for all reading that was ever begun.
    """

    def __init__(self, stream: LayerStream) -> None:
        self.process = os.getpid()
        self._stream = stream
        self._rooms = [aligned((stream.room_bytes,), np.dtype(np.uint8)) for _ in range(2)]
        self._holds: list[int | None] = [None, None]  # the layer in each room
        self._last = -1
        self._thread = ThreadPoolExecutor(1, "entrenar-stream")

    def layer(self, index: int) -> Bytes:
        """The room that holds a layer; the one after it in the present direction begins to be read into the other."""
        if index not in self._holds:
            self._wait()
        if index not in self._holds:
            self._fill(1 if self._holds[0] == self._last else 0, index)
        room = self._holds.index(index)
        if index != self._last:
            following = index + (1 if index > self._last else -1)
            self._wait()
            self._last = index
            if following in self._stream and following not in self._holds:
                self._holds[1 - room] = None  # now, not when the thread comes to it
                self._thread.submit(self._fill, 1 - room, following)
        return self._rooms[room]

    def _wait(self) -> None:
        """Until nothing is being read. What failed is read again, and then raises, when its turn comes."""
        self._thread.submit(int).result()

    def _fill(self, room: int, layer: int) -> None:
        self._holds[room] = None
        self._stream.read(layer, self._rooms[room])
        self._holds[room] = layer
