"""Clipping by global norm against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.errors import ConfigError
from entrenar.optim import clip_grad_norm
from entrenar.tensor import Tensor

pytestmark = pytest.mark.tier1


def with_grads(*grads: np.ndarray | None) -> list[Tensor]:
    tensors = []
    for grad in grads:
        tensor = Tensor(np.zeros(1 if grad is None else grad.shape), requires_grad=True)
        tensor.grad = None if grad is None else Tensor(grad)
        tensors.append(tensor)
    return tensors


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(0, 2**32 - 1), st.floats(0.01, 100))
def test_norm_and_scaling(sizes: list[int], seed: int, max_norm: float) -> None:
    rng = np.random.default_rng(seed)
    grads = [rng.standard_normal(size).astype(np.float32) for size in sizes]
    tensors = with_grads(*(grad.copy() for grad in grads))
    expected = math.sqrt(sum(float((grad.astype(np.float64) ** 2).sum()) for grad in grads))
    assert clip_grad_norm(tensors, max_norm) == pytest.approx(expected, rel=1e-12)
    factor = min(1.0, max_norm / expected)
    for tensor, grad in zip(tensors, grads, strict=True):
        np.testing.assert_allclose(tensor.grad.data, grad * factor, rtol=1e-6)
        if factor == 1.0:
            assert tensor.grad.data.tobytes() == grad.tobytes()


def test_squares_do_not_overflow_in_single_precision() -> None:
    tensors = with_grads(np.full(4, 1e30, np.float32))
    assert clip_grad_norm(tensors, 1.0) == pytest.approx(2e30, rel=1e-6)
    np.testing.assert_allclose(tensors[0].grad.data, 0.5, rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_leaves_the_gradients_alone(bad: float) -> None:
    tensors = with_grads(np.array([3.0, 4.0], np.float32), np.array([bad], np.float32))
    assert not math.isfinite(clip_grad_norm(tensors, 1.0))
    np.testing.assert_array_equal(tensors[0].grad.data, [3.0, 4.0])


def test_missing_gradients_count_as_zero_and_infinity_only_measures() -> None:
    tensors = with_grads(None, np.array([3.0, 4.0], np.float32))
    assert clip_grad_norm([("a", tensors[0]), ("b", tensors[1])], math.inf) == 5.0
    np.testing.assert_array_equal(tensors[1].grad.data, [3.0, 4.0])


@pytest.mark.parametrize("limit", [-1.0, math.nan, "1"])
def test_an_absurd_limit(limit: float) -> None:
    with pytest.raises(ConfigError) as caught:
        clip_grad_norm([], limit)
    assert caught.value.field == "max_norm"
