"""checkpoint: the same gradients and random numbers as without it, with less kept."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from entrenar import ops
from entrenar.errors import GraphError
from entrenar.tensor import Tensor, checkpoint, default_rng, manual_seed, no_grad

pytestmark = pytest.mark.tier1


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).normal(size=shape), requires_grad=True)


class Layer:
    """A module: its parameters are reached through the closure."""

    def __init__(self, seed: int) -> None:
        self.weight, self.frozen = leaf(4, 4, seed=seed), Tensor(np.eye(4))

    def __call__(self, x: Tensor) -> Tensor:
        return x + ops.dropout(ops.linear(ops.silu(x @ self.frozen), self.weight), 0.5)


def run(checkpointed: bool, requires_grad: bool = True) -> list[np.ndarray]:
    manual_seed(3)
    x, layers = leaf(3, 4), [Layer(1), Layer(2), Layer(3)]
    x.requires_grad = requires_grad
    h = x
    for layer in layers:
        h = checkpoint(layer, h) if checkpointed else layer(h)
    h = ops.dropout(h, 0.5)  # after them: the position is the same too
    (h * h).sum().backward()
    assert (x.grad is not None) == requires_grad
    grads = [layer.weight.grad for layer in layers] + ([x.grad] if requires_grad else [])
    return [h.numpy(), *(g.numpy() for g in grads), np.array(default_rng.offset)]


@pytest.mark.parametrize("requires_grad", [True, False], ids=["input", "parameters only"])
def test_bit_for_bit_as_without_it(requires_grad: bool) -> None:
    for a, b in zip(run(True, requires_grad), run(False, requires_grad), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inside_one_another() -> None:
    layers = [Layer(1), Layer(2)]

    def results(outer, inner) -> list[np.ndarray]:  # type: ignore[no-untyped-def]
        manual_seed(5)
        for layer in layers:
            layer.weight.grad = None
        x = leaf(3, 4)
        outer(lambda h: layers[1](inner(layers[0], h)), x).sum().backward()
        return [x.grad.numpy(), *(layer.weight.grad.numpy() for layer in layers)]

    def plainly(fn, *xs: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return fn(*xs)

    expected = results(plainly, plainly)
    for outer, inner in ((checkpoint, checkpoint), (checkpoint, plainly), (plainly, checkpoint)):
        for a, b in zip(results(outer, inner), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_value_with_a_graph_that_the_function_closes_over() -> None:
    x, y = leaf(2, 3), leaf(2, 3)
    h = x * 2  # used inside by closure, and as an argument, and outside
    out = checkpoint(lambda a: a * h * y, h)
    (out * h).sum().backward()  # 8 x³ y
    np.testing.assert_allclose(x.grad.numpy(), 24 * x.numpy() ** 2 * y.numpy(), rtol=1e-5)
    np.testing.assert_allclose(y.grad.numpy(), 8 * x.numpy() ** 3, rtol=1e-5)


def test_two_values_closed_over_that_share_one_gradient_stay_apart() -> None:
    x, y, z = leaf(3), leaf(3), leaf(3)
    u, v = x * 2, y * 3
    later = u * 5  # older than the checkpoint, so what it sends to u is added to what the checkpoint sent
    out = checkpoint(lambda a: (u + v) * 2 + a, z)
    (out + later).sum().backward()
    assert x.grad.numpy().tolist() == [2 * (2 + 5)] * 3
    assert y.grad.numpy().tolist() == [3 * 2] * 3
    assert z.grad.numpy().tolist() == [1] * 3


def test_one_argument_twice_and_other_arguments() -> None:
    x = leaf(3)
    out = checkpoint(lambda a, b, power, scale: a * b**power * scale, x, x, 2, scale=3.0)
    out.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), 9 * x.numpy() ** 2, rtol=1e-5)


def test_stores_the_arguments_only() -> None:
    def deep(h: Tensor) -> Tensor:
        for _ in range(20):
            h = ops.exp(h * 0.1)
        return h

    x = Tensor(np.zeros((1000, 100)), requires_grad=True)  # 400 kB
    tracemalloc.start()
    try:
        out = checkpoint(deep, x)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1e6
    assert out.requires_grad


def test_nothing_to_differentiate() -> None:
    x = Tensor([1.0, 2.0])
    assert not checkpoint(lambda a: a * 2, x).requires_grad
    with no_grad():
        assert not checkpoint(lambda a: a * 2, leaf(2)).requires_grad
    y = leaf(2)
    out = checkpoint(lambda a: a, y)
    out.sum().backward()
    assert y.grad.numpy().tolist() == [1, 1]


def test_what_is_refused() -> None:
    x, w, leaked = leaf(2), leaf(2), []

    def leak(a: Tensor) -> Tensor:
        leaked.append(a * 2)
        return a * w

    out = checkpoint(leak, x)
    with pytest.raises(GraphError, match="in a checkpoint"):
        leaked[0].sum().backward()
    w.version += 1
    with pytest.raises(GraphError, match="written in place"):
        out.sum().backward()
    with pytest.raises(GraphError, match="returned tuple"):
        checkpoint(lambda a: (a, a), x)


def test_a_failure_inside_leaves_the_random_numbers_where_they_were() -> None:
    manual_seed(9)
    x, calls = leaf(8), []

    def fails_the_second_time(a: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("second")
        return ops.dropout(a * 1.0, 0.5)

    out = checkpoint(fails_the_second_time, x)
    offset = default_rng.offset
    with pytest.raises(KeyError):
        out.sum().backward()
    assert default_rng.offset == offset
    assert (x * 2).requires_grad
