"""``entrenar finetune``: LoRA on a model of your own, which may be quantized (QLoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from entrenar.cli.adapter import AdapterSettings
from entrenar.cli.model import STREAM
from entrenar.cli.run import RunSettings
from entrenar.cli.settings import option, required
from entrenar.models.causal_lm import CausalLM
from entrenar.models.load import load


@dataclass(frozen=True, kw_only=True)
class Command(RunSettings, AdapterSettings):
    """Teach a model with a low-rank adapter (LoRA); its own weights stay as they are.

    A GGUF file's quantized weights are trained on as they are; --quant quantizes those of a 16-bit model (QLoRA).
    The run's directory gets checkpoints, metrics.jsonl, a loss curve and, in adapter/, the adapter in PEFT's format.
    """

    ALIASES: ClassVar = {**RunSettings.ALIASES, **AdapterSettings.ALIASES}
    MEANINGS: ClassVar = {**RunSettings.MEANINGS, **AdapterSettings.MEANINGS}

    model: str = required("a GGUF file or a Hugging Face directory")
    dtype: Literal["auto", "f32", "f16", "bf16", "mixed"] = option(
        "auto", "f32: weights and arithmetic; bf16 and f16: weights; auto: weights as stored, bf16 where that is fast"
    )
    stream: bool = option(False, STREAM)
    quant: str | None = option(None, "quantize the linear layers while loading: nf4, fp4, q4_0, q4_k_m and so on")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lora_config()

    def build(self) -> CausalLM:
        model = load(self.model, quant=self.quant, dtype=self.dtype, stream=self.stream)
        return model.add_lora(self.lora_config(), seed=self.seed)

    def save(self, model: CausalLM, out: Path) -> Path:
        model.save_adapter(out / "adapter")
        return out / "adapter"
