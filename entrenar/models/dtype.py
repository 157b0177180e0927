"""Which type weights are kept in and which one the arithmetic between them flows in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrenar.backend import cpu
from entrenar.errors import ConfigError
from entrenar.quant import QType

Compute = Literal["f32", "bf16"]
StorageName = Literal["auto", "f32", "f16", "bf16"]
DTypeName = Literal["auto", "f32", "f16", "bf16", "mixed"]

DTYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


def overflows(values: NDArray[Any]) -> bool:
    """Whether numbers have become infinite as f16, whose largest is 65504; of other types none has."""
    return values.dtype == np.float16 and bool(np.any((values.view(np.uint16) & 0x7FFF) == 0x7C00))


def sixteen_bit(values: NDArray[np.float32]) -> NDArray[Any]:
    """As f16, which has more bits than bf16, or as bf16 where f16 can't hold them."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    return values.astype(DTYPES["bf16"]) if overflows(half) else half


@dataclass(frozen=True)
class Policy:
    """What a `dtype` argument means.

    Attributes:
        storage: type of the matrices, None as they are stored. compute: type of what flows from layer to layer,
            None as `natural` says.
    """

    storage: np.dtype[Any] | None
    compute: Compute | None

    @classmethod
    def named(cls, name: str) -> Policy:
        """
        Raises:
            ConfigError: there is no such policy.
        """
        if name not in _POLICIES:
            raise ConfigError("dtype", f"{name!r} is not one of {', '.join(_POLICIES)}")
        return _POLICIES[name]


_POLICIES = {
    "auto": Policy(None, None),
    "f32": Policy(DTYPES["f32"], "f32"),  # exact: f32 everywhere
    "f16": Policy(DTYPES["f16"], None),
    "bf16": Policy(DTYPES["bf16"], "bf16"),
    "mixed": Policy(DTYPES["f32"], "bf16"),  # trainable f32 weights, rounded as they are multiplied
}


def fresh(name: DTypeName, quant: str | None) -> Policy:
    """What a `dtype` argument means for a model with random weights; see `CausalLM.from_config`."""
    if name == "auto" and quant is not None:
        return Policy(DTYPES["bf16"], None)
    return Policy.named(("mixed" if cpu.fast_bf16() else "f32") if name == "auto" else name)


def natural(types: Iterable[QType]) -> Compute:
    """f32 where all weights are f32; else bf16 where this CPU multiplies that faster."""
    return "f32" if all(kind.name == "f32" for kind in types) or not cpu.fast_bf16() else "bf16"


def storage_named(name: str) -> np.dtype[Any] | None:
    """A type of weights in a file; None for "auto".

    Raises:
        ConfigError: there is no such type.
    """
    if name != "auto" and name not in DTYPES:
        raise ConfigError("dtype", f"{name!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES.get(name)
