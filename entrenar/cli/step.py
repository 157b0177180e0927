"""What ``bench step`` and ``plan`` share: the settings of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from entrenar import backend
from entrenar.cli.adapter import targets
from entrenar.cli.model import STREAM
from entrenar.cli.settings import option
from entrenar.cli.shape import Shape
from entrenar.errors import ConfigError, UsageError
from entrenar.models.dtype import DTypeName
from entrenar.models.spec import ModelConfig
from entrenar.nn.lora import LoraConfig
from entrenar.train.config import TrainConfig

LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class StepSettings(Shape):
    """A model, what of it is trained, and on how many tokens a step."""

    model: str | None = option(None, "a GGUF file or a Hugging Face directory, instead of a preset or sizes")
    full: bool = option(False, "train all weights, not an adapter")
    rank: int = option(16, "rank of the adapter")
    target: tuple[str, ...] = option(("all-linear",), "layers with an adapter: all-linear, names, or a pattern")
    batch_size: int = option(2, "sequences a step")
    seq_len: int = option(512, "tokens a sequence")
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
        for name, least in (("batch_size", 1), ("seq_len", 2)):
            if getattr(self, name) < least:
                raise ConfigError(name, f"{getattr(self, name)} must be at least {least}")
        self.training()  # a budget that is no size is an error before anything is built
        self.adapter()

    def training(self) -> TrainConfig:
        """The settings that training has as well."""
        return TrainConfig(
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            optimizer=self.optimizer,
            learning_rate=LEARNING_RATE,
            memory_budget=self.memory_budget,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    def adapter(self) -> LoraConfig | None:
        """None where all weights are trained."""
        if self.full:
            return None
        return LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=targets(self.target))

    def made_as(self) -> DTypeName:
        """The type of a model that is made, not loaded."""
        if self.dtype == "auto" and not self.full and self.quant is None and backend.cpu.fast_bf16():
            return "bf16"
        return self.dtype

    def check_context(self, config: ModelConfig) -> None:
        """
        Raises:
            ConfigError: a sequence is longer than the model's context.
        """
        context = config.max_position_embeddings
        if self.seq_len > context:
            raise ConfigError("seq_len", f"{self.seq_len} is beyond the model's context of {context}")
