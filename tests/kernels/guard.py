"""Arrays that end where the process may not read: a kernel that looks one byte further is killed."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
from numpy.typing import DTypeLike, NDArray

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_kept: list[mmap.mmap] = []  # forbidden pages live as long as the process


def guarded(x: NDArray[np.generic], dtype: DTypeLike | None = None) -> NDArray[np.generic]:
    """A C-contiguous copy of x whose last byte is the last of its page; the next page can't be touched."""
    x = np.ascontiguousarray(x, dtype)
    page = mmap.PAGESIZE
    size = -(-max(x.nbytes, 1) // page) * page
    block = mmap.mmap(-1, size + page)
    _kept.append(block)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    assert _libc.mprotect(start + size, page, 0) == 0
    whole = np.frombuffer(block, np.uint8, size)
    out = whole[size - x.nbytes :].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out
