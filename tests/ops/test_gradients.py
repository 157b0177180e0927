"""Every operation in the registry, forward and backward, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
from op_samples import SAMPLES, Sample

from entrenar.tensor import OPS, Tensor

TOLERANCE = 1e-5
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def tensors(sample: Sample, requires_grad: bool = True) -> list[Tensor]:
    return [Tensor(x.copy(), requires_grad) for x in sample.operands]


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def spread(x: np.ndarray) -> np.ndarray:
    """The same values in memory of another order and with gaps."""
    wide = np.full((*x.shape[::-1], 2), np.nan, np.float32)
    view = wide[..., 0].T
    view[...] = x
    return view


@pytest.mark.tier1
def test_every_operation_has_a_sample() -> None:
    assert set(OPS) == {sample.op for sample in SAMPLES}


@pytest.mark.tier2
@each_sample
def test_forward_and_gradients_equal_float64(sample: Sample) -> None:
    xs = tensors(sample)
    y = sample.call(*xs)
    wide = [x.astype(np.float64) for x in sample.operands]
    assert y.dtype == np.float32
    assert ref.error(y.numpy(), sample.reference(*wide)) <= TOLERANCE
    g = cotangent(y.shape)
    y.backward(g)
    for i, x in enumerate(xs):
        assert x.grad is not None
        assert x.grad.data.flags.c_contiguous
        assert x.grad.data.flags.writeable
        assert ref.error(x.grad.numpy(), ref.gradient(sample.reference, wide, g, i)) <= TOLERANCE


@pytest.mark.tier2
@each_sample
def test_layout_of_operands_and_gradient_does_not_matter(sample: Sample) -> None:
    straight, strided = tensors(sample), [Tensor(spread(x), True) for x in sample.operands]
    for xs, arrange in ((straight, np.ascontiguousarray), (strided, spread)):
        y = sample.call(*xs)
        y.backward(np.asarray(arrange(cotangent(y.shape))).reshape(y.shape))
    for a, b in zip(straight, strided, strict=True):
        assert ref.error(b.grad.numpy(), a.grad.numpy()) <= 1e-6


@pytest.mark.tier2
@each_sample
def test_only_operands_that_need_a_gradient_get_one(sample: Sample) -> None:
    everything = tensors(sample)
    sample.call(*everything).backward(cotangent(sample.call(*everything).shape))
    for wanted in range(len(sample.operands)):
        xs = tensors(sample, requires_grad=False)
        xs[wanted].requires_grad = True
        y = sample.call(*xs)
        y.backward(cotangent(y.shape))
        for i, (x, full) in enumerate(zip(xs, everything, strict=True)):
            if i == wanted:
                np.testing.assert_allclose(x.grad.numpy(), full.grad.numpy(), rtol=1e-6, atol=1e-6)
            else:
                assert x.grad is None


@pytest.mark.tier2
@each_sample
def test_nobody_else_holds_what_a_vjp_returns(sample: Sample) -> None:
    """`backward` adds in place into what is no view of g, so that must be nobody else's memory."""
    xs = tensors(sample)
    y = sample.call(*xs)
    g = cotangent(y.shape)
    returned = [d(None) if callable(d) else d for d in y._node.vjp(g) if d is not None]
    again = [d(None) if callable(d) else d for d in sample.call(*xs)._node.vjp(g) if d is not None]
    own = [d for d in returned if not np.may_share_memory(d, g)]
    others = [x.data for x in xs] + [y.data] + again
    for i, d in enumerate(own):
        assert not any(np.may_share_memory(d, other) for other in others + own[:i])
    for add, d in zip(sample.call(*xs)._node.vjp(g), returned, strict=False):
        if callable(add):  # to what is there
            held = np.ones_like(d)
            assert add(held) is held
            np.testing.assert_allclose(held, 1 + d, rtol=1e-6)


@pytest.mark.tier2
@each_sample
def test_operands_and_the_incoming_gradient_are_left_alone(sample: Sample) -> None:
    xs = tensors(sample)
    y = sample.call(*xs)
    g = cotangent(y.shape)
    before, value = g.copy(), y.numpy().copy()
    y.backward(g)
    np.testing.assert_array_equal(g, before)
    np.testing.assert_array_equal(y.numpy(), value)
    for x, operand in zip(xs, sample.operands, strict=True):
        np.testing.assert_array_equal(x.numpy(), operand)
        assert x.numpy().flags.writeable  # an optimizer will want to
