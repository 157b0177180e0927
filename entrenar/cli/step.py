"""What ``bench step`` and ``plan`` share: the settings of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from entrenar import backend
from entrenar.cli.adapter import AdapterSettings
from entrenar.cli.model import STREAM
from entrenar.cli.output import note
from entrenar.cli.settings import option
from entrenar.cli.shape import Shape
from entrenar.errors import UsageError
from entrenar.models.dtype import DTypeName
from entrenar.models.spec import ModelConfig
from entrenar.nn.lora import LoraConfig
from entrenar.train.config import TrainConfig
from entrenar.train.setup import resolved

LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class StepSettings(Shape, AdapterSettings):
    """A model, what of it is trained, and on how many tokens a step."""

    model: str | None = option(None, "a GGUF file or a Hugging Face directory, instead of a preset or sizes")
    full: bool = option(False, "train all weights, not an adapter")
    batch_size: int = option(2, "sequences a micro-batch")
    gradient_accumulation_steps: int = option(1, "micro-batches a step")
    seq_len: int = option(512, "tokens a sequence, at most the model's context")
    dtype: Literal["auto", "f32", "f16", "bf16", "mixed"] = option(
        "auto", "type of the weights; auto: as they are, a preset under an adapter in bf16 where that is fast"
    )
    stream: bool = option(False, STREAM)
    quant: str | None = option(None, "type to quantize the linear layers to, such as nf4 or q4_0")
    memory_budget: str | None = option(None, "memory that a step may take, such as 2GB; layers are recomputed for it")
    gradient_checkpointing: bool = option(False, "recompute all layers in the backward pass")
    optimizer: Literal["adamw", "adamw_8bit", "adam", "sgd"] = option("adamw", "optimizer, as for training")

    def __post_init__(self) -> None:
        shaped = self.preset is not None or bool(self.sizes())
        if shaped == (self.model is not None):
            raise UsageError("give either --preset or --model, or sizes")
        if self.stream and self.model is None:
            raise UsageError("--stream: it takes a GGUF file, given as --model")
        if self.quant is not None and self.full:
            raise UsageError("--quant: quantized weights are frozen; --full trains all of them")
        self._training()  # what can't be is an error before anything is built
        self.adapter()

    def training(self, config: ModelConfig) -> TrainConfig:
        """The settings that training has as well, for a model: a sequence longer than its context is lowered, as a run
        does."""
        return resolved(self._training(), config, self.adapter())

    def say_lowered(self, training: TrainConfig) -> None:
        if training.seq_len < self.seq_len:
            note(f"seq_len {self.seq_len} is lowered to the model's context, {training.seq_len} tokens")

    def _training(self) -> TrainConfig:
        names = ("batch_size", "gradient_accumulation_steps", "seq_len", "optimizer", "memory_budget",
                 "gradient_checkpointing")  # fmt: skip
        return TrainConfig(learning_rate=LEARNING_RATE, **{name: getattr(self, name) for name in names})

    def adapter(self) -> LoraConfig | None:
        """None where all weights are trained."""
        return None if self.full else self.lora_config()

    def made_as(self) -> DTypeName:
        """The type of a model that is made, not loaded."""
        if self.dtype == "auto" and not self.full and self.quant is None and backend.cpu.fast_bf16():
            return "bf16"
        return self.dtype
