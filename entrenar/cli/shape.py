"""A model's shape as flags: a preset, or sizes, or a preset with other sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from entrenar.cli.settings import option
from entrenar.errors import ConfigError
from entrenar.models.spec import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model's shape, under Hugging Face's names; what is None comes from the preset."""

    preset: str | None = option(None, "a known shape, such as llama-124m or qwen2.5-0.5b")
    vocab_size: int | None = option(None, "entries of the embedding; by default what the tokenizer has")
    hidden_size: int | None = option(None, "width of the residual stream")
    intermediate_size: int | None = option(None, "width inside an MLP; by default 8/3 of hidden_size")
    num_hidden_layers: int | None = option(None, "layers")
    num_attention_heads: int | None = option(None, "query heads")
    num_key_value_heads: int | None = option(None, "key and value heads; by default as many as query heads")
    head_dim: int | None = option(None, "elements a head; by default hidden_size / heads")
    max_position_embeddings: int | None = option(None, "longest text; by default seq_len, or the preset's")
    rope_theta: float | None = option(None, "base of the rotary frequencies")
    initializer_range: float | None = option(None, "standard deviation of the random weights")
    rms_norm_eps: float | None = option(None, "added under the root of RMSNorm")
    tie_word_embeddings: bool | None = option(None, "the head is the embedding")
    sliding_window: int | None = option(None, "attention looks back this far; by default to the beginning")

    def model_config(self, seq_len: int, known: Mapping[str, Any] | None = None) -> ModelConfig:
        """The config; `known` says what the tokenizer does.

        Raises:
            ConfigError: a needed size is missing, or one is impossible.
        """
        values = self.sizes() | dict(known or {})
        if self.preset is not None:
            return ModelConfig.preset(self.preset).replace(**values)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            if name not in values:
                raise ConfigError(name, "is needed where no --preset is given")
        values.setdefault("intermediate_size", -(-8 * values["hidden_size"] // 3 // 32) * 32)
        values.setdefault("max_position_embeddings", seq_len)
        return ModelConfig(**values)

    def sizes(self) -> dict[str, Any]:
        """The fields that are given, but for the preset."""
        given = {f.name: getattr(self, f.name) for f in fields(Shape) if f.name != "preset"}
        return {name: value for name, value in given.items() if value is not None}
