"""How long a step will take, roughly: its arithmetic at the rate of a product, and what it reads and writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from entrenar.backend import cpu
from entrenar.models.dtype import DTYPES, Compute
from entrenar.models.flops import ATTENTION, ATTENTION_FORWARD, FORWARD, attention_flops, matrices, useful_flops
from entrenar.train.layer import FLOAT
from entrenar.train.plan import Plan
from entrenar.train.work import Work

ATTENTION_SHARE = 0.5  # of a product's rate
PASSES = 5  # times that what layers keep is written or read besides the products, forward and backward
BETWEEN = 0.0006  # seconds a layer between kernels, forward and backward
ROWS, INNER, COLUMNS = 512, 1024, 1024  # of the product that is measured
COPIED = 8 << 20  # bytes
ROUNDS = 6


@dataclass(frozen=True)
class Rates:
    """What this machine does now, on all threads: FLOP/s of a product, bytes/s read and written."""

    product: float
    memory: float

    @classmethod
    def measured(cls, compute: Compute) -> Rates:
        """In about 20 ms and 25 MB; the best of a few rounds, because whatever disturbs one slows it down."""
        rng = np.random.default_rng(0)
        x = rng.standard_normal((ROWS, INNER), np.float32).astype(DTYPES[compute])
        w = rng.standard_normal((COLUMNS, INNER), np.float32).astype(DTYPES[compute])
        out = cpu.buffer((ROWS, COLUMNS), x.dtype)
        block = np.ones(COPIED // 4, np.float32)
        return cls(
            2.0 * ROWS * INNER * COLUMNS / _best(lambda: cpu.product([(x, w.T)], out)),
            2.0 * COPIED / _best(lambda: cpu.copy(block)),
        )


def _best(action: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls."""
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def step_seconds(work: Work, plan: Plan, rates: Rates) -> float:
    """Seconds of an optimizer step: forward, backward and what is computed again of each micro-batch, the update."""
    training, config = work.training, work.config
    pairs = training.batch_size * attention_flops(config, training.seq_len)  # of one product
    useful = useful_flops(config, work.trained, training.batch_size, training.seq_len)
    again = plan.recomputed / plan.layers
    in_layers = sum(work.elements[name] for name in matrices(config) if name.startswith("model.layers."))
    products = useful - ATTENTION * pairs + again * FORWARD * work.tokens * in_layers
    attention = (ATTENTION + again * ATTENTION_FORWARD) * pairs / ATTENTION_SHARE
    moved = (2 + again) * sum(work.weights.values()) + (PASSES + 2 * again) * plan.kept
    between = BETWEEN * plan.layers * (1 + again / 2)
    micro_batch = (products + attention) / rates.product + moved / rates.memory + between
    update = 2 * plan.peak.parts["optimizer"] + 4 * FLOAT * sum(work.trained.values())  # gradients' norm, weights
    return training.gradient_accumulation_steps * micro_batch + update / rates.memory
