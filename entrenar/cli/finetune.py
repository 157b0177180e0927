"""``entrenar finetune``: LoRA on a model of your own, which may be quantized (QLoRA)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from entrenar.cli.model import STREAM
from entrenar.cli.run import RunSettings
from entrenar.cli.settings import option, required
from entrenar.errors import ConfigError
from entrenar.models.causal_lm import CausalLM
from entrenar.models.load import load
from entrenar.nn.lora import LoraConfig

FLAGS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target"}


@dataclass(frozen=True, kw_only=True)
class Command(RunSettings):
    """Teach a model with a low-rank adapter (LoRA); its own weights stay as they are.

    A GGUF file's quantized weights are trained on as they are; --quant quantizes those of a 16-bit model (QLoRA).
    The run's directory gets checkpoints, metrics.jsonl, a loss curve and, in adapter/, the adapter in PEFT's format.
    """

    model: str = required("a GGUF file or a Hugging Face directory")
    dtype: Literal["auto", "f32", "f16", "bf16", "mixed"] = option(
        "auto", "f32: weights and arithmetic; bf16 and f16: weights; auto: weights as stored, bf16 where that is fast"
    )
    stream: bool = option(False, STREAM)
    quant: str | None = option(None, "quantize the linear layers while loading: nf4, fp4, q4_0, q4_k_m and so on")
    rank: int = option(16, "rank of the adapter, 1 to 512")
    alpha: float = option(32.0, "the adapter counts alpha / rank")
    dropout: float = option(0.0, "chance that an element of the adapter's input is dropped while training")
    target: tuple[str, ...] = option(("all-linear",), "which layers: all-linear, names, or one regular expression")
    rslora: bool = option(False, "the adapter counts alpha / √rank instead")
    dora: bool = option(False, "DoRA: the length of each row of a weight is trained apart from its direction")
    modules_to_save: tuple[str, ...] = option((), "modules trained and saved whole: embed_tokens, lm_head, norm …")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora_config()

    def lora_config(self) -> LoraConfig:
        try:
            return LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=targets(self.target),
                use_rslora=self.rslora,
                use_dora=self.dora,
                modules_to_save=self.modules_to_save or None,
            )
        except ConfigError as error:
            raise ConfigError(FLAGS.get(error.field, error.field), error.reason) from None

    def build(self) -> CausalLM:
        model = load(self.model, quant=self.quant, dtype=self.dtype, stream=self.stream)
        return model.add_lora(self.lora_config(), seed=self.seed)

    def save(self, model: CausalLM, out: Path) -> Path:
        model.save_adapter(out / "adapter")
        return out / "adapter"


def targets(words: tuple[str, ...]) -> str | tuple[str, ...]:
    """A single word that is no plain name is a pattern or "all-linear"; anything else is a list of names."""
    return words[0] if len(words) == 1 and not re.fullmatch(r"[\w.]+", words[0]) else words
