"""The gated feed-forward block: down(silu(gate(x)) · up(x)); gate and up from two projections or a fused one."""

from __future__ import annotations

from entrenar import ops
from entrenar.nn.layers import Linear
from entrenar.nn.module import Module
from entrenar.tensor import Tensor


class GatedMlp(Module):
    """Two projections, as in Llama, Mistral and Qwen2."""

    def __init__(self, gate_proj: Linear, up_proj: Linear, down_proj: Linear) -> None:
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class FusedGatedMlp(Module):
    """One projection whose first half is the gate, as in Phi-3."""

    def __init__(self, gate_up_proj: Linear, down_proj: Linear) -> None:
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj

    def __call__(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        half = both.shape[-1] // 2
        return self.down_proj(ops.swiglu(both[..., :half], both[..., half:]))
