"""A GGUF header <-> `ModelConfig`: the keys and defaults of the format's model section."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from entrenar.errors import ConfigError, FormatError, UnsupportedError
from entrenar.models.arch import GGUF_ARCHITECTURES, architecture
from entrenar.models.arch.rope import llama3_divisors
from entrenar.models.spec import ModelConfig

# ModelConfig field -> (key below "<arch>.", what an absent key means)
_REQUIRED = object()
_KEYS: dict[str, tuple[str, Any]] = {
    "hidden_size": ("embedding_length", _REQUIRED),
    "intermediate_size": ("feed_forward_length", _REQUIRED),
    "num_hidden_layers": ("block_count", _REQUIRED),
    "num_attention_heads": ("attention.head_count", _REQUIRED),
    "num_key_value_heads": ("attention.head_count_kv", None),
    "head_dim": ("attention.key_length", None),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", _REQUIRED),
    "max_position_embeddings": ("context_length", _REQUIRED),
    "rope_theta": ("rope.freq_base", 10000.0),
    "sliding_window": ("attention.sliding_window", None),
}
_NO_ID = 4294967295
_ORIGINAL = "rope.scaling.original_context_length"


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: str | PathLike[str]
) -> ModelConfig:
    """Reads a header. `shapes` maps the file's tensor names to NumPy-ordered shapes; `path` is for the messages.

    Llama 3's ``rope_freqs.weight`` is not seen here: the caller reads it (`arch.rope.llama3_scaling`).

    Raises:
        FormatError: a key is missing or impossible; UnsupportedError: the file asks for what is not served.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in GGUF_ARCHITECTURES:
        raise UnsupportedError(
            path, "general.architecture", f"{name!r} is not served (served: {', '.join(GGUF_ARCHITECTURES)})"
        )
    arch = GGUF_ARCHITECTURES[name]
    values: dict[str, Any] = {"model_type": arch.model_type}
    for field, (key, default) in _KEYS.items():
        value = metadata.get(f"{name}.{key}", default)
        if value is _REQUIRED:
            raise FormatError(path, f"{name}.{key}", "is missing")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise FormatError(path, f"{name}.{key}", f"{type(value).__name__} where one number was expected")
        values[field] = value
    if not values["sliding_window"] or not arch.gguf_window:
        values["sliding_window"] = None
    if metadata.get(f"{name}.expert_count", 0):
        raise UnsupportedError(path, f"{name}.expert_count", "a mixture of experts is not served")
    embed = shapes.get("token_embd.weight")
    if embed is None or len(embed) != 2:
        raise FormatError(path, "token_embd.weight", "the embedding matrix is missing or not of two dimensions")
    values["vocab_size"] = embed[0]
    values["tie_word_embeddings"] = "output.weight" not in shapes
    values["attention_bias"] = arch.model_type != "qwen2" and "blk.0.attn_q.bias" in shapes
    values["mlp_bias"] = "blk.0.ffn_down.bias" in shapes
    for field, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id", _NO_ID)
        values[field] = None if token == _NO_ID else token
    scaling = metadata.get(f"{name}.rope.scaling.type", "linear")
    if scaling not in ("linear", "none"):
        raise UnsupportedError(path, f"{name}.rope.scaling.type", f"{scaling!r:.80} is not served")
    factor = metadata.get(f"{name}.rope.scaling.factor", metadata.get(f"{name}.rope.scale_linear", 0))
    if scaling == "linear" and factor != 0:  # as in llama.cpp, by either key, and with or without the type
        values["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    try:
        config = ModelConfig(**values)
    except ConfigError as error:
        raise FormatError(path, _key_of(name, error.field), error.reason) from error
    rotary = metadata.get(f"{name}.rope.dimension_count", config.head_size)
    if rotary != config.head_size:
        where = f"{name}.rope.dimension_count"
        if not isinstance(rotary, int) or not 0 < rotary <= config.head_size:
            raise FormatError(path, where, f"{rotary!r} is not within a head")
        try:
            config = config.replace(partial_rotary_factor=rotary / config.head_size)
        except ConfigError as error:
            raise UnsupportedError(path, where, error.reason) from error
    if metadata.get(f"{name}.attention.value_length", config.head_size) != config.head_size:
        raise UnsupportedError(path, f"{name}.attention.value_length", "differs from the key length")
    return config


def original_context(metadata: Mapping[str, Any], path: str | PathLike[str]) -> int:
    """Tokens of context before Llama 3's scaling; files that other programs wrote are silent, and mean 8192."""
    key = f"{metadata['general.architecture']}.{_ORIGINAL}"
    value = metadata.get(key, 8192)
    if not isinstance(value, int) or value < 1:
        raise FormatError(path, key, f"{value!r:.80} is not a number of tokens")
    return value


def _key_of(arch: str, field: str) -> str:
    return f"{arch}.{_KEYS[field][0]}" if field in _KEYS else field


def gguf_metadata(config: ModelConfig) -> dict[str, Any]:
    """The header of a model file, tokenizer aside."""
    arch = architecture(config.model_type)
    if config.sliding_window and not arch.gguf_window:
        raise ConfigError(
            "sliding_window", f"GGUF's {arch.gguf_name} architecture has no attention window; set it to None first"
        )
    name = arch.gguf_name
    metadata: dict[str, Any] = {"general.architecture": name, f"{name}.vocab_size": config.vocab_size}
    for field, (key, _) in _KEYS.items():
        value = getattr(config, field)
        if value is not None:
            metadata[f"{name}.{key}"] = value
    metadata[f"{name}.attention.value_length"] = config.head_size
    metadata[f"{name}.rope.dimension_count"] = int(config.head_size * config.partial_rotary_factor)
    scaling = config.rope_scaling
    if scaling is not None and llama3_divisors(config) is not None:
        metadata[f"{name}.{_ORIGINAL}"] = int(scaling["original_max_position_embeddings"])
    elif scaling is not None:
        metadata[f"{name}.rope.scaling.type"] = "linear"
        metadata[f"{name}.rope.scaling.factor"] = float(scaling["factor"])
    return metadata
