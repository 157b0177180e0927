"""A disk that can stop at any system call, and what it remembers after a power loss.

`Disk` stands between a program and the calls of `os` by which it changes the disk: the n-th can fail or kill the
process, and all are logged. `remembered` rebuilds from the log what a power loss is sure to leave: contents as of each
file's last fsync, and a directory's entries as of its last fsync (or, as unlucky, all of its entries).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CALLS = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")
Step = tuple[str, str, Any]  # what, path, data of a write or source of a rename


class Killed(BaseException):
    """The process ends here: nothing it does afterwards reaches the disk."""


class Disk:
    """Replaces the calls; `stop_at` counts from 1, `error` is the errno of that call, None kills."""

    def __init__(self, patch: pytest.MonkeyPatch, stop_at: int = 0, error: int | None = None) -> None:
        self.steps: list[Step] = []
        self.stop_at, self.error, self.dead = stop_at, error, False
        self._names: dict[int, str] = {}
        for name in CALLS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            step = self._step(name, args, kwargs)
            if self.dead:
                raise Killed
            if step and len(self.steps) + 1 == self.stop_at:
                self.dead, self.stop_at = self.error is None, 0
                raise Killed if self.error is None else OSError(self.error, os.strerror(self.error), step[1])
            result = real(*args, **kwargs)
            if name == "open":
                self._names[result] = self._path(args[0], kwargs)
            if step:
                self.steps.append((*step[:2], bytes(step[2][:result])) if name == "write" else step)
            return result

        return call

    def _step(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
        if name == "open":
            return ("create", self._path(args[0], kwargs), None) if args[1] & os.O_CREAT else None
        if name in ("write", "fsync"):
            return name, self._names[args[0]], args[1] if name == "write" else None
        if name == "rename":
            return name, os.fspath(args[1]), os.fspath(args[0])
        return name, self._path(args[0], kwargs), None

    def _path(self, path: Any, kwargs: dict[str, Any]) -> str:
        folder = kwargs.get("dir_fd")  # shutil.rmtree names things by their directory
        return os.fspath(path) if folder is None else os.path.join(self._names[folder], os.fspath(path))


def remembered(steps: list[Step], root: Path, into: Path, all_entries: bool) -> None:
    """Do to `into`, a copy of `root` as it was, what a power loss leaves of `steps`."""

    def place(path: str) -> Path:
        return into / Path(path).relative_to(root)

    written: dict[str, bytes] = {}
    synced: dict[str, bytes] = {}
    last_sync: dict[str, int] = {}
    for i, (what, path, data) in enumerate(steps):
        if what == "write":
            written[path] = written.get(path, b"") + data
        elif what == "fsync":
            last_sync[path] = i
            synced[path] = written.get(path, b"")
    for i, (what, path, source) in enumerate(steps):
        lost = i > last_sync.get(os.path.dirname(path), -1) and not all_entries
        if lost or what in ("write", "fsync") or not place(path).parent.is_dir():
            continue
        if what == "mkdir":
            place(path).mkdir()
        elif what == "create":
            place(path).write_bytes(synced.get(path, b""))
        elif what == "unlink":
            place(path).unlink(missing_ok=True)
        elif what == "rmdir":
            shutil.rmtree(place(path), ignore_errors=True)
        elif place(source).exists():
            place(source).rename(place(path))
