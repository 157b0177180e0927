"""Optimizers, learning-rate schedules and gradient clipping."""

from entrenar.optim import schedule
from entrenar.optim.adam import Adam, AdamW
from entrenar.optim.clip import clip_grad_norm
from entrenar.optim.optimizer import Optimizer
from entrenar.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "clip_grad_norm", "schedule"]
