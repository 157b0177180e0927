"""Comparisons of f32 and bf16 results with float64 references."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
BF16 = ml_dtypes.bfloat16
FLOWS = [np.float32, BF16]  # types of activations and their gradients

# Sizes that meet every vector tail, and some that cross a block, a tile or a piece of a reduction.
TAILS = range(1, 66)


def floats(seed: int, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    """Normal numbers."""
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, np.float32)


def wide(x: Array) -> NDArray[np.float64]:
    return np.asarray(x, np.float64)


def rounding(dtype: DTypeLike) -> float:
    """The relative error of storing an f32 result as that type: half a unit in the last place of bf16's 8 bits."""
    return 2.0**-8 if np.dtype(dtype) == BF16 else 0.0


def assert_close(
    got: Array, want: Array, rel: float = 1e-6, scale: float | None = None, dtype: DTypeLike = np.float32
) -> None:
    """The largest error before rounding to `dtype` is within rel of `scale`, by default the largest value (give the
    terms' where they cancel)."""
    assert got.dtype == dtype
    assert got.shape == np.shape(want)
    if scale is None:
        scale = np.abs(want).max(initial=0)
    assert (np.abs(wide(got) - want) - rounding(dtype) * np.abs(want)).max(initial=0) <= rel * (
        1 + rounding(dtype)
    ) * scale


def assert_each_close(
    got: Array, want: Array, rel: float = 1e-6, floor: float = 1.5e-45, dtype: DTypeLike = np.float32
) -> None:
    """Every element is within rel of its own value (or `floor`, a denormal's grain) before it is rounded to `dtype`;
    NaN and infinities are alike."""
    assert got.dtype == dtype
    assert got.shape == np.shape(want)
    with np.errstate(over="ignore"):
        as_float = np.asarray(want, np.float64).astype(np.float32)
    special = ~np.isfinite(as_float)
    np.testing.assert_array_equal(wide(got)[special], as_float[special])
    error = np.abs(wide(got) - np.where(special, 0, want))[~special]
    allowed = ((rel + rounding(dtype)) * np.abs(want) + floor)[~special]
    assert (error <= allowed).all(), (error / allowed).max()
