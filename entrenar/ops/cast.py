"""From one type to the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from entrenar.backend import cpu
from entrenar.errors import UsageError
from entrenar.tensor import BFLOAT16, FLOAT32, Array, Tensor, Vjp, op

_TYPES: dict[str, np.dtype[Any]] = {"f32": FLOAT32, "bf16": BFLOAT16}


@op(half=("x",))
def cast(x: Tensor, dtype: str) -> tuple[Array, Vjp]:
    """x as "f32" or "bf16", rounded to nearest even; x itself where it is that already. The gradient is cast back."""
    before, after = x.dtype, type_named("cast", dtype)
    if before == after:
        return x.data.view(), lambda g: (g,)
    return cpu.convert(x.data, after), lambda g: (cpu.convert(g, before),)


def type_named(op_name: str, dtype: str) -> np.dtype[Any]:
    """One of the two types that flow."""
    if dtype not in _TYPES:
        raise UsageError(f"{op_name}: dtype={dtype!r}; give 'f32' or 'bf16'")
    return _TYPES[dtype]
