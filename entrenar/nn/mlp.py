"""The gated feed-forward block: down(silu(gate(x)) · up(x))."""

from __future__ import annotations

from collections.abc import Mapping

from entrenar import ops
from entrenar.nn.layers import Linear
from entrenar.nn.module import Module
from entrenar.tensor import Tensor


class GatedMlp(Module):
    """`inputs`: what gate and up come from, by module name: two projections, or one whose first half is the gate."""

    def __init__(self, inputs: Mapping[str, Linear], down_proj: Linear) -> None:
        vars(self).update(inputs)
        self._inputs = tuple(inputs.values())
        self.down_proj = down_proj

    def __call__(self, x: Tensor) -> Tensor:
        if len(self._inputs) == 2:
            gate_proj, up_proj = self._inputs
            return self.down_proj(ops.swiglu(gate_proj(x), up_proj(x)))
        (gate_up_proj,) = self._inputs
        both = gate_up_proj(x)
        half = both.shape[-1] // 2
        return self.down_proj(ops.swiglu(both[..., :half], both[..., half:]))
