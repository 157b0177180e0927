"""Tiny models of every served shape, with random weights large enough that mistakes show."""

from __future__ import annotations

import numpy as np

from entrenar import CausalLM, LoraConfig, ModelConfig, no_grad

CONFIGS = {
    "llama": ModelConfig(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    ),
    "llama-tied-wide-heads": ModelConfig(
        vocab_size=41, hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=2, head_dim=14,
        max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-6, rope_theta=500.0,
    ),
    "llama-biases": ModelConfig(
        vocab_size=33, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, attention_bias=True, mlp_bias=True,
    ),
    "mistral-window": ModelConfig(
        model_type="mistral", vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=64, sliding_window=5,
    ),
    "qwen2": ModelConfig(
        model_type="qwen2", vocab_size=39, hidden_size=28, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=7, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
        rope_theta=1e6, rms_norm_eps=1e-6,
    ),
    "phi3": ModelConfig(
        model_type="phi3", vocab_size=35, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, sliding_window=9,
    ),
}  # fmt: skip


IDS = np.arange(14).reshape(2, 7) % 29


def model(name: str = "llama", seed: int = 0, lora: LoraConfig | None = None, dtype: str = "f32") -> CausalLM:
    """A model whose every weight, biases, norms and LoRA B included, is random and of order one."""
    made = CausalLM.from_config(CONFIGS[name], seed=seed, dtype=dtype)
    rng = np.random.default_rng(seed + 1)
    for path, weight in made.named_weights():
        scale = 1 / np.sqrt(weight.shape[-1]) if weight.ndim == 2 else 0.3
        offset = 1.0 if "norm" in path else 0.0
        weight.data[...] = offset + scale * rng.standard_normal(weight.shape)
    if lora is not None:
        made.add_lora(lora)
        for path, weight in made.named_parameters():
            if ".lora_B." in path:
                weight.data[...] = 0.1 * rng.standard_normal(weight.shape)
    return made


def arrays(made: CausalLM) -> dict[str, np.ndarray]:
    """Every weight, adapters included, by name."""
    return {name: w.data for name, w in [*made.named_weights(), *made.named_parameters()]}


def plain(made: CausalLM) -> dict[str, object]:
    """The config as the float64 reference wants it."""
    c = made.config
    scale = made.adapter.scale_of("") if made.adapter else 0.0
    return {
        "layers": c.num_hidden_layers, "heads": c.num_attention_heads, "kv_heads": c.kv_heads,
        "head_dim": c.head_size, "eps": c.rms_norm_eps, "theta": c.rope_theta, "window": c.sliding_window,
        "lora_scale": scale,
    }  # fmt: skip


def logits(made: CausalLM) -> np.ndarray:
    """Of IDS."""
    with no_grad():
        return made(IDS).numpy().copy()


def close(a: np.ndarray, b: np.ndarray, within: float = 1e-5) -> bool:
    """Within so much of the largest."""
    return bool(np.abs(a - b).max() <= within * np.abs(b).max())


def randomize(made: CausalLM, seed: int) -> None:
    """Factors that change something, DoRA's magnitudes moved."""
    rng = np.random.default_rng(seed)
    for name, tensor in made.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            tensor.data[...] = 0.2 * rng.standard_normal(tensor.shape)
        if "magnitude" in name:
            tensor.data[...] *= 1 + 0.3 * rng.random(tensor.shape)
        tensor.version += 1
