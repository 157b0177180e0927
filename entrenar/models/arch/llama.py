"""Llama 1, 2 and 3: RMSNorm, rotary embeddings, SwiGLU, grouped-query attention; optional biases."""

from __future__ import annotations

from typing import Any

from entrenar.errors import ConfigError
from entrenar.models.arch.base import Architecture
from entrenar.models.arch.rope import rope_spec
from entrenar.models.spec import ModelConfig, ModelSpec


def spec(config: ModelConfig) -> ModelSpec:
    if config.sliding_window is not None:
        raise ConfigError("sliding_window", "Llama has no attention window; Mistral has")
    return split_spec(config)


def split_spec(config: ModelConfig) -> ModelSpec:
    """Separate projections, with the window and the biases that the config says."""
    return ModelSpec(
        config=config,
        rope=rope_spec(config),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        window=config.sliding_window or 0,
    )


def read_extra(raw: dict[str, Any]) -> dict[str, Any]:
    """A window in a Llama's config.json has no effect in transformers; some conversions carry one along."""
    return {"sliding_window": None}


ARCH = Architecture(
    model_type="llama",
    gguf_name="llama",
    hf_class="LlamaForCausalLM",
    spec=spec,
    read_extra=read_extra,
    permuted=True,
)
