"""Phi-3: Llama with q, k, v fused in one projection and gate, up in another, as its adapters expect."""

from __future__ import annotations

from entrenar.models.arch.base import Architecture
from entrenar.models.arch.rope import rope_spec
from entrenar.models.spec import ModelConfig, ModelSpec


def spec(config: ModelConfig) -> ModelSpec:
    return ModelSpec(
        config=config,
        rope=rope_spec(config, partial=True),
        fused_qkv=True,
        fused_gate_up=True,
        window=config.sliding_window or 0,
    )


ARCH = Architecture(
    model_type="phi3",
    gguf_name="phi3",
    hf_class="Phi3ForCausalLM",
    spec=spec,
    gguf_window=True,
    extra_keys=frozenset({"original_max_position_embeddings", "embd_pdrop", "resid_pdrop"}),
)
