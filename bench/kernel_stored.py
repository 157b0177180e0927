"""Quantized storage: writing and reading it. `decoded` reads it with NumPy."""

from __future__ import annotations

from functools import partial

import numpy as np
from kernel_task import HIDDEN, INNER, TYPES, Array, Table, Task, of_first, random, wide

from entrenar.backend import cpu

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
CELL = {"nf4": 0.16, "q4_k": 0.06, "q8_0": 0.0045}  # half of the widest gap between two codes, by the largest value


def decoded(name: str, raw: Array, rows: int, width: int) -> Array:
    """The matrix that `raw` stores."""
    values = nf4(raw, rows * width) if name == "nf4" else {"q4_k": q4_k, "q8_0": q8_0}[name](raw)
    return values.reshape(rows, width)


def q8_0(raw: Array) -> Array:
    blocks = raw.reshape(-1, 34)
    return wide(blocks[:, :2].copy().view(np.float16)) * blocks[:, 2:].view(np.int8)


def q4_k(raw: Array) -> Array:
    blocks = raw.reshape(-1, 144)
    d, least = wide(blocks[:, :4].copy().view(np.float16)).T[:, :, None, None]
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, high & 15 | low >> 6 << 4], 1)[:, :, None]
    mins = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], 1)[:, :, None]
    codes = blocks[:, 16:].reshape(-1, 4, 1, 32) >> np.array([0, 4], np.uint8)[:, None] & 15
    return np.asarray(d * scales * codes.reshape(-1, 8, 32) - least * mins)


def nf4(raw: Array, n: int) -> Array:
    """With its scales quantized too: codes of 8 bits by a dynamic map, blocks of 256 with a scale each, an offset."""
    scales, nested, offset, _ = cpu.flat_parts("nf4", n)
    tens = [10.0 ** (i - 6) * (ends[1:] + ends[:-1]) / 2 for i in range(7) for ends in [np.linspace(0.1, 1, 2**i + 1)]]
    positive = np.concatenate(tens)
    levels = np.sort(np.concatenate([-positive, [0.0], positive, [1.0]]))
    blocks = n // 64
    inner = np.repeat(wide(raw[nested:offset].view(np.float32)), 256)[:blocks]
    absmax = levels[raw[scales : scales + blocks]] * inner + wide(raw[offset : offset + 4].view(np.float32))
    codes = np.stack([raw[: n // 2] >> 4, raw[: n // 2] & 15], -1).reshape(blocks, 64)
    return np.asarray(np.array(NF4)[codes] * absmax[:, None])


def quantize(name: str) -> Task:
    """Its values are a cell or less from what was stored."""
    x = random("f32", HIDDEN, INNER)
    return of_first(lambda: cpu.quantize(name, x), lambda: (wide(x),), x.nbytes + cpu.packed_bytes(name, x.size),
                    results=lambda raw: (decoded(name, raw, HIDDEN, INNER),), bounds=(CELL[name],))  # fmt: skip


def dequantize(name: str, kind: str) -> Task:
    raw = cpu.quantize(name, random("f32", HIDDEN, INNER))
    size = raw.nbytes + HIDDEN * INNER * np.dtype(TYPES[kind]).itemsize

    def run() -> Array:
        if name == "nf4":
            return cpu.packed_rows(name, raw, HIDDEN, INNER, dtype=TYPES[kind])
        return cpu.dequantize(name, raw, TYPES[kind]).reshape(HIDDEN, INNER)

    return of_first(run, lambda: (decoded(name, raw, HIDDEN, INNER),), size)


def packed_rows(name: str, kind: str) -> Task:
    """Rows of a table by their ids."""
    raw, ids = cpu.quantize(name, random("f32", HIDDEN, INNER)), np.random.default_rng(1).integers(0, HIDDEN, 512)
    size = 512 * INNER * (np.dtype(TYPES[kind]).itemsize + raw.nbytes / (HIDDEN * INNER))
    return of_first(lambda: cpu.packed_rows(name, raw, HIDDEN, INNER, ids, TYPES[kind]),
                    lambda: (decoded(name, raw, HIDDEN, INNER)[ids],), size)  # fmt: skip


def table() -> Table:
    rows: Table = {}
    for name in CELL:
        rows[f"quantize-{name}"] = "f32", partial(quantize, name)
        for kind in TYPES:
            rows[f"dequantize-{name}-{kind}"] = kind, partial(dequantize, name, kind)
            rows[f"packed_rows-{name}-{kind}"] = kind, partial(packed_rows, name, kind)
    return rows
