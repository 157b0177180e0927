"""The order in which rows are trained on: fixed by the seed, and resumed anywhere inside an epoch.

An epoch's order is a function of (seed, epoch) alone, so the saved state is five numbers. It uses the raw
stream of PCG64, which NumPy promises never to change, and a stable sort: the same order on every platform and
version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from entrenar.errors import CheckpointError, ConfigError


class Sampler:
    """Endless batches of row numbers.

    By default each epoch is a new shuffle of all rows, its last batch perhaps smaller; `shuffle=False` keeps
    the order of the file; `replacement=True` draws every row anew, for random crops.

    Attributes:
        epoch, position: where the next batch begins; position counts rows inside the epoch.
    """

    def __init__(
        self, rows: int, batch_size: int, seed: int = 0, shuffle: bool = True, replacement: bool = False
    ) -> None:
        for name, value, least in (("rows", rows, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(name, f"is {value}; must be at least {least}")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.shuffle, self.replacement = shuffle, replacement
        self.epoch = self.position = 0
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def __iter__(self) -> Sampler:
        return self

    def __next__(self) -> npt.NDArray[np.int64]:
        """The next at most `batch_size` row numbers, int64."""
        if self.replacement:
            keys = self._raw(self.epoch, self.position, self.batch_size)
            batch = (keys % np.uint64(self.rows)).astype(np.int64)
        else:
            batch = self._epoch_order()[self.position : self.position + self.batch_size]
        self.position += len(batch)
        if self.position >= self.rows:
            self.epoch, self.position = self.epoch + 1, 0
        return batch

    @property
    def progress(self) -> float:
        """Epochs done, with the fraction of the present one."""
        return self.epoch + self.position / self.rows

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.rows // self.batch_size)

    def state_dict(self) -> dict[str, int | bool]:
        return {name: getattr(self, name) for name in (*_SETTINGS, "epoch", "position")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises CheckpointError where it belongs to other data or settings.
        """
        for name in _SETTINGS:
            if state.get(name) != getattr(self, name):
                raise CheckpointError(
                    f"data order: the checkpoint has {name} {state.get(name)}, this run {getattr(self, name)}"
                )
        epoch, position = state.get("epoch"), state.get("position")
        if type(epoch) is not int or type(position) is not int or epoch < 0 or not 0 <= position < self.rows:
            raise CheckpointError(f"data order: the checkpoint stands at epoch {epoch!r}, position {position!r}")
        self.epoch, self.position = epoch, position

    def _epoch_order(self) -> npt.NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.rows)
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, np.argsort(self._raw(self.epoch, 0, self.rows), kind="stable")
        return self._order[1]

    def _raw(self, epoch: int, skip: int, count: int) -> npt.NDArray[np.uint64]:
        stream = np.random.PCG64(np.random.SeedSequence((self.seed, epoch)))
        raw: npt.NDArray[np.uint64] = stream.advance(skip).random_raw(count)
        return raw


_SETTINGS = ("rows", "batch_size", "seed", "shuffle", "replacement")
