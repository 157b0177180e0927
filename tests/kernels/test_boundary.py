"""The boundary before hostile callers: arrays that lie, overlap, are misaligned, swapped or absurdly large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernels.checks import floats
from numpy.lib.stride_tricks import as_strided

from entrenar import _native
from entrenar.errors import DTypeError, ShapeError, UsageError

pytestmark = pytest.mark.tier1
ENCODINGS = ("q4_0", "q8_0", "q4_k", "q6_k")


class Liar(np.ndarray):
    """Claims to be larger than it is, to Python; NumPy's own C interface knows better."""

    shape = property(lambda self: (1 << 20, 1 << 10))
    size = property(lambda self: 1 << 30)
    ndim = property(lambda self: 2)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return np.zeros(1, np.float32)


def lying(x: np.ndarray) -> np.ndarray:
    return x.view(Liar)


def empty_of(*shape: int) -> np.ndarray:
    return np.empty(shape, np.float32)


def test_a_subclass_is_taken_by_what_it_holds() -> None:
    x, w, ids = floats(1, 6, 4), floats(2, 4), np.array([5, 0])
    calls: list[tuple[Callable[..., Any], tuple[np.ndarray, ...]]] = [
        (_native.copy, (x,)),
        (_native.softmax, (x,)),
        (_native.sum, (x,)),
        (lambda a: _native.square_sums([a]), (x,)),
        (lambda a: _native.unary("exp", a), (x,)),
        (lambda a, b: _native.binary("mul", a, b), (x, w)),
        (lambda a, b: _native.rms_norm(a, b, 1e-5)[0], (x, w)),
        (lambda a: _native.matmul(a, a, trans_b=True), (x,)),
        (lambda a: _native.convert(a, np.float16), (x,)),
        (_native.embedding, (x, ids)),
        (lambda a, i: _native.embedding_backward(a[:2], i, 6), (x, ids)),
        (lambda raw: _native.dequantize("q4_0", raw), (np.arange(36, dtype=np.uint8),)),
    ]
    for call, operands in calls:
        np.testing.assert_array_equal(call(*map(lying, operands)), call(*operands))


def test_an_output_that_lies_about_its_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"out has shape \(2, 2\)"):
        _native.matmul(np.ones((1 << 20, 1), np.float32), np.ones((1, 1 << 10), np.float32),
                       out=lying(np.zeros((2, 2), np.float32)))  # fmt: skip
    with pytest.raises(ShapeError, match=r"x has shape \(2, 2\)"):
        _native.add_(lying(np.zeros((2, 2), np.float32)), np.zeros(8, np.float32))


def test_a_subclass_is_written_in_place() -> None:
    x = np.ones(5, np.float32)
    assert _native.scale_(lying(x), 3.0).base is x
    np.testing.assert_array_equal(x, 3.0)


def misaligned(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"x" + x.tobytes(), x.dtype, x.size, 1).reshape(x.shape)


def test_misaligned_operands_are_copied() -> None:
    x, ids = floats(3, 5, 4), np.array([4, 1, 1])
    half, raw = x.astype(np.float16), np.arange(144, dtype=np.uint8)
    np.testing.assert_array_equal(_native.embedding(misaligned(x), misaligned(ids)), x[ids])
    np.testing.assert_array_equal(_native.embedding(misaligned(half), ids), half[ids].astype(np.float32))
    np.testing.assert_array_equal(_native.convert(misaligned(half), np.float32), half.astype(np.float32))
    product = _native.matmul(x, half, trans_b=True)
    np.testing.assert_array_equal(_native.matmul(x, misaligned(half), trans_b=True), product)
    np.testing.assert_array_equal(_native.dequantize("q4_k", misaligned(raw)), _native.dequantize("q4_k", raw))
    with pytest.raises(ShapeError, match="in place"):
        _native.scale_(as_strided(np.zeros(24, np.uint8)[1:].view(Liar), (21,), (1,))[:20].view(np.float32), 2.0)


