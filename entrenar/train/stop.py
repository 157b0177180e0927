"""Stopping by Ctrl-C or SIGTERM: the first asks, the second is obeyed at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):
    """Raised by the loop to itself where it finds that a stop was asked for."""


class StopSignals:
    """Inside its block, a first SIGINT or SIGTERM only sets `name`; a second one acts as it did before the block.

    Handlers are put back at the end. Nothing is installed outside of the main thread, nor for a signal that the
    process ignores (as background jobs ignore SIGINT).
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raises StopRequested once a signal has come."""
        if self.name is not None:
            raise StopRequested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
        else:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
