"""Elementwise operations, reductions and conversions, on arrays as wide as the inner layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import erf

import ml_dtypes
import numpy as np
from kernel_task import EXACT, INNER, TOKENS, TYPES, Array, Results, Table, Task, of_first, random, wide

from entrenar.backend import cpu

ROOT = np.sqrt(2 / np.pi)
UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "exp": np.exp,
    "log": np.log,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(ROOT * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}
BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "pow": np.power}
SUMS = {"rows": (0,), "columns": (1,), "all": (0, 1)}
SOME = slice(0, None, 64)  # rows that are compared, where the reference is slow


def unary(kind: str, name: str, back: bool) -> Task:
    """The reference of a derivative is a difference quotient, with a step too small to reach the kink of relu."""
    x, g = random(kind, TOKENS, INNER), random(kind, TOKENS, INNER, seed=1)
    x = (np.abs(x) + TYPES[kind](0.01)).astype(x.dtype) if name == "log" else x

    def want() -> Results:
        f, at = UNARY[name], wide(x[SOME])
        step = 1e-5 * np.minimum(np.abs(at), 1)
        return (wide(g[SOME]) * (f(at + step) - f(at - step)) / (2 * step) if back else f(at),)

    if back:
        return of_first(lambda: cpu.unary_backward(name, x, g), want, 3 * x.nbytes, results=lambda y: (y[SOME],))
    return of_first(lambda: cpu.unary(name, x), want, 2 * x.nbytes, results=lambda y: (y[SOME],))


def binary(kind: str, name: str) -> Task:
    a, b = random(kind, TOKENS, INNER), random(kind, TOKENS, INNER, seed=1)
    if name in ("div", "pow"):
        a, b = np.abs(a), np.clip(np.abs(b), 0.5, 4).astype(b.dtype)
    return of_first(lambda: cpu.binary(name, a, b), lambda: (BINARY[name](wide(a), wide(b)),), 3 * a.nbytes)


def in_place(kind: str, name: str) -> Task:
    x, y = random(kind, TOKENS, INNER), random(kind, TOKENS, INNER, seed=1)
    before = wide(x)
    if name == "add_":
        return of_first(lambda: cpu.add_(x, y), lambda: (before + wide(y),), 3 * x.nbytes,
                        results=lambda _: (x.copy(),))  # fmt: skip
    return of_first(lambda: cpu.scale_(x, -1.0), lambda: (-before,), 2 * x.nbytes, results=lambda _: (x.copy(),))


def transposed(kind: str) -> Task:
    x = random(kind, INNER, TOKENS).T
    return of_first(lambda: cpu.copy(x), lambda: (wide(x),), 2 * x.nbytes, bounds=(0,))


def total(kind: str, axes: tuple[int, ...]) -> Task:
    x = random(kind, TOKENS, INNER)
    return of_first(lambda: cpu.sum(x, axes), lambda: (wide(x).sum(axes),), x.nbytes, bounds=(EXACT["f32"],))


def all_finite() -> Task:
    x, bad = random("f32", TOKENS, INNER), random("f32", TOKENS, INNER)
    bad[-1, -1] = np.nan
    return of_first(lambda: cpu.all_finite(x), lambda: (np.array([1, 0]),), x.nbytes,
                    results=lambda fine: (np.array([fine, cpu.all_finite(bad)]),), bounds=(0,))  # fmt: skip


def convert(source: str, target: str) -> Task:
    types = {**TYPES, "f16": np.float16}
    x = random("f32", TOKENS, INNER).astype(types[source])
    return of_first(lambda: cpu.convert(x, types[target]), lambda: (wide(x),),
                    x.nbytes + x.size * np.dtype(types[target]).itemsize,
                    bounds=(float(ml_dtypes.finfo(types[target]).eps) / 2,))  # fmt: skip


def table() -> Table:
    rows: Table = {}
    for kind in ("f32", "bf16"):
        for name in UNARY:
            rows[f"{name}-{kind}"] = kind, partial(unary, kind, name, False)
            rows[f"{name}-backward-{kind}"] = kind, partial(unary, kind, name, True)
        rows |= {f"{name}-{kind}": (kind, partial(binary, kind, name)) for name in BINARY}
        rows |= {f"{name}-{kind}": (kind, partial(in_place, kind, name)) for name in ("add_", "scale_")}
        rows |= {f"sum-{name}-{kind}": (kind, partial(total, kind, axes)) for name, axes in SUMS.items()}
        rows[f"copy-transposed-{kind}"] = kind, partial(transposed, kind)
    rows["all_finite-f32"] = "f32", all_finite
    for source, target in (("f32", "bf16"), ("bf16", "f32"), ("f32", "f16"), ("f16", "f32")):
        rows[f"convert-{source}-{target}"] = "f32", partial(convert, source, target)
    return rows