def test_other_byte_orders_are_refused() -> None:
    x = floats(4, 3, 3)
    swapped, ids = x.astype(">f4"), np.array([1]).astype(">i8")
    for call in (
        lambda: _native.copy(swapped),
        lambda: _native.matmul(x, swapped),
        lambda: _native.matmul(x, x.astype(">f2")),
        lambda: _native.scale_(swapped, 2.0),
        lambda: _native.embedding(x, ids),
        lambda: _native.cross_entropy(x[:1], ids),
        lambda: _native.convert(swapped, np.float16),
        lambda: _native.convert(x, ">f2"),
    ):
        with pytest.raises(DTypeError):
            call()


def test_read_only_arrays_are_never_written() -> None:
    x, y = np.zeros(4, np.float32), np.ones(4, np.float32)
    x.flags.writeable = False
    for call in (
        lambda: _native.add_(x, y),
        lambda: _native.scale_(x, 2.0),
        lambda: _native.matmul(y.reshape(2, 2), y.reshape(2, 2), out=x.reshape(2, 2)),
        lambda: _native.adam_step([x], [y], [y.copy()], [y.copy()], [1], 0.1, 0.9, 0.99, 1e-8, 0.0, True),
        lambda: _native.adam_step([y.copy()], [y], [y.copy()], [x], [1], 0.1, 0.9, 0.99, 1e-8, 0.0, True),
        lambda: _native.sgd_step([y.copy()], [y], [x], 0.1, 0.9, 0.0, False),
    ):
        with pytest.raises(DTypeError, match="read-only"):
            call()
    np.testing.assert_array_equal(x, 0.0)


def test_overlapping_arrays_of_an_optimizer_are_refused() -> None:
    whole = np.ones(400, np.float32)
    parts = [whole[:100], whole[100:200], whole[200:300], whole[300:]]
    other = [np.ones(9, np.float32) for _ in range(4)]
    for moved in range(4):
        for onto in range(4):
            if moved != onto:
                arrays = list(parts)
                arrays[moved] = whole[onto * 100 + 37 :][:100] if onto < 3 else whole[263:363]
                for order in ((arrays, other), (other, arrays)):
                    with pytest.raises(UsageError, match="overlap"):
                        _native.adam_step(*map(list, zip(*order, strict=True)), [1, 1], 0.1, 0.9, 0.99, 1e-8, 0.0, True)
    for p, g, buf in ((whole[:50], whole[49:99], None), (whole[:50], whole[50:100], whole[99:149]),
                      (whole[:50], whole[50:100], whole[1:51])):  # fmt: skip
        with pytest.raises(UsageError, match="overlap"):
            _native.sgd_step([p], [g], None if buf is None else [buf], 0.1, 0.0 if buf is None else 0.9, 0.0, False)
    with pytest.raises(UsageError, match="overlap"):  # one parameter twice
        _native.sgd_step([whole[:9], whole[:9]], [other[0], other[1]], None, 0.1, 0.0, 0.0, False)
    np.testing.assert_array_equal(whole, 1.0)
    _native.sgd_step([whole[:50]], [whole[50:100]], [whole[100:150]], 0.1, 0.9, 0.0, False)  # neighbours are apart
    _native.sgd_step([whole[:50], whole[100:150]], [whole[50:100]] * 2, None, 0.1, 0.0, 0.0, False)  # read twice


def test_sizes_that_overflow_are_memory_errors() -> None:
    one = np.ones((1, 1), np.float32)
    tall, wide = np.broadcast_to(one, (1 << 50, 1)), np.broadcast_to(one, (1, 1 << 50))
    for call in (
        lambda: _native.binary("add", tall, wide),
        lambda: _native.matmul(tall, wide),
        lambda: _native.copy(tall),
        lambda: _native.binary("add", empty_of(0, 1 << 59, 1), np.broadcast_to(one, (1, 1 << 59))),
        lambda: _native.matmul(np.broadcast_to(one, (1 << 60, 1, 1, 1))[:, :, :0],
                               np.broadcast_to(one, (1, 1 << 60, 1, 1))),
        lambda: _native.embedding_backward(one, np.zeros(1, np.int64), 1 << 62),
    ):  # fmt: skip
        with pytest.raises(MemoryError, match=r"does not fit|no memory"):
            call()


