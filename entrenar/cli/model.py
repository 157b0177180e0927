"""What the commands that work with a model share: loading it, and how the next token is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from entrenar.cli.output import note, noted_warnings
from entrenar.cli.settings import option, required
from entrenar.errors import UsageError
from entrenar.generate import SamplingConfig
from entrenar.models.causal_lm import CausalLM
from entrenar.models.load import load
from entrenar.models.quantization import recorded
from entrenar.models.source import open_model
from entrenar.tokenizer import Tokenizer

STREAM = "layers' quantized weights stay in the GGUF file and are read when their turn comes"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model, with which adapter."""

    model: str = required("a GGUF file or a Hugging Face directory")
    adapter: str | None = option(None, "an adapter for it: a directory in PEFT's format, or a GGUF file")
    dtype: Literal["auto", "f32", "f16", "bf16"] = option("auto", "type of the matrices; auto keeps it")
    quant: str = option(
        "auto", "quantize the layers while loading: nf4, q4_0 …; none: as stored; auto: as the adapter was trained"
    )
    stream: bool = option(False, STREAM)

    def load(self) -> CausalLM:
        """The model with its adapter attached."""
        with noted_warnings():
            quant = loading_quant("--quant", self.quant, self.model, self.adapter)
            model = load(self.model, quant=quant, dtype=self.dtype, stream=self.stream)
            if self.adapter is not None:
                model.load_adapter(self.adapter)
        return model


def loading_quant(flag: str, choice: str, model: str, adapter: str | None) -> str | None:
    """What a model is quantized to while it is loaded, as the user chose by the flag: "none", a type, or "auto", which
    means as it was when its adapter was trained, and is said."""
    if choice.lower() != "auto":
        return None if choice.lower() == "none" else choice
    base = None if adapter is None else recorded(adapter)
    if base is None or base.quant is None or open_model(model).quantized:
        return None
    why = f"as it was when the adapter was trained; {flag} none leaves it as it is"
    note(f"{model} is quantized to {base.quant} while it is loaded, {why}")
    return base.quant


def tokenizer_of(model: CausalLM, path: str) -> Tokenizer:
    """The model's tokenizer; a model without one can't read words."""
    if model.tokenizer is None:
        raise UsageError(f"{path} has no tokenizer (tokenizer.json), so it can't read or write text")
    return model.tokenizer


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How text is continued."""

    max_new_tokens: int = option(256, "stop after this many tokens")
    temperature: float = option(SamplingConfig.temperature, "0: the likeliest token; 1: the model's own odds")
    top_k: int = option(SamplingConfig.top_k, "choose among the k likeliest tokens; 0: all")
    top_p: float = option(SamplingConfig.top_p, "choose among the likeliest that add up to this")
    min_p: float = option(SamplingConfig.min_p, "drop those below this share of the likeliest")
    repetition_penalty: float = option(SamplingConfig.repetition_penalty, "above 1: avoid tokens seen")
    seed: int | None = option(SamplingConfig.seed, "of the random choice; by default a new one each time")
    stop: tuple[str, ...] = option((), "end the text before any of these strings")

    def sampling(self) -> dict[str, Any]:
        """The keyword arguments of `CausalLM.generate`."""
        names = (*SamplingConfig.__dataclass_fields__, "max_new_tokens", "stop")
        return {name: getattr(self, name) for name in names}
