"""Training: its settings, the loop, evaluation."""

from entrenar.train.config import TrainConfig
from entrenar.train.data import TrainingData, prepare
from entrenar.train.evaluate import Evaluation, evaluate
from entrenar.train.loop import Trainer, TrainResult

__all__ = ["Evaluation", "TrainConfig", "TrainResult", "Trainer", "TrainingData", "evaluate", "prepare"]