def test_shapes_without_elements() -> None:
    none = empty_of(3, 0)
    assert _native.softmax(none).shape == (3, 0)
    assert _native.rms_norm(none, empty_of(0), 1e-5)[0].shape == (3, 0)
    assert _native.rms_norm_backward(empty_of(0, 3), empty_of(0, 3), floats(1, 3), empty_of(0))[1].tolist() == [0] * 3
    assert _native.matmul(none, empty_of(0, 2)).tolist() == [[0, 0]] * 3
    assert _native.matmul(empty_of(1 << 20, 0, 1), floats(1, 1, 2)).shape == (1 << 20, 0, 2)
    assert _native.sum(none, (0,)).shape == (0,)
    assert _native.sum(none, (1,)).tolist() == [0] * 3
    assert _native.embedding(none, np.array([2, 0])).shape == (2, 0)
    assert _native.cross_entropy(none, np.full(3, -100))[0].tolist() == [0] * 3
    for name in ENCODINGS:
        assert _native.dequantize(name, np.empty(0, np.uint8)).shape == (0,)
    positions = 1 << 40  # of no heads: they must not be walked
    table = np.broadcast_to(np.float32(1), (1, 2))
    assert _native.rope(empty_of(positions, 1, 0, 4), table, table, False).shape == (positions, 1, 0, 4)


def test_attention_of_no_heads_is_refused() -> None:
    kv = empty_of(1, 2, 1, 4)
    with pytest.raises(ShapeError):
        _native.attention(empty_of(1, 2, 0, 4), kv, kv, 1.0)
    with pytest.raises(ShapeError):
        _native.attention_backward(*2 * [empty_of(1, 2, 0, 4)], kv, kv, empty_of(1, 2, 0, 4), empty_of(1, 0, 2), 1.0)


@pytest.mark.parametrize("start", [-1, 3, 1 << 32, -(1 << 32)])
def test_starts_beyond_the_query_are_refused(start: int) -> None:
    q = floats(5, 1, 3, 1, 4)
    with pytest.raises(UsageError, match="starts"):
        _native.attention(q, q, q, 1.0, starts=np.array([[0, 0, start]]))


def test_starts_are_integers() -> None:
    q = floats(5, 1, 1, 1, 4)
    for starts in (np.zeros((1, 1)), [[0]], np.zeros((1, 1), bool), "0"):
        with pytest.raises(DTypeError, match="starts"):
            _native.attention(q, q, q, 1.0, starts=starts)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", [2, -3, 1 << 70, -(1 << 70)])
def test_axes_out_of_range(axis: int) -> None:
    with pytest.raises(ShapeError, match="axis"):
        _native.sum(np.zeros((2, 2), np.float32), (axis,))


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_take_whole_blocks_of_bytes(name: str) -> None:
    for raw in (np.zeros(17, np.uint8), np.zeros((2, 72), np.uint8), np.zeros((), np.uint8)):
        with pytest.raises(ShapeError, match="whole"):
            _native.dequantize(name, raw)
    for raw in (np.zeros(144, np.int8), np.zeros(144, np.uint8).tolist(), np.zeros(144, object)):
        with pytest.raises(DTypeError, match=r"uint8|array"):
            _native.dequantize(name, raw)


def test_buffers_are_aligned_and_of_the_types_that_kernels_know() -> None:
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        x = _native.buffer([3, 5], dtype)
        assert (x.shape, x.dtype, x.flags.c_contiguous, x.flags.writeable) == ((3, 5), dtype, True, True)
        assert x.ctypes.data % 64 == 0
    with pytest.raises(DTypeError, match="buffer: dtype"):
        _native.buffer((3,), np.float64)


def test_joined_arrays_are_a_view_that_keeps_their_memory_and_is_not_written() -> None:
    whole = floats(1, 9, 4)
    expected = whole.copy()
    view = _native.joined([whole[:4], whole[4:5], whole[5:]])
    assert np.shares_memory(view, whole)
    assert not view.flags.writeable
    del whole
    np.testing.assert_array_equal(view, expected)
    x = floats(1, 6)
    np.testing.assert_array_equal(_native.joined([x[1:3], x[3:]]), x[1:])
    for apart in ([x[:2], x[3:]], [x, x], [x[:2], x[2:].copy()], [np.array(1.0), np.array(1.0)]):
        assert _native.joined(apart) is None
    with pytest.raises(DTypeError, match="NumPy array"):
        _native.joined([x, [1.0]])
