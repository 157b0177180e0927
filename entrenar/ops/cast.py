"""From one type to the other."""

from __future__ import annotations

from entrenar.backend import cpu
from entrenar.errors import UsageError
from entrenar.ops._arrays import contiguous
from entrenar.tensor import BFLOAT16, FLOAT32, Array, Tensor, Vjp, op

_TYPES = {"f32": FLOAT32, "bf16": BFLOAT16}


@op(half=("x",))
def cast(x: Tensor, dtype: str) -> tuple[Array, Vjp]:
    """x as "f32" or "bf16", rounded to nearest even; x itself where it is that already. The gradient is cast back."""
    if dtype not in _TYPES:
        raise UsageError(f"cast: dtype={dtype!r}; give 'f32' or 'bf16'")
    if x.dtype == _TYPES[dtype]:
        return x.data.view(), lambda g: (g,)
    before = x.dtype
    return cpu.convert(x.data, _TYPES[dtype]), lambda g: (cpu.convert(contiguous(g), before),)
