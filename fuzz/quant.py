"""Quantized arrays: any bytes as any type, rows of them, and any values encoded."""

from __future__ import annotations

from contextlib import suppress

import _common
import atheris
import ml_dtypes
import numpy as np

with atheris.instrument_imports(include=["entrenar"]):
    from entrenar.backend import set_num_threads
    from entrenar.errors import EntrenarError
    from entrenar.quant import QTYPES, QTensor, quantize

ROWS = list(QTYPES.values())
TYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
BLOCKS = (64, 32, 128, 256, 512, 1024, 2048, 4096, 48)


def one_input(data: bytes) -> None:
    if len(data) < 6:
        return
    kind, shape, block, dtype, threads, row = data[:6]
    body = np.frombuffer(data[6:], np.uint8)
    qtype, size, target = ROWS[kind % len(ROWS)], BLOCKS[block % len(BLOCKS)], TYPES[dtype % len(TYPES)]
    width = (1, 3, 32, 64, 255, 256, 512, 77)[shape % 8]
    set_num_threads(threads % 3 + 1)
    with suppress(EntrenarError):
        x = body[: body.size // (width * 4) * width * 4].view(np.float32).reshape(-1, width).astype(target)
        q = quantize(x, qtype.name, size)
        assert QTensor(qtype, q.shape, q.bytes, size).dense().shape == x.shape
    with suppress(EntrenarError):
        count = shape // 8
        exact = body[: qtype.nbytes(count * width, size)] if dtype < 128 else body  # the latter is mostly a lie
        q = QTensor(qtype, (count, width), exact, size)
        dense = q.dense(target)
        ids = np.array([row, 0, row // 3]) - 1
        assert np.array_equal(q.rows(ids, target), dense[ids], equal_nan=True)


def seeds() -> list[bytes]:
    """Each type's bytes and small values, once."""
    body = np.linspace(-1, 1, 512, dtype=np.float32).tobytes()
    return [bytes([kind, 21, 0, 0, 1, 1]) + body for kind in range(len(ROWS))]


if __name__ == "__main__":
    np.seterr(all="ignore")
    _common.run(one_input, seeds)
