"""The random numbers of dropout: a seed and a position, so that they can be saved and drawn again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from entrenar.errors import UsageError


class Rng:
    """Seed and position of the counter-based generator (Philox 4x32-10).

    Attributes:
        seed, offset: integers from 0 to 2^64 - 1; one position gives four numbers.
    """

    def __init__(self) -> None:
        self.seed = self.offset = 0
        self._lock = threading.Lock()

    def take(self, n: int) -> tuple[int, int]:
        """(seed, offset) at which to draw n numbers; the next caller gets those behind them."""
        with self._lock:
            offset = self.offset
            self.offset = (offset + -(-n // 4)) % 2**64
        return self.seed, offset

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "offset": self.offset}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        for name in ("seed", "offset"):
            value = state.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**64:
                raise UsageError(f"random {name} {value!r}: give an integer from 0 to 2^64 - 1")
        self.seed, self.offset = state["seed"], state["offset"]

    @contextmanager
    def replay(self, state: Mapping[str, int]) -> Iterator[None]:
        """Draw from `state` inside the block, and go on from here after it."""
        now = self.state_dict()
        self.load_state_dict(state)
        try:
            yield
        finally:
            self.load_state_dict(now)


default_rng = Rng()


def manual_seed(seed: int) -> None:
    """Start the random numbers of dropout over from `seed`."""
    default_rng.load_state_dict({"seed": seed, "offset": 0})
