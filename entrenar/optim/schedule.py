"""Learning-rate schedules: pure functions from the step (0 for the first) to the rate.

All warm up alike: for step s < w (`warmup_steps`) the rate is lr · s / w, so the very first step of a warm-up has
rate 0, as in transformers. `constant`, `linear` and `cosine` equal its ``get_{constant,linear,cosine}_schedule_
with_warmup``; after `total_steps` they stay at their last value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

from entrenar.errors import ConfigError
from entrenar.optim.optimizer import number

Schedule = Callable[[int], float]


def constant(lr: float, warmup_steps: int = 0) -> Schedule:
    """lr."""
    return _warmed(lr, warmup_steps, lambda s: 1.0)


def linear(lr: float, total_steps: int, warmup_steps: int = 0) -> Schedule:
    """lr · (T - s) / (T - w), 0 from step T = `total_steps` on."""
    span = _span(total_steps, warmup_steps)
    return _warmed(lr, warmup_steps, lambda s: max(0.0, (total_steps - s) / span))


def cosine(lr: float, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0) -> Schedule:
    """lr · (r + (1 - r) · (1 + cos(π · (s - w) / (T - w))) / 2), with r = `min_ratio`; lr · r from step T on."""
    span = _span(total_steps, warmup_steps)
    low = _ratio("min_ratio", min_ratio)

    def ratio(s: int) -> float:
        progress = min(1.0, (s - warmup_steps) / span)
        return low + (1.0 - low) * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    return _warmed(lr, warmup_steps, ratio)


def step(lr: float, step_size: int, gamma: float = 0.1, warmup_steps: int = 0) -> Schedule:
    """lr · gamma^⌊(s - w) / step_size⌋, with gamma in [0, 1]."""
    _count("step_size", step_size, 1)
    _ratio("gamma", gamma)
    return _warmed(lr, warmup_steps, lambda s: gamma ** ((s - warmup_steps) // step_size))


def exponential(lr: float, gamma: float, warmup_steps: int = 0) -> Schedule:
    """lr · gamma^(s - w), with gamma in [0, 1]."""
    _ratio("gamma", gamma)
    return _warmed(lr, warmup_steps, lambda s: gamma ** (s - warmup_steps))


def _warmed(lr: float, warmup_steps: int, ratio: Schedule) -> Schedule:
    number("lr", lr)
    _count("warmup_steps", warmup_steps, 0)

    @wraps(ratio)
    def rate(s: int) -> float:
        if s < 0:
            raise ConfigError("step", f"{s} is negative")
        return lr * (s / warmup_steps if s < warmup_steps else ratio(s))

    return rate


def _span(total_steps: int, warmup_steps: int) -> int:
    """T - w, at least 1: a run that is all warm-up has no decay to divide by."""
    _count("total_steps", total_steps, 1)
    return max(1, total_steps - _count("warmup_steps", warmup_steps, 0))


def _ratio(field: str, value: float) -> float:
    """A number in [0, 1]."""
    return number(field, value, below=math.nextafter(1.0, 2.0))


def _count(field: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(field, f"{value!r} is not a whole number of at least {least}")
    return value
