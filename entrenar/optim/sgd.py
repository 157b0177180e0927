"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from entrenar.backend import cpu
from entrenar.errors import ConfigError
from entrenar.optim.optimizer import Array, Layout, Optimizer, number
from entrenar.tensor import Tensor


class SGD(Optimizer):
    """g ← g + weight_decay·p;  b ← momentum·b + g;  p ← p - lr·b, or p - lr·(g + momentum·b) with `nesterov`.

    b starts at zero, so that the first step is p - lr·g. Without momentum there is no b and no state.

    Args:
        momentum: in [0, 1). nesterov: needs momentum > 0. weight_decay: L2, added to the gradient.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor | tuple[str, Tensor]],
        lr: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(params, lr)
        self.momentum = number("momentum", momentum, below=1.0)
        self.weight_decay = number("weight_decay", weight_decay)
        self.nesterov = bool(nesterov)
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov", "needs a momentum above 0")

    def _layout(self, data: Array) -> Layout:
        return {"momentum": (data.shape, np.float32)} if self.momentum else {}

    def _update(self, names: list[str], data: list[Array], grads: list[Array], lr: float, scale: float) -> None:
        momenta = self._slot(names, "momentum") if self.momentum else None
        cpu.sgd_step(
            data, grads, momenta, lr, self.momentum, self.weight_decay, self.nesterov, scale, self._random(data)
        )
