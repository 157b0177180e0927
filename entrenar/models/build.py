"""Builds a decoder from a spec: the one place where strategies are chosen and where every weight's shape is stated."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from entrenar.models.decoder import Decoder, DecoderLayer
from entrenar.models.spec import ModelSpec
from entrenar.models.storage import Empty, Rows
from entrenar.nn.attention import Attention, Sizes
from entrenar.nn.layers import Embedding, Linear, RMSNorm
from entrenar.nn.mlp import GatedMlp
from entrenar.ops.parts import Weight
from entrenar.tensor import Tensor

Take = Callable[[str, tuple[int, ...], Empty], Weight]


def build(spec: ModelSpec, take: Take) -> tuple[Decoder, Linear]:
    """The decoder and its head.

    `take(name, shape, empty)` gives each weight, under its Hugging Face name, in file order; `empty` is the memory
    that it is to fill. A tied head shares the embedding's weight and is not taken.
    """
    config = spec.config
    hidden = config.hidden_size

    def alone(name: str, *shape: int) -> Weight:
        return take(name, shape, Rows(*shape).place(0, shape[0]))

    def vector(name: str, size: int, empty: Empty) -> Tensor:
        weight = take(name, (size,), empty)
        assert isinstance(weight, Tensor)  # vectors are never packed
        return weight

    def norm(name: str) -> RMSNorm:
        return RMSNorm(vector(f"{name}.weight", hidden, Rows(hidden).place(0, hidden)), config.rms_norm_eps)

    def linears(path: str, sizes: Mapping[str, int], in_: int, bias: bool) -> dict[str, Linear]:
        """Layers that read the same input, by name with their output sizes."""
        rows = sum(sizes.values())
        weights, biases = Rows(rows, in_), Rows(rows)
        made, begin = {}, 0
        for name, out in sizes.items():
            weight = take(f"{path}.{name}.weight", (out, in_), weights.place(begin, out))
            made[name] = Linear(
                weight, vector(f"{path}.{name}.bias", out, biases.place(begin, out)) if bias else None
            )
            begin += out
        return made

    def attention(path: str) -> Attention:
        sizes = Sizes(config.num_attention_heads, config.kv_heads, config.head_size, spec.window)
        q_size, kv_size = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        if spec.fused_qkv:
            qkv = {"qkv_proj": q_size + 2 * kv_size}
        else:
            qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        inputs = linears(path, qkv, hidden, spec.qkv_bias)
        return Attention(sizes, inputs, **linears(path, {"o_proj": hidden}, q_size, spec.o_bias))

    def mlp(path: str) -> GatedMlp:
        size = config.intermediate_size
        gate_up = {"gate_up_proj": 2 * size} if spec.fused_gate_up else {"gate_proj": size, "up_proj": size}
        inputs = linears(path, gate_up, hidden, spec.mlp_bias)
        return GatedMlp(inputs, **linears(path, {"down_proj": hidden}, size, spec.mlp_bias))

    embedding = alone("model.embed_tokens.weight", config.vocab_size, hidden)
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
    return decoder, Linear(alone("lm_head.weight", config.vocab_size, hidden))


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that `build` takes, in its order."""
    shapes: dict[str, tuple[int, ...]] = {}
    nothing = Tensor([0.0])

    def record(name: str, shape: tuple[int, ...], empty: Empty) -> Tensor:
        shapes[name] = shape
        return nothing

    build(spec, record)
    return shapes
