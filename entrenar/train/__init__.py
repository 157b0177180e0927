"""Training: its settings, the loop, evaluation."""

from entrenar.train.config import TrainConfig

__all__ = ["TrainConfig"]
