"""Optimizer steps against float64, over several steps."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.checks import TAILS, assert_close, floats, wide

from entrenar import _native
from entrenar.errors import DTypeError, ShapeError, UsageError


@pytest.mark.tier1
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam(isa: str, decoupled: bool) -> None:
    lr, b1, b2, eps, decay = 3e-3, 0.9, 0.999, 1e-8, 0.1
    for n in [*TAILS, 3001]:
        p, m, v = floats(n, n), np.zeros(n, np.float32), np.zeros(n, np.float32)
        wp, wm, wv = wide(p).copy(), wide(m).copy(), wide(v).copy()
        for step in (1, 2, 3):
            g = floats(n + step, n)
            _native.adam_step(p, g, m, v, lr, b1, b2, eps, decay, step, decoupled)
            grad = wide(g) if decoupled else g + decay * wp
            wm, wv = b1 * wm + (1 - b1) * grad, b2 * wv + (1 - b2) * grad**2
            if decoupled:
                wp *= 1 - lr * decay
            wp -= lr * (wm / (1 - b1**step)) / (np.sqrt(wv / (1 - b2**step)) + eps)
            assert_close(p, wp)
            assert_close(m, wm)
            assert_close(v, wv)


def test_adam_far_into_training_and_with_tiny_gradients(isa: str) -> None:
    p, g = np.ones(70, np.float32), floats(1, 70) * np.float32(1e-12)
    m, v = np.zeros(70, np.float32), np.zeros(70, np.float32)
    _native.adam_step(p, g, m, v, 0.1, 0.9, 0.95, 0.0, 0.0, 1, True)
    assert_close(p, 1 - 0.1 * np.sign(g))
    _native.adam_step(p, g, m, v, 0.0, 0.9, 0.999, 1e-8, 0.5, 10**7, True)
    assert np.isfinite(p).all()


@pytest.mark.tier1
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd(isa: str, momentum: float, nesterov: bool) -> None:
    lr, decay = 0.05, 0.01
    for n in [*TAILS, 3001]:
        p, buf = floats(n, n), np.zeros(n, np.float32) if momentum else None
        wp, wb = wide(p).copy(), np.zeros(n)
        for step in range(3):
            g = floats(n + step, n)
            _native.sgd_step(p, g, buf, lr, momentum, decay, nesterov)
            grad = g + decay * wp
            wb = momentum * wb + grad
            wp -= lr * (grad + momentum * wb if nesterov else wb)
            assert_close(p, wp)


def test_results_do_not_depend_on_threads(isa: str, same_on_any_threads) -> None:
    def adam() -> tuple[np.ndarray, ...]:
        p, m, v = floats(1, 70001), floats(2, 70001), np.abs(floats(3, 70001))
        _native.adam_step(p, floats(4, 70001), m, v, 1e-3, 0.9, 0.999, 1e-8, 0.01, 5, True)
        return p, m, v

    def sgd() -> tuple[np.ndarray, ...]:
        p, buf = floats(1, 130001), floats(2, 130001)
        _native.sgd_step(p, floats(4, 130001), buf, 1e-3, 0.9, 0.01, True)
        return p, buf

    same_on_any_threads(adam)
    same_on_any_threads(sgd)


def test_what_can_not_be_stepped() -> None:
    p, g = np.zeros(4, np.float32), np.zeros(4, np.float32)
    rest = (1e-3, 0.9, 0.999, 1e-8, 0.0, 1, True)
    with pytest.raises(ShapeError, match=r"adam_step: p has shape \(4,\), g \(3,\)"):
        _native.adam_step(p, g[:3], g, g, *rest)
    with pytest.raises(ShapeError, match="adam_step: p is written in place and must be C-contiguous"):
        _native.adam_step(np.zeros(8, np.float32)[::2], g, g, g, *rest)
    with pytest.raises(DTypeError, match="adam_step: m must be float32"):
        _native.adam_step(p, g, np.zeros(4), g, *rest)
    frozen = np.zeros(4, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(DTypeError, match="sgd_step: p is written in place but read-only"):
        _native.sgd_step(frozen, g, None, 0.1, 0.0, 0.0, False)
    with pytest.raises(UsageError, match="adam_step: step=0 must count from 1"):
        _native.adam_step(p, g, p.copy(), p.copy(), 1e-3, 0.9, 0.999, 1e-8, 0.0, 0, True)
    with pytest.raises(UsageError, match=r"momentum=0\.9 needs buf"):
        _native.sgd_step(p, g, None, 0.1, 0.9, 0.0, False)
