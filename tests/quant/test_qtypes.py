"""The table of storage types against ggml's own, and the values of the types that entrenar computes with."""

from __future__ import annotations

import ctypes
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support import need_oracle

from entrenar import backend
from entrenar.errors import DTypeError, ShapeError
from entrenar.quant import QTYPES, by_id

UNSERVED = {"q8_1", "q8_k", "i8", "i16", "i32", "i64", "f64", "nvfp4", "q1_0", "q2_0"}
READ_ONLY = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0", "tq2_0", "mxfp4"}


def test_served_types() -> None:
    assert {row.name for row in QTYPES.values() if not row.served} == UNSERVED
    assert {row.name for row in QTYPES.values() if row.decodes and not row.encodes} == READ_ONLY


def test_the_table_in_c_is_the_same() -> None:
    quantized = {row.name: (row.block, row.bytes, row.encodes) for row in QTYPES.values() if row.decodes}
    assert backend.cpu.codecs() == quantized


def test_ids_find_their_rows() -> None:
    numbered = [row for row in QTYPES.values() if row.ggml_id is not None]
    assert all(by_id(row.ggml_id) is row for row in numbered)
    assert len({row.ggml_id for row in numbered}) == len(numbered) == len(QTYPES) - 4
    assert by_id(4) is None
    assert by_id(2**32 - 1) is None


def test_sizes() -> None:
    assert QTYPES["q4_k"].nbytes(512) == 288
    with pytest.raises(ShapeError, match="q4_k: 500 elements do not fill blocks of 256"):
        QTYPES["q4_k"].nbytes(500)


@pytest.mark.parametrize(("name", "dtype"), [("f32", np.float32), ("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_plain_numbers(name: str, dtype: type) -> None:
    values = np.array([1.5, -2.0, 0.0, np.inf], dtype)
    assert QTYPES[name].dequantize(values.view(np.uint8)).tolist() == [1.5, -2.0, 0.0, np.inf]


def test_raw_bytes_are_checked() -> None:
    with pytest.raises(DTypeError, match="raw bytes are a 1-D uint8 array, not 1-D int8"):
        QTYPES["q8_0"].dequantize(np.zeros(34, np.int8))
    with pytest.raises(ShapeError, match="q8_0: 33 bytes are not whole blocks of 34"):
        QTYPES["q8_0"].dequantize(np.zeros(33, np.uint8))
    with pytest.raises(DTypeError, match="type q8_1 can't be decoded; served are: f32, f16"):
        QTYPES["q8_1"].dequantize(np.zeros(36, np.uint8))


@pytest.mark.oracle
def test_the_table_is_ggmls() -> None:
    xllamacpp = need_oracle("xllamacpp")
    library = ctypes.CDLL(str(next(Path(xllamacpp.__path__[0]).glob("*.so"))))
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    for number in range(max(row.ggml_id or 0 for row in QTYPES.values()) + 1):
        row = by_id(number)
        if row is None:
            assert library.ggml_type_size(number) == 0
            continue
        assert library.ggml_type_name(number).decode().lower() == row.name
        assert library.ggml_blck_size(number) == row.block
        assert library.ggml_type_size(number) == row.bytes
