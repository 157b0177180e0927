"""Optimizers, learning-rate schedules and gradient clipping."""

from entrenar.optim import schedule
from entrenar.optim.adam import Adam, AdamW, AdamW8bit
from entrenar.optim.clip import clip_grad_norm, clip_scale, grad_norm
from entrenar.optim.optimizer import Optimizer
from entrenar.optim.sgd import SGD

__all__ = [
    "SGD", "Adam", "AdamW", "AdamW8bit", "Optimizer", "clip_grad_norm", "clip_scale", "grad_norm", "schedule",
]  # fmt: skip
