"""Llama 1, 2 and 3: RMSNorm, rotary embeddings, SwiGLU, grouped-query attention; optional biases."""

from __future__ import annotations

from entrenar.models.arch.base import Architecture
from entrenar.models.arch.rope import rope_spec
from entrenar.models.spec import ModelConfig, ModelSpec


def spec(config: ModelConfig) -> ModelSpec:
    return ModelSpec(
        config=config,
        rope=rope_spec(config),
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        window=config.sliding_window or 0,
    )


ARCH = Architecture(model_type="llama", gguf_name="llama", hf_class="LlamaForCausalLM", spec=spec, permuted=True)
