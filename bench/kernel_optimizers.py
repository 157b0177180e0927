"""Optimizer steps and the gradient's norm, on 4 Mi elements: f32, moments of 8 bits, weights of bf16."""

from __future__ import annotations

from functools import partial

import numpy as np
from kernel_task import EXACT, Array, Results, Table, Task, of_first, random, wide

from entrenar.backend import cpu

COUNT, BLOCK = 1 << 22, 256
SEEDS = {"f32": None, "bf16": [(7, 11)]}  # of the rounding
LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.999, 1e-8, 0.1


def taken(after: Array, before: Array, step: Array) -> Array:
    """The share of the step that was taken: 1, however single weights round; less where small steps get lost."""
    return np.array([np.dot(wide(after) - before, step) / np.dot(step, step)])


def values(cells: int) -> Array:
    """The values of codes of 8 bits: 0, the middles of seven decades' cells, 1; csrc/kernels/adamw8.h."""
    edges = [np.linspace(10.0**i, 10.0 ** (i + 1), cells * 2 ** (i + 7) + 1) for i in range(-7, 0)]
    return np.concatenate([[0.0], *((e[1:] + e[:-1]) / 2 for e in edges), [1.0]])


V_VALUES, M_VALUES = values(2), np.concatenate([-values(1)[127:0:-1], values(1)])


def adamw(weights: str = "f32", eight: bool = False) -> Task:
    p, g, m, v = (random(weights if i == 0 else "f32", COUNT, seed=i) for i in range(4))
    v, scales = np.abs(v), [None, None]
    moments = m, v
    if eight:
        codes = np.random.default_rng(5).integers(0, 256, COUNT, np.uint8)
        moments = codes, np.maximum(codes[::-1], 100)
        scales = [np.abs(random("f32", COUNT // BLOCK, seed=i)) + np.float32(0.5) for i in (6, 7)]
    decoded = [lambda: wide(moments[0]), lambda: wide(moments[1])]
    if eight:
        decoded = [lambda: M_VALUES[moments[0]] * np.repeat(wide(scales[0]), BLOCK),
                   lambda: V_VALUES[moments[1]] * np.repeat(wide(scales[1]), BLOCK)]  # fmt: skip
    before, first, second = wide(p), decoded[0](), decoded[1]()
    first, second = BETA1 * first + (1 - BETA1) * wide(g), BETA2 * second + (1 - BETA2) * wide(g) ** 2
    step = -LR * (DECAY * before + first / (1 - BETA1**10) / (np.sqrt(second / (1 - BETA2**10)) + EPS))

    def run() -> None:
        cpu.adam_step([p], [g], [moments[0]], [moments[1]], [10], LR, BETA1, BETA2, EPS, DECAY, True,
                      m_absmax=[scales[0]], v_absmax=[scales[1]], random=SEEDS[weights])  # fmt: skip

    def results(_: None) -> Results:
        return p.copy(), decoded[0](), decoded[1](), taken(p, before, step)

    moment = 1.2e-2 if eight else EXACT["f32"]
    size = 2 * p.nbytes + g.nbytes + 2 * (moments[0].nbytes + moments[1].nbytes)
    return of_first(run, lambda: (before + step, first, second, np.ones(1)), size, results=results,
                    bounds=(EXACT[weights], moment, moment, 1e-2))  # fmt: skip


def sgd(weights: str) -> Task:
    p, g, buf = (random(weights if i == 0 else "f32", COUNT, seed=i) for i in range(3))
    before = wide(p)
    momentum = 0.9 * wide(buf) + wide(g) + DECAY * before

    def run() -> None:
        cpu.sgd_step([p], [g], [buf], LR / 10, 0.9, DECAY, False, random=SEEDS[weights])

    def results(_: None) -> Results:
        return p.copy(), buf.copy(), taken(p, before, -LR / 10 * momentum)

    return of_first(run, lambda: (before - LR / 10 * momentum, momentum, np.ones(1)),
                    2 * p.nbytes + g.nbytes + 2 * buf.nbytes, results=results,
                    bounds=(EXACT[weights], EXACT["f32"], 1e-2))  # fmt: skip


def square_sums() -> Task:
    arrays = [random("f32", COUNT // 4, seed=i) for i in range(4)]
    return of_first(lambda: cpu.square_sums(arrays), lambda: (np.array([(wide(a) ** 2).sum() for a in arrays]),),
                    4.0 * COUNT, results=lambda sums: (np.array(sums),), bounds=(1e-12,))  # fmt: skip


def table() -> Table:
    rows: Table = {"adamw-f32": ("f32", adamw), "square_sums-f32": ("f32", square_sums)}
    rows["adamw_8bit-f32"] = "f32", partial(adamw, eight=True)
    rows["adamw-stochastic"] = "f32", partial(adamw, "bf16")
    rows["adamw_8bit-stochastic"] = "f32", partial(adamw, "bf16", True)
    rows |= {"sgd-f32": ("f32", partial(sgd, "f32")), "sgd-stochastic": ("f32", partial(sgd, "bf16"))}
    return rows
