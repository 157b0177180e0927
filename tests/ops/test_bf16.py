"""bfloat16 on the tape: every operation that serves it, its frozen 16-bit weights, and what is refused."""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
import pytest
import reference as ref
from op_samples import SAMPLES, Sample

from entrenar import ops
from entrenar.errors import DTypeError, ShapeError, UsageError
from entrenar.tensor import OPS, Tensor, checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
# A path through a fused operation rounds at most eight times (h, low-rank product, result; gradient, its low rank, dh,
# dx, and the cast that the test adds), each by up to 2^-8 of a value.
BOUND = 2.0**-5
SERVED = [sample for sample in SAMPLES if sample.flow]


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(BF16).astype(np.float32)


@pytest.mark.tier2
@pytest.mark.parametrize("sample", SERVED, ids=str)
def test_forward_and_gradients_are_within_roundings_of_float64(sample: Sample) -> None:
    arrays = [rounded(x) if i in sample.flow else x for i, x in enumerate(sample.operands)]
    leaves = [Tensor(x, requires_grad=True) for x in arrays]
    y = sample.call(*(ops.cast(x, "bf16") if i in sample.flow else x for i, x in enumerate(leaves)))
    expected = sample.reference(*(x.astype(np.float64) for x in arrays))
    assert y.dtype == (np.float32 if sample.op in ("linear_cross_entropy", "cast") else BF16)
    assert ref.error(y.numpy(), expected) <= BOUND
    g = rounded(np.random.default_rng(3).normal(size=y.shape))
    y.backward(g)
    for i, x in enumerate(leaves):
        assert x.grad.dtype == np.float32
        assert ref.error(x.grad.numpy(), ref.gradient(sample.reference, arrays, g, i)) <= BOUND


@pytest.mark.tier2
@pytest.mark.parametrize("sample", SERVED, ids=str)
def test_a_gradient_has_the_type_of_its_tensor(sample: Sample) -> None:
    operands = [
        ops.cast(Tensor(x, requires_grad=True), "bf16" if i in sample.flow else "f32")
        for i, x in enumerate(sample.operands)
    ]
    y = sample.call(*operands)
    grads = y._node.vjp(np.ones(y.shape, y.dtype))
    assert [d.dtype for d in grads] == [x.dtype for x in operands]


@pytest.mark.tier1
def test_the_operations_that_serve_it_are_those_with_a_sample() -> None:
    def takes_bf16(name: str) -> bool:
        first = next(iter(inspect.signature(OPS[name]).parameters))
        x = Tensor(np.ones((1, 1), BF16))
        try:
            OPS[name](**{first: [x] if name == "concat" else x})
        except DTypeError:
            return False
        except (ShapeError, TypeError):
            pass  # its other arguments are missing, or 1 is odd
        return True

    storage = {"embedding"}
    assert {name for name in OPS if takes_bf16(name)} - storage == {sample.op for sample in SERVED}


@pytest.mark.tier1
def test_types_that_do_not_go_together() -> None:
    x, y = Tensor(np.ones((2, 4))), Tensor(np.ones((2, 4), BF16))
    part = ops.Part(Tensor(np.ones((4, 4))))
    for call in (
        lambda: x + y, lambda: y + 1.0, lambda: ops.swiglu(y, x), lambda: ops.projection(x, [part], residual=y),
        lambda: ops.concat([x, y]),
    ):
        with pytest.raises(DTypeError, match=r"float32 and bfloat16; ops\.cast"):
            call()
    for call in (lambda: y * 2, lambda: ops.rms_norm(x, y[0]), lambda: ops.softmax(y), lambda: y.sum()):
        with pytest.raises(DTypeError, match=r'is bfloat16; give float32, see ops\.cast\(x, "f32"\)'):
            call()
    for wrong in (ops.Part(part.weight, y[0]), ops.Part(part.weight, None, ops.Lora(y, y.T, 1.0))):
        with pytest.raises(DTypeError, match=r"projection: (bias|lora A) is bfloat16; give float32"):
            ops.projection(x, [wrong])
    with pytest.raises(UsageError, match="give 'f32' or 'bf16'"):
        ops.cast(x, "f16")


@pytest.mark.tier1
def test_cast_and_its_way_back() -> None:
    x = Tensor([1.0, 1.0 + 2.0**-9, -3.0], requires_grad=True)
    y = ops.cast(x, "bf16")
    assert y.numpy().tolist() == [1, 1, -3]
    assert (y * 1 if y.dtype != BF16 else ops.cast(y, "f32")).dtype == np.float32
    ops.cast(y, "f32").backward(np.array([1.0, 2.0, 1.0 + 2.0**-9], np.float32))
    assert x.grad.numpy().tolist() == [1, 2, 1]
    half = Tensor(np.array([0.1], np.float16))
    assert ops.cast(half, "f32").item() == np.float32(np.float16(0.1))


@pytest.mark.tier1
def test_a_bf16_value_among_numbers_and_arrays() -> None:
    y = ops.cast(Tensor([[1.0, 2.5]], requires_grad=True), "bf16")
    assert repr(y) == "Tensor([[1, 2.5]], shape=(1, 2), requires_grad=True)"
    assert np.asarray(y).dtype == BF16
    assert np.array(y, np.float64).tolist() == [[1, 2.5]]
    assert y[0, 1].item() == 2.5
    assert y.detach().dtype == BF16
    assert Tensor(y).dtype == BF16
    with pytest.raises(ValueError, match="read-only"):
        y.numpy()[0] = 0


@pytest.mark.tier1
def test_gradients_that_meet_are_added_in_bf16_and_in_the_memory_of_one_of_them() -> None:
    x = Tensor(np.ones((2, 4)), requires_grad=True)
    w = Tensor(np.full((4, 4), 0.5))
    h = ops.cast(x, "bf16")
    y = ops.projection(h, [ops.Part(w)], residual=h)
    (y + h).backward(np.ones((2, 4)))
    assert x.grad.numpy().tolist() == [[4.0] * 4] * 2
    with pytest.raises(DTypeError, match="grad is float16"):
        ops.cast(x, "bf16").backward(np.ones((2, 4), np.float16))
    again = Tensor(np.ones((2, 4)), requires_grad=True)
    out = checkpoint(lambda h: ops.projection(h, [ops.Part(w)], residual=h) + h, ops.cast(again, "bf16"))
    out.backward(np.ones((2, 4)))
    assert again.grad.numpy().tolist() == x.grad.numpy().tolist()
