"""Clipping of gradients by their global norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

from entrenar.backend import cpu
from entrenar.optim.optimizer import number
from entrenar.tensor import Array, Tensor


def grad_norm(params: Iterable[Tensor | tuple[str, Tensor]]) -> float:
    """The L2 norm of all gradients together, summed in double in an order that the shapes fix.

    Args:
        params: Tensors or (name, Tensor) pairs; those without a gradient count as zero.
    """
    return math.sqrt(math.fsum(cpu.square_sums(_gradients(params))))


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by for a norm of at most `max_norm`: 1 where none is needed.

    Raises:
        ConfigError: `max_norm` is negative or no number; ``math.inf`` asks for no clipping.
    """
    limit = math.inf if max_norm == math.inf else number("max_norm", max_norm)
    return limit / norm if math.isfinite(norm) and norm > limit else 1.0


def clip_grad_norm(params: Iterable[Tensor | tuple[str, Tensor]], max_norm: float) -> float:
    """Scale all gradients in place by max_norm / norm where their global L2 norm exceeds `max_norm`.

    A norm that is NaN or infinite is returned and the gradients are left alone: the caller decides what becomes of
    the step. ``optimizer.step(scale=clip_scale(grad_norm(params), max_norm))`` makes the same step without writing
    the gradients.

    Args:
        params: Tensors or (name, Tensor) pairs; those without a gradient count as zero.
        max_norm: at least 0; ``math.inf`` only measures.

    Returns:
        The norm before clipping.
    """
    params = list(params)
    norm = grad_norm(params)
    scale = clip_scale(norm, max_norm)
    if scale != 1.0:
        for grad in _gradients(params):
            cpu.scale_(grad, scale)
    return norm


def _gradients(params: Iterable[Tensor | tuple[str, Tensor]]) -> list[Array]:
    tensors = [item[1] if isinstance(item, tuple) else item for item in params]
    return [tensor.grad.data for tensor in tensors if tensor.grad is not None]
