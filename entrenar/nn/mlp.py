"""The gated feed-forward block: down(silu(gate(x)) · up(x))."""

from __future__ import annotations

from collections.abc import Mapping

from entrenar.nn.layers import Linear, RMSNorm, project
from entrenar.nn.module import Module
from entrenar.tensor import Tensor


class GatedMlp(Module):
    """`inputs`: what gate and up come from, by module name: two projections, or one whose first half is the gate."""

    def __init__(self, inputs: Mapping[str, Linear], down_proj: Linear) -> None:
        vars(self).update(inputs)
        self._inputs = tuple(inputs.values())
        self.down_proj = down_proj

    def __call__(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """x + mlp(norm(x)), x (B, T, d)."""
        gate_up = project(x, self._inputs, norm=norm)
        return project(gate_up, [self.down_proj], gated=True, residual=x)
