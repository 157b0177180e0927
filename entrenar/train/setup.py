"""From settings to an optimizer and a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from entrenar.optim import SGD, Adam, AdamW, Optimizer, schedule
from entrenar.tensor import Tensor
from entrenar.train.config import TrainConfig

OPTIMIZERS: Mapping[str, Callable[[TrainConfig, Mapping[str, Tensor]], Optimizer]] = {
    "sgd": lambda c, p: SGD(p.items(), c.learning_rate, c.momentum, c.weight_decay),
    "adam": lambda c, p: Adam(p.items(), c.learning_rate, (c.adam_beta1, c.adam_beta2), c.adam_epsilon, c.weight_decay),
    "adamw": lambda c, p: AdamW(
        p.items(), c.learning_rate, (c.adam_beta1, c.adam_beta2), c.adam_epsilon, c.weight_decay
    ),
}

SCHEDULES: Mapping[str, Callable[[TrainConfig, int, int], schedule.Schedule]] = {
    "constant": lambda c, total, warmup: schedule.constant(c.learning_rate, warmup),
    "linear": lambda c, total, warmup: schedule.linear(c.learning_rate, total, warmup),
    "cosine": lambda c, total, warmup: schedule.cosine(c.learning_rate, total, warmup, c.lr_min_ratio),
    "step": lambda c, total, warmup: schedule.step(c.learning_rate, c.lr_step_size, c.lr_gamma, warmup),
    "exponential": lambda c, total, warmup: schedule.exponential(c.learning_rate, c.lr_gamma, warmup),
}


def make_optimizer(config: TrainConfig, parameters: Mapping[str, Tensor]) -> Optimizer:
    return OPTIMIZERS[config.optimizer](config, parameters)


def make_schedule(config: TrainConfig, total_steps: int) -> schedule.Schedule:
    """Warm-up: `warmup_steps`, or else `warmup_ratio` of all steps, rounded up as in transformers."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    return SCHEDULES[config.lr_scheduler](config, total_steps, warmup)
