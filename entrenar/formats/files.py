"""Ways to the disk that every format shares: map a file, read JSON, write durably.

Writing goes through plain `os` calls, one system call each, so that tests can stop it at any of them.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.errors import FormatError

Array = np.ndarray[Any, np.dtype[Any]]
Buffer = bytes | mmap.mmap
PathType = str | PathLike[str]

PIECE = 8 << 20  # bytes copied at a time
MAX_JSON = 100_000_000  # bytes; the tokenizer.json of a big vocabulary has about 20 MB


@dataclass(frozen=True)
class LazyArray:
    """An array to be written, made only when its turn comes: `load()` gives it with this shape and dtype."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for n in self.shape:
            count *= n
        return count


def map_file(path: PathType) -> Buffer:
    """The file's bytes as a read-only mapping: nothing is read before it is touched.

    Raises FormatError where there is no such regular file. The file must not be cut short while it is in use.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(path, "", "is not a regular file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""
    except OSError as error:
        raise FormatError(path, "", f"can't be read: {error.strerror}") from error


def forget_pages(buffer: Buffer, start: int, end: int) -> None:
    """Give the whole pages of buffer[start:end] back to the system; touched again, they are read again."""
    _advise(buffer, mmap.MADV_DONTNEED, -(-start // mmap.PAGESIZE), end // mmap.PAGESIZE)


def copy_pages(buffer: Buffer, start: int, out: Array) -> None:
    """Fill `out` (uint8, 1-D) from byte `start` on; no more than two PIECEs of the mapping are in memory at once."""
    source = np.frombuffer(buffer, np.uint8, len(out), start)
    for begin in range(0, len(out), PIECE):
        end = min(begin + PIECE, len(out))
        soon = min(end + PIECE, len(out))
        _advise(buffer, mmap.MADV_WILLNEED, (start + begin) // mmap.PAGESIZE, -(-(start + soon) // mmap.PAGESIZE))
        out[begin:end] = source[begin:end]
        forget_pages(buffer, start + begin, start + end)


def _advise(buffer: Buffer, advice: int, first: int, last: int) -> None:
    """Pages [first, last) of a mapping."""
    if isinstance(buffer, mmap.mmap) and last > first:
        buffer.madvise(advice, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


def view(buffer: Buffer, dtype: np.dtype[Any], count: int, start: int) -> Array:
    """`count` values of `dtype` from byte `start`: read-only, without a copy where the address is aligned."""
    values = np.frombuffer(buffer, np.uint8, count * dtype.itemsize, start).view(dtype)
    if not values.flags.aligned:
        values = values.copy()
        values.flags.writeable = False
    return values


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (`object_pairs_hook`); ValueError for a key that is there twice."""
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return members


def read_json(path: PathType) -> dict[str, Any]:
    """The JSON object in a file. Raises FormatError for anything else, duplicate keys included."""
    buffer = map_file(path)
    if len(buffer) > MAX_JSON:
        raise FormatError(path, "", f"is {len(buffer)} bytes long; JSON beside a model has at most {MAX_JSON}")
    try:
        value = json.loads(buffer[:], object_pairs_hook=unique_members)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or UTF-8, an endless integer
        raise FormatError(path, "", f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(path, "", f"holds a JSON {type(value).__name__}; an object is expected")
    return value


# --- durable writing ---------------------------------------------------------------------------------


def as_bytes(array: Array) -> memoryview:
    """The array's little-endian bytes in C order (a copy only where it is strided). Serves bfloat16, too."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data


class Writer:
    """An open file that writes everything it is given or raises OSError; `size` counts the bytes."""

    def __init__(self, path: PathType) -> None:
        self.path = os.fspath(path)
        self.size = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]  # a single write may take less, 2 GiB at most
        self.size += len(data)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def durable_file(path: PathType) -> Iterator[Writer]:
    """Write a file and fsync it. For files in a directory that is itself renamed into place."""
    writer = Writer(path)
    try:
        yield writer
        writer.sync()
    except OSError as error:
        if error.filename is None:  # a full disk doesn't say which file it was
            error.filename = writer.path
        raise
    finally:
        writer.close()


@contextmanager
def atomic_file(path: PathType) -> Iterator[Writer]:
    """Write a file that appears only when complete: a temporary beside it, fsync, rename, fsync the
    directory.

    If the body raises, the temporary is removed and what was at `path` before is untouched.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.writing-{os.getpid()}"
    try:
        with durable_file(temporary) as writer:
            yield writer
        os.rename(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(target)
        raise
    sync_directory(target.parent)


def write_json(path: PathType, value: Any) -> None:
    """Write an object as readable JSON, atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def sync_directory(path: PathType) -> None:
    """Make the directory's entries survive a power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
