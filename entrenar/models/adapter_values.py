"""The numbers of an adapter's file, whichever its form: floating-point ones, and finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import FormatError


def floats(path: Path, name: str, array: NDArray[Any]) -> NDArray[np.float32]:
    """A copy of a tensor in f32.

    Raises:
        FormatError: it holds integers, or something that is no finite number of f32.
    """
    if array.dtype.kind in "biuc":
        raise FormatError(path, name, f"is of type {array.dtype}; an adapter's tensors hold floating-point numbers")
    with np.errstate(over="ignore"):  # of f64
        values = np.array(array, np.float32)
    if not np.isfinite(values).all():
        raise FormatError(path, name, "holds NaN or infinities; the training that made it failed, take an earlier one")
    return values
