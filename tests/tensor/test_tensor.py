"""What a Tensor is made of and how it behaves among numbers and arrays."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import entrenar
from entrenar import ops
from entrenar.errors import DTypeError, ShapeError
from entrenar.tensor import Tensor

pytestmark = pytest.mark.tier1


@pytest.mark.parametrize(
    "data",
    [3, 2.5, True, [1, 2], [[1.0], [2.0]], np.arange(3), np.float64(1.5), np.ones(2, ">f4")],
)
def test_numbers_of_any_kind_become_float32(data: object) -> None:
    x = Tensor(data)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x.numpy(), np.asarray(data, np.float32))


def test_float32_is_shared_and_16_bit_storage_kept() -> None:
    a = np.ones((2, 3), np.float32)
    assert np.shares_memory(Tensor(a).numpy(), a)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert Tensor(np.ones(2, dtype)).dtype == dtype
    assert Tensor(np.ones(2, ml_dtypes.bfloat16), requires_grad=True).requires_grad
    with pytest.raises(DTypeError, match="float16 is frozen storage"):
        Tensor(np.ones(2, np.float16), requires_grad=True)


def test_unaligned_data_is_copied() -> None:
    raw = np.zeros(9, np.uint8)[1:].view(np.float32)
    assert not raw.flags.aligned
    assert Tensor(raw).numpy().flags.aligned


@pytest.mark.parametrize("data", ["text", [None], np.ones(2, complex), object()])
def test_what_is_no_number_is_refused(data: object) -> None:
    with pytest.raises(DTypeError, match="real numbers"):
        Tensor(data)


def test_attributes_and_conversions() -> None:
    x = Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    assert (x.shape, x.ndim, x.size, x.dtype, x.requires_grad) == ((2, 3), 2, 6, np.float32, True)
    assert np.asarray(x) is x.data
    assert np.array(x, dtype=np.float64).dtype == np.float64
    assert x.T.shape == (3, 2)
    assert Tensor(x).data is x.data
    assert x.sum().item() == 15.0
    assert [row.numpy().tolist() for row in x] == [[0, 1, 2], [3, 4, 5]]
    assert not x.detach().requires_grad
    assert repr(Tensor([1.5, 2.0], True)) == "Tensor([1.5, 2. ], shape=(2,), requires_grad=True)"
    with pytest.raises(ShapeError, match=r"one element is needed, the tensor has shape \(2, 3\)"):
        x.item()
    assert isinstance(hash(x), int)
    assert x.backend.__name__ == "entrenar._native"


NUMBERS = [2.0, 3, np.float32(2), np.float64(2), np.int64(3), np.array([2.0, 5.0], np.float32)]


@pytest.mark.parametrize("other", NUMBERS, ids=[type(n).__name__ for n in NUMBERS])
def test_operators_with_numbers_and_arrays_on_either_side(other: object) -> None:
    a = np.array([4.0, 0.5], np.float32)
    x = Tensor(a)
    b = np.asarray(other, np.float32)
    for actual, expected in (
        (x + other, a + b), (x - other, a - b), (x * other, a * b), (x / other, a / b), (x**other, a**b),
        (other + x, b + a), (other - x, b - a), (other * x, b * a), (other / x, b / a), (other**x, b**a),
        (-x, -a),
    ):
        assert isinstance(actual, Tensor)
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6)


def test_matmul_operator_with_arrays_on_either_side() -> None:
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((3, 2), np.float32)
    for product in (Tensor(a) @ Tensor(b), Tensor(a) @ b, a @ Tensor(b)):
        np.testing.assert_array_equal(product.numpy(), a @ b)


def test_in_place_operators_make_a_new_tensor() -> None:
    x = Tensor([1.0, 2.0], requires_grad=True)
    y = x
    y += 1
    assert x.numpy().tolist() == [1, 2]
    y.sum().backward()
    assert x.grad.numpy().tolist() == [1, 1]


def test_methods_and_functions_are_the_same() -> None:
    x = Tensor(np.linspace(0.5, 2, 6).reshape(2, 3))
    for method, function in (
        (x.exp(), ops.exp(x)), (x.log(), ops.log(x)), (x.pow(3), ops.pow(x, 3)), (x.mean(0), ops.mean(x, 0)),
        (x.sum(axis=1, keepdims=True), ops.sum(x, 1, True)), (x.reshape(3, 2), ops.reshape(x, (3, 2))),
        (x.transpose(1, 0), ops.transpose(x, (1, 0))), (x[1], ops.slice(x, 1)),
    ):
        np.testing.assert_array_equal(method.numpy(), function.numpy())


def test_moving_values_copies_nothing_where_strides_do() -> None:
    x = Tensor(np.arange(24.0).reshape(2, 3, 4))
    for view in (x.reshape(6, 4), x.transpose(2, 0, 1), x.T, x[:, ::-1], x[..., 1]):
        assert np.shares_memory(view.numpy(), x.numpy())


def test_the_public_tensor_has_its_operators() -> None:
    assert entrenar.Tensor is Tensor
    assert (entrenar.Tensor([1.0]) + 1).item() == 2
