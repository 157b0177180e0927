"""Adam (arXiv 1412.6980) and AdamW (arXiv 1711.05101): one fused native pass over all parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from entrenar.backend import cpu
from entrenar.optim.optimizer import Array, Layout, Optimizer, number
from entrenar.tensor import Tensor

MOMENT_BLOCK = 256  # moments that share a magnitude; EN_MOMENT_BLOCK of csrc/entrenar.h


class Adam(Optimizer):
    """m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²;  p ← p - lr · m̂ / (√v̂ + eps), hats: divided by 1 - βᵗ.

    t counts the steps of each parameter by itself, as PyTorch does. `weight_decay` is L2: added to the gradient.

    Args:
        betas: (β₁, β₂), each in [0, 1). eps: at least 0. weight_decay: at least 0.

    Raises:
        ConfigError: a value out of range.
    """

    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Tensor | tuple[str, Tensor]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr)
        self.beta1 = number("betas[0]", betas[0], below=1.0)
        self.beta2 = number("betas[1]", betas[1], below=1.0)
        self.eps = number("eps", eps)
        self.weight_decay = number("weight_decay", weight_decay)

    def _layout(self, data: Array) -> Layout:
        return {"m": (data.shape, np.float32), "v": (data.shape, np.float32)}

    def _update(self, names: list[str], data: list[Array], grads: list[Array], lr: float, scale: float) -> None:
        cpu.adam_step(
            data, grads, self._slot(names, "m"), self._slot(names, "v"), [self.steps[name] for name in names],
            lr, self.beta1, self.beta2, self.eps, self.weight_decay, self.decoupled, scale,
            self._slot(names, "m_absmax"), self._slot(names, "v_absmax"), self._random(data),
        )  # fmt: skip


class AdamW(Adam):
    """Adam with decoupled decay: p ← p·(1 - lr·weight_decay) first, and the gradient stays as it is."""

    decoupled = True

    def __init__(
        self,
        params: Iterable[Tensor | tuple[str, Tensor]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)


class AdamW8bit(AdamW):
    """AdamW whose moments take a byte each (arXiv 2110.02861): a quarter of the memory of f32 ones.

    Every block of 256 values has codes of its own range, fine near zero and coarser towards its largest magnitude,
    which is kept in f32; see csrc/kernels/adamw8.h. As in bitsandbytes, parameters of fewer than `smallest` elements
    keep f32 moments: norms and biases, whose moments cost nothing.
    """

    smallest: ClassVar[int] = 4096

    def _layout(self, data: Array) -> Layout:
        if data.size < self.smallest:
            return super()._layout(data)
        blocks = (-(-data.size // MOMENT_BLOCK),)
        return {
            "m": (data.shape, np.uint8), "m_absmax": (blocks, np.float32),
            "v": (data.shape, np.uint8), "v_absmax": (blocks, np.float32),
        }  # fmt: skip
