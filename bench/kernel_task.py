"""What a benchmark of a kernel is: the call, its results beside those of float64, and its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

TOKENS, HIDDEN, INNER, QKV, HEADS, KV, HEAD, VOCAB, RANK = 1024, 896, 4864, 1152, 14, 2, 64, 151936, 16
EXACT = {"f32": 2e-6, "bf16": 1.2e-2}  # largest error by largest value: f32 sums, and a rounding of the result to bf16
TYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}

Array = np.ndarray[Any, Any]
Results = Sequence[Array]


class Task(NamedTuple):
    """A kernel ready to run. bounds: of each result's error, where they aren't those of the arithmetic's type."""

    call: Callable[[], object]
    got: Callable[[], Results]
    want: Callable[[], Results]
    flops: float
    nbytes: float
    bounds: Sequence[float] = ()


Table = dict[str, tuple[str, Callable[[], Task]]]  # name -> (type of its arithmetic, maker)


def of_first(
    run: Callable[[], Any],
    want: Callable[[], Results],
    nbytes: float,
    flops: float = 0,
    results: Callable[[Any], Results] = lambda made: made if isinstance(made, tuple) else (made,),
    bounds: Sequence[float] = (),
) -> Task:
    """A task that compares what its first call gave; `results` makes it of what the call returned."""
    kept: list[Results] = []

    def call() -> None:
        made = run()
        if not kept:
            kept.append(results(made))

    return Task(call, lambda: kept[0], want, flops, nbytes, bounds)


def random(kind: str, *shape: int, scale: float = 1.0, seed: int = 0) -> Array:
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (x * np.float32(scale)).astype(TYPES[kind])


def wide(x: Array) -> Array:
    return np.asarray(x).astype(np.float64)


def philox(seed: int, counters: Array) -> Array:
    """(len(counters), 4) words of Philox4x32-10, as integers of 64 bits."""
    low = np.uint64(0xFFFFFFFF)
    c = counters.astype(np.uint64)
    word = [c & low, c >> np.uint64(32), np.zeros_like(c), np.zeros_like(c)]
    for turn in range(10):
        key0, key1 = ((part + turn * step) & 0xFFFFFFFF for part, step in
                      ((seed & 0xFFFFFFFF, 0x9E3779B9), (seed >> 32, 0xBB67AE85)))  # fmt: skip
        a, b = word[0] * np.uint64(0xD2511F53), word[2] * np.uint64(0xCD9E8D57)
        word = [b >> np.uint64(32) ^ word[1] ^ np.uint64(key0), b & low,
                a >> np.uint64(32) ^ word[3] ^ np.uint64(key1), a & low]  # fmt: skip
    return np.stack(word, -1)
