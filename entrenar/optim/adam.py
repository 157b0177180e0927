"""Adam (arXiv 1412.6980) and AdamW (arXiv 1711.05101): one fused native pass over each parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from entrenar.optim.optimizer import Array, Optimizer, number
from entrenar.tensor import Tensor


class Adam(Optimizer):
    """m ← β₁m + (1-β₁)g;  v ← β₂v + (1-β₂)g²;  p ← p - lr · m̂ / (√v̂ + eps), hats: divided by 1 - βᵗ.

    t counts the steps of each parameter by itself, as PyTorch does. `weight_decay` is L2: added to the gradient.

    Args:
        betas: (β₁, β₂), each in [0, 1). eps: at least 0. weight_decay: at least 0.

    Raises:
        ConfigError: a value out of range.
    """

    slots = ("m", "v")
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

    def _update(self, tensor: Tensor, grad: Array, state: Mapping[str, Array], step: int, lr: float) -> None:
        tensor.backend.adam_step(
            tensor.data, grad, state["m"], state["v"], lr, self.beta1, self.beta2, self.eps, self.weight_decay,
            step, self.decoupled,
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
