"""Rotary frequencies of a config: plain, linearly scaled, and Llama 3's scaling.

Sources: RoFormer (arXiv 2104.09864); position interpolation (arXiv 2306.15595); Llama 3.1's published rule, whose
frequencies GGUF stores as divisors in ``rope_freqs.weight``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import ConfigError
from entrenar.models.spec import ModelConfig, RopeSpec

F64 = NDArray[np.float64]


def rope_spec(config: ModelConfig, partial: bool = False) -> RopeSpec:
    """Rotated elements a head, and the frequencies (rotary_dim/2,) float64 after scaling.

    partial: whether the architecture can leave a part of each head as it is.

    Raises:
        ConfigError: the scaling's kind is not served, or one of its numbers is missing or impossible.
    """
    if config.partial_rotary_factor != 1 and not partial:
        raise ConfigError("partial_rotary_factor", f"is not served for {config.model_type}: it rotates whole heads")
    rotary_dim = int(config.head_size * config.partial_rotary_factor)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError("partial_rotary_factor", f"gives {rotary_dim} rotated elements; that must be even")
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    inv_freq = np.array([config.rope_theta**-e for e in exponents.tolist()])
    scaling = config.rope_scaling
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type"))
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise ConfigError("rope_scaling", f"type {kind!r} is not served (served: {', '.join(SCALINGS)})")
        inv_freq = inv_freq / SCALINGS[kind](inv_freq, scaling)
    return RopeSpec(rotary_dim, inv_freq)


def _number(scaling: Mapping[str, Any], key: str) -> float:
    value = scaling.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"rope_scaling.{key}", f"{value!r} is not a positive number")
    return float(value)


def _none(inv_freq: F64, scaling: Mapping[str, Any]) -> F64:
    return np.ones_like(inv_freq)


def _linear(inv_freq: F64, scaling: Mapping[str, Any]) -> F64:
    return np.full_like(inv_freq, _number(scaling, "factor"))


def _llama3(inv_freq: F64, scaling: Mapping[str, Any]) -> F64:
    """Divisors: 1 for short wavelengths, ``factor`` for long ones, smooth between."""
    factor, original = _number(scaling, "factor"), _number(scaling, "original_max_position_embeddings")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if high <= low:
        raise ConfigError("rope_scaling.high_freq_factor", f"{high} is not above low_freq_factor {low}")
    turns = original * inv_freq / (2 * np.pi)  # full rotations inside the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


# kind -> divisors (rotary_dim/2,) of the plain frequencies
SCALINGS: dict[str, Callable[[F64, Mapping[str, Any]], F64]] = {
    "default": _none,
    "linear": _linear,
    "llama3": _llama3,
}


def llama3_divisors(config: ModelConfig) -> NDArray[np.float32] | None:
    """What GGUF's ``rope_freqs.weight`` (rotary_dim/2,) holds for this config; None where it has no such tensor."""
    scaling = config.rope_scaling
    if scaling is None or scaling.get("rope_type", scaling.get("type")) != "llama3":
        return None
    plain = rope_spec(config.replace(rope_scaling=None), partial=True).inv_freq
    return _llama3(plain, scaling).astype(np.float32)


def llama3_scaling(divisors: NDArray[np.float32], config: ModelConfig, original: int = 8192) -> dict[str, Any] | None:
    """The Llama 3 scaling with this original context whose divisors these are, or None where none fits.

    The largest divisor is the factor; the two frequency factors are the same in every published model.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    expected = llama3_divisors(config.replace(rope_scaling=scaling))
    if expected is None or expected.shape != divisors.shape or not np.allclose(expected, divisors, rtol=1e-5):
        return None
    return scaling
