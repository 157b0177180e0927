"""Clipping of gradients by their global norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

from entrenar.optim.optimizer import number
from entrenar.tensor import Tensor


def clip_grad_norm(params: Iterable[Tensor | tuple[str, Tensor]], max_norm: float) -> float:
    """Scale all gradients in place by max_norm / norm where their global L2 norm exceeds `max_norm`.

    The squares are summed in double. A norm that is NaN or infinite is returned and the gradients are left alone:
    the caller decides what becomes of the step.

    Args:
        params: Tensors or (name, Tensor) pairs; those without a gradient count as zero.
        max_norm: at least 0; ``math.inf`` only measures.

    Returns:
        The norm before clipping.
    """
    limit = math.inf if max_norm == math.inf else number("max_norm", max_norm)
    tensors = [item[1] if isinstance(item, tuple) else item for item in params]
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    norm = math.sqrt(math.fsum(grad.backend.sum_squares(grad.data) for grad in grads))
    if math.isfinite(norm) and norm > limit:
        for grad in grads:
            grad.backend.scale_(grad.data, limit / norm)
    return norm
