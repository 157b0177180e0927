"""Products: of a training step, batched, of one row (decoding), and of weights that stay quantized."""

from __future__ import annotations

from functools import partial

import numpy as np
from kernel_stored import decoded
from kernel_task import HIDDEN, INNER, QKV, RANK, TOKENS, TYPES, Array, Table, Task, of_first, random, wide

from entrenar.backend import cpu

LINEARS = {"qkv": (HIDDEN, QKV), "o": (HIDDEN, HIDDEN), "gate_up": (HIDDEN, 2 * INNER), "down": (INNER, HIDDEN)}


def product(kind: str, m: int, k: int, n: int, way: str, stored: str = "") -> Task:
    """forward: x·Wᵀ, way back: g·W, weights: gᵀ·x, whose depth is the tokens. W (n, k), `stored` as that type."""
    x, w, g = random(kind, m, k), random(kind, n, k, scale=0.02, seed=1), random(kind, m, n, seed=2)
    if stored:
        raw = cpu.quantize(stored, w)
        w = cpu.Packed(stored, raw, (n, k))
    a, b = {"forward": (x, w.T), "input": (g, w), "weight": (g.T, x)}[way]
    out = np.empty((a.shape[0], b.shape[1]), np.float32 if way == "weight" else TYPES[kind])
    rows = slice(0, None, max(1, a.shape[0] // 16))

    def factor() -> Array:
        if not stored:
            return wide(b)
        values = decoded(stored, raw, n, k)
        return values.T if way == "forward" else values

    return Task(
        lambda: cpu.product([(a, b)], out),
        lambda: (out[rows],),
        lambda: (wide(a[rows]) @ factor(),),
        2.0 * m * n * k,
        a.nbytes + (w if stored else b).nbytes + out.nbytes,
    )


def batched(count: int, m: int, k: int, n: int) -> Task:
    a, b = random("f32", count, m, k), random("f32", count, k, n, seed=1)
    size = a.nbytes + b.nbytes + 4 * count * m * n
    return of_first(lambda: cpu.matmul(a, b), lambda: (wide(a) @ wide(b),), size, 2.0 * count * m * k * n)


def table() -> Table:
    rows: Table = {}
    for kind in ("f32", "bf16"):
        for name, (k, n) in LINEARS.items():
            for way in ("forward", "input"):
                rows[f"product-{name}-{way}-{kind}"] = kind, partial(product, kind, TOKENS, k, n, way)
            rows[f"decode-{name}-{kind}"] = kind, partial(product, kind, 1, k, n, "forward")
        rows[f"product-down-weight-{kind}"] = kind, partial(product, kind, TOKENS, INNER, HIDDEN, "weight")
        rows[f"product-lora-{kind}"] = kind, partial(product, kind, TOKENS, HIDDEN, RANK, "forward")
        for stored in ("nf4", "q4_k", "q8_0"):
            for way in ("forward", "input"):
                make = partial(product, kind, k=INNER, n=HIDDEN, way=way, stored=stored)
                rows[f"product-{stored}-{way}-{kind}"] = kind, partial(make, m=TOKENS)
                if way == "forward":
                    rows[f"decode-{stored}-{kind}"] = kind, partial(make, m=1)
    rows["matmul-batched-f32"] = "f32", partial(batched, 14, 512, 64, 512)
    return rows
