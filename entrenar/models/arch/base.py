"""What every architecture says of itself, and the table of weight names with their transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from entrenar.models.spec import ModelConfig, ModelSpec

Array = NDArray[Any]


@dataclass(frozen=True)
class Transform:
    """How a weight's layout differs between Hugging Face and GGUF; the two functions are inverses."""

    to_gguf: Callable[[Array], Array]
    from_gguf: Callable[[Array], Array]


SAME = Transform(lambda w: w, lambda w: w)


def permute_heads(heads: int) -> Transform:
    """GGUF's row order of llama's q and k, rows (heads·head_dim, …): pairs of a rotation lie side by side there.

    Hugging Face rotates element i with i + head_dim/2, llama.cpp's llama rotates 2i with 2i + 1.
    """

    def to_gguf(w: Array) -> Array:
        return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    def from_gguf(w: Array) -> Array:
        return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    return Transform(to_gguf, from_gguf)


@dataclass(frozen=True)
class WeightName:
    """One weight under both its names, for a layer already filled in."""

    hf: str
    gguf: str
    transform: Transform = SAME


# Hugging Face module -> GGUF name; {i} is the layer. Biases share the module's name.
MODEL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Architecture:
    """One row of the table of architectures.

    Attributes:
        model_type: Hugging Face's name; gguf_name: GGUF's ``general.architecture``; hf_class: ``architectures[0]``.
        spec: config -> spec, raising ConfigError for a value that the architecture can't take.
        extra_keys: config.json keys, beyond those every architecture has, that `read_extra` serves.
        read_extra: the architecture's own part of reading a config.json (returns ModelConfig fields).
        permuted: whether GGUF stores q and k permuted (llama.cpp's adjacent-pair rotation).
        gguf_window: whether GGUF's architecture knows a sliding window; llama.cpp ignores the key elsewhere.
    """

    model_type: str
    gguf_name: str
    hf_class: str
    spec: Callable[[ModelConfig], ModelSpec]
    extra_keys: frozenset[str] = frozenset()
    read_extra: Callable[[dict[str, Any]], dict[str, Any]] = lambda raw: {}
    permuted: bool = False
    gguf_window: bool = False

    def weight_names(self, config: ModelConfig) -> Iterator[WeightName]:
        """Both names and the transform of every weight the config has, in file order."""
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.kv_heads} if self.permuted else {}
        for name in config.parameter_shapes():
            module, _, kind = name.rpartition(".")  # kind: weight or bias
            if module in MODEL_NAMES:
                yield WeightName(name, f"{MODEL_NAMES[module]}.{kind}")
                continue
            layer, part = module.removeprefix("model.layers.").split(".", 1)
            n = heads.get(part.rpartition(".")[2])
            transform = permute_heads(n) if n else SAME
            yield WeightName(name, f"blk.{layer}.{LAYER_NAMES[part]}.{kind}", transform)
