"""Rows of a table by id, and the table's gradient."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from kernels.checks import BF16, FLOWS, TAILS, assert_close, floats, wide
from kernels.guard import guarded

from entrenar import _native
from entrenar.errors import DataError, DTypeError, ShapeError, UsageError


@pytest.mark.tier1
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_by_id(isa: str, dtype: type) -> None:
    for d in [*TAILS, 1025]:
        weight = guarded(floats(d, 11, d).astype(dtype))
        ids = np.random.default_rng(d).integers(0, 11, (3, 4))
        np.testing.assert_array_equal(_native.embedding(weight, ids), weight.astype(np.float32)[ids])
        narrow = _native.embedding(weight, ids, BF16)
        assert narrow.dtype == BF16
        np.testing.assert_array_equal(narrow, weight.astype(np.float32).astype(BF16)[ids])
    assert _native.embedding(weight, np.zeros((2, 0), np.int64)).shape == (2, 0, d)
    assert _native.embedding(weight, np.array(3)).shape == (d,)
    strided = np.asarray(weight.T[::2].T)
    np.testing.assert_array_equal(_native.embedding(strided, ids), strided.astype(np.float32)[ids])


@pytest.mark.tier1
@pytest.mark.parametrize("dtype", FLOWS)
def test_gradients_of_equal_ids_add_up(isa: str, dtype: type) -> None:
    for d in TAILS:
        ids = np.random.default_rng(d).integers(0, 5, (2, 9))
        g = guarded(floats(d, 2, 9, d).astype(dtype))
        want = np.zeros((7, d))
        np.add.at(want, ids, wide(g))
        got = _native.embedding_backward(g, ids, 7)
        assert_close(got, want, rel=2e-7)
        assert not got[5:].any()
        held = guarded(floats(d + 100, 7, d))
        before = held.copy()
        assert _native.embedding_backward(g, ids, 7, held) is held
        np.testing.assert_array_equal(held, before + got)
    assert not _native.embedding_backward(np.zeros((0, 4), dtype), np.zeros(0, np.int64), 3).any()


def test_a_common_id_keeps_its_digits(isa: str) -> None:
    n = 20000
    got = _native.embedding_backward(np.full((n, 3), 0.1, np.float32), np.zeros(n, np.int64), 1)
    assert (got == np.float32(n * np.float64(np.float32(0.1)))).all()


def test_results_do_not_depend_on_threads(isa: str, same_on_any_threads) -> None:
    ids = np.random.default_rng(1).integers(0, 40, 999)
    weight, g = floats(1, 40, 513), floats(2, 999, 513)
    same_on_any_threads(lambda: _native.embedding(weight, ids))
    same_on_any_threads(lambda: _native.embedding_backward(g, ids, 40))


def test_an_id_out_of_range_is_named_with_its_position() -> None:
    weight = np.zeros((10, 4), np.float32)
    for bad in (10, -1, 2**62):
        ids = np.int64([[1, 2], [bad, bad]])
        with pytest.raises(
            DataError, match=rf"embedding: token id {bad} at position 2 is outside the vocabulary of 10"
        ):
            _native.embedding(weight, ids)
        with pytest.raises(DataError, match=rf"embedding_backward: token id {bad} at position 2"):
            _native.embedding_backward(np.zeros((2, 2, 4), np.float32), ids, 10)
    with pytest.raises(DataError, match="vocabulary of 0"):
        _native.embedding(weight[:0], np.int64([0]))


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(DTypeError, match="ids must be an array of int64, not int32"):
        _native.embedding(np.zeros((3, 2), np.float32), np.zeros(2, np.int32))
    with pytest.raises(DTypeError, match="weight must be float32, float16 or bfloat16, not float64"):
        _native.embedding(np.zeros((3, 2)), np.zeros(2, np.int64))
    with pytest.raises(DTypeError, match="embedding: dtype must be float32 or bfloat16, not float16"):
        _native.embedding(np.zeros((3, 2), np.float32), np.zeros(2, np.int64), np.float16)
    with pytest.raises(ShapeError, match=r"weight must be \(V, D\), its shape is \(3,\)"):
        _native.embedding(np.zeros(3, np.float32), np.zeros(2, np.int64))
    with pytest.raises(ShapeError, match=r"g has shape \(2, 3, 4\), ids \(2,\)"):
        _native.embedding_backward(np.zeros((2, 3, 4), np.float32), np.zeros(2, np.int64), 3)
    g, ids, into = np.zeros((2, 4), np.float32), np.zeros(2, np.int64), np.zeros((3, 4), np.float32)
    with pytest.raises(ShapeError, match=r"into has shape \(3, 4\), the gradient \(5, 4\)"):
        _native.embedding_backward(g, ids, 5, into)
    with pytest.raises(ShapeError, match="into is written in place and must be C-contiguous"):
        _native.embedding_backward(g, ids, 3, np.zeros((4, 3), np.float32).T)
    with pytest.raises(UsageError, match="into overlaps g"):
        _native.embedding_backward(into[:2], ids, 3, into)
