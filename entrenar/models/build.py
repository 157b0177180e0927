"""Builds a decoder from a spec: the one place where strategies are chosen and where every weight's shape is stated."""

from __future__ import annotations

from collections.abc import Callable

from entrenar.models.decoder import Decoder, DecoderLayer
from entrenar.models.spec import ModelSpec
from entrenar.nn.attention import Attention, FusedAttention, Sizes, SplitAttention
from entrenar.nn.layers import Embedding, Linear, RMSNorm
from entrenar.nn.mlp import FusedGatedMlp, GatedMlp
from entrenar.tensor import Tensor

Take = Callable[[str, tuple[int, ...]], Tensor]


def build(spec: ModelSpec, take: Take) -> tuple[Decoder, Linear]:
    """The decoder and its head. `take(name, shape)` gives each weight, under its Hugging Face name, in file order.

    A tied head shares the embedding's weight and is not taken.
    """
    config = spec.config
    hidden = config.hidden_size

    def norm(name: str) -> RMSNorm:
        return RMSNorm(take(f"{name}.weight", (hidden,)), config.rms_norm_eps)

    def linear(name: str, out: int, in_: int, bias: bool) -> Linear:
        weight = take(f"{name}.weight", (out, in_))
        return Linear(weight, take(f"{name}.bias", (out,)) if bias else None)

    def attention(path: str) -> Attention:
        sizes = Sizes(config.num_attention_heads, config.kv_heads, config.head_size, spec.window)
        q_size, kv_size = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        if spec.fused_qkv:
            qkv = linear(f"{path}.qkv_proj", q_size + 2 * kv_size, hidden, spec.qkv_bias)
            return FusedAttention(sizes, qkv, linear(f"{path}.o_proj", hidden, q_size, spec.o_bias))
        return SplitAttention(
            sizes,
            linear(f"{path}.q_proj", q_size, hidden, spec.qkv_bias),
            linear(f"{path}.k_proj", kv_size, hidden, spec.qkv_bias),
            linear(f"{path}.v_proj", kv_size, hidden, spec.qkv_bias),
            linear(f"{path}.o_proj", hidden, q_size, spec.o_bias),
        )

    def mlp(path: str) -> GatedMlp | FusedGatedMlp:
        size = config.intermediate_size
        if spec.fused_gate_up:
            gate_up = linear(f"{path}.gate_up_proj", 2 * size, hidden, spec.mlp_bias)
            return FusedGatedMlp(gate_up, linear(f"{path}.down_proj", hidden, size, spec.mlp_bias))
        return GatedMlp(
            linear(f"{path}.gate_proj", size, hidden, spec.mlp_bias),
            linear(f"{path}.up_proj", size, hidden, spec.mlp_bias),
            linear(f"{path}.down_proj", hidden, size, spec.mlp_bias),
        )

    embedding = take("model.embed_tokens.weight", (config.vocab_size, hidden))
    layers = []
    for i in range(config.num_hidden_layers):
        path = f"model.layers.{i}"
        layers.append(
            DecoderLayer(
                norm(f"{path}.input_layernorm"),
                attention(f"{path}.self_attn"),
                norm(f"{path}.post_attention_layernorm"),
                mlp(f"{path}.mlp"),
            )
        )
    decoder = Decoder(Embedding(embedding), layers, norm("model.norm"), spec.rope)
    if config.tie_word_embeddings:
        return decoder, Linear(embedding)
    return decoder, linear("lm_head", config.vocab_size, hidden, bias=False)


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that `build` takes, in its order."""
    shapes: dict[str, tuple[int, ...]] = {}
    nothing = Tensor([0.0])

    def record(name: str, shape: tuple[int, ...]) -> Tensor:
        shapes[name] = shape
        return nothing

    build(spec, record)
    return shapes
