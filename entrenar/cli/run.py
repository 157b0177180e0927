"""What ``train`` and ``finetune`` share: the settings of a run, and the way from settings to a finished run."""

from __future__ import annotations

import math
import signal
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from entrenar.cli.output import note, print_json
from entrenar.cli.settings import Meaning, option, required, to_toml
from entrenar.formats.files import atomic_file
from entrenar.models.causal_lm import CausalLM, count_parameters
from entrenar.observe.events import subscribed
from entrenar.observe.sinks import display
from entrenar.train import TrainConfig, Trainer, TrainResult
from entrenar.train.config import ALIASES, OPTIMIZER_ALIASES
from entrenar.train.data import sources
from entrenar.train.setup import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class RunSettings(TrainConfig, ABC):
    """The settings of `TrainConfig`, with data and a directory. A subclass builds the model and saves the result."""

    ALIASES: ClassVar = ALIASES  # other programs' names, good as flags and in files too
    MEANINGS: ClassVar = {
        "optimizer": Meaning("optimizer", {**{name: name for name in OPTIMIZERS}, **OPTIMIZER_ALIASES})
    }

    data: tuple[str, ...] = required("files (plain text, JSONL, JSON), or a directory with train and valid files")
    out: str = required("directory of the run")
    json: bool = option(False, "print the result as one JSON object")

    def __post_init__(self) -> None:
        self.train_config()  # a bad value is an error before anything is loaded

    @abstractmethod
    def build(self) -> CausalLM:
        """The model with what is to be trained in place."""

    @abstractmethod
    def save(self, model: CausalLM, out: Path) -> Path:
        """Saves what was trained into the run's directory and says where."""

    def train_config(self) -> TrainConfig:
        return TrainConfig(**{f.name: getattr(self, f.name) for f in fields(TrainConfig)})

    def data_paths(self) -> str | tuple[str, ...]:
        """One path as such, since only a single directory has splits."""
        return self.data[0] if len(self.data) == 1 else self.data

    def run(self) -> int:
        sources(self.data_paths(), self.valid_fraction)  # a bad line is said before a large model is loaded
        model = self.build()
        total, trained = count_parameters(model, trainable_only=False), count_parameters(model)
        note(f"{total:,} parameters, {trained:,} of them trained")
        trainer = Trainer(model, self.data_paths(), self.train_config())
        out = Path(self.out)
        out.mkdir(parents=True, exist_ok=True)
        with atomic_file(out / "settings.toml") as file:
            file.write(to_toml(self).encode())
        with display() as sink, subscribed(sink):
            result = trainer.fit()
        saved = None if result.stopped_by is not None else self.save(model, out)
        if self.json:
            print_json(report(result, saved))
        elif saved is not None:
            tell(result, saved)
        if result.stopped_by is None:
            return 0
        note(f"stopped by {result.stopped_by} after step {result.steps}; the same command with --resume goes on")
        return 128 + signal.Signals[result.stopped_by].value


def report(result: TrainResult, saved: Path | None) -> dict[str, object]:
    """As plain JSON; a run that was stopped has saved nothing but its checkpoint."""
    return {
        "steps": result.steps,
        "train_loss": result.train_loss,
        "eval_loss": result.eval_loss,
        "skipped": result.skipped,
        "out": str(result.out),
        "saved": None if saved is None else str(saved),
        "stopped_by": result.stopped_by,
    }


def tell(result: TrainResult, saved: Path) -> None:
    evaluated = "" if result.eval_loss is None else f", validation loss {result.eval_loss:.4f} nats a token"
    trained = "" if math.isnan(result.train_loss) else f", training loss {result.train_loss:.4f}"
    print(f"{result.steps:,} steps{trained}{evaluated}")
    print(f"saved in {saved}; curve and metrics are in {result.out}")
