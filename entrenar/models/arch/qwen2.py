"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, not permuted in GGUF."""

from __future__ import annotations

from typing import Any

from entrenar.errors import ConfigError
from entrenar.models.arch.base import Architecture
from entrenar.models.arch.rope import rope_spec
from entrenar.models.spec import ModelConfig, ModelSpec


def spec(config: ModelConfig) -> ModelSpec:
    return ModelSpec(config=config, rope=rope_spec(config), qkv_bias=True, window=config.sliding_window or 0)


def read_extra(raw: dict[str, Any]) -> dict[str, Any]:
    """``use_sliding_window: false`` voids ``sliding_window``; a window on some layers only is not served."""
    layers = raw.get("num_hidden_layers", 0)
    first = raw.get("max_window_layers", layers)  # layers before this one see everything
    if not raw.get("use_sliding_window") or raw.get("sliding_window") is None or first >= layers:
        return {"sliding_window": None}
    if first > 0:
        raise ConfigError("max_window_layers", f"{first}: a window on part of the layers is not served")
    return {}


ARCH = Architecture(
    model_type="qwen2",
    gguf_name="qwen2",
    hf_class="Qwen2ForCausalLM",
    spec=spec,
    extra_keys=frozenset({"use_sliding_window", "max_window_layers"}),
    read_extra=read_extra,
)
