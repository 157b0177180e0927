"""Hugging Face's config.json <-> `ModelConfig`, for transformers 4's and 5's spellings.

A key that changes the arithmetic and that we don't serve is an error that names it; a key unknown to us is a warning.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from os import PathLike
from typing import Any

from entrenar.errors import ConfigError, FormatError, UnsupportedError
from entrenar.models.arch import ARCHITECTURES, architecture
from entrenar.models.spec import ModelConfig

_FIELDS = {f.name for f in fields(ModelConfig)} - {"rope_scaling", "rope_theta"}
_ROPE = {"rope_parameters", "rope_scaling", "rope_theta"}

_ATTENTION = ("full_attention", "sliding_attention")  # kinds of layer that are served

# keys that do not change what the decoder computes at inference and in our training
_HARMLESS = frozenset(
    {
        "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path",
        "pretraining_tp", "attention_dropout", "_attn_implementation", "auto_map", "unsloth_version", "id2label",
        "label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict", "torchscript",
        "chunk_size_feed_forward", "is_encoder_decoder", "tokenizer_class", "prefix", "unk_token_id", "layer_types",
        "sep_token_id", "decoder_start_token_id", "finetuning_task", "task_specific_params", "is_decoder",
        "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder", "pruned_heads", "max_length",
    }
)  # fmt: skip
# key -> the only values that mean "nothing to do"; any other changes the arithmetic
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "use_mrope": (None, False),
    "no_rope_layers": (None,),
}


def config_from_hf(raw: object, path: str | PathLike[str]) -> ModelConfig:
    """Reads the contents of a config.json; `path` is for the messages.

    Raises:
        FormatError: not an object, a size is missing or of the wrong type.
        UnsupportedError: a key asks for arithmetic that is not served.
    """
    if not isinstance(raw, dict):
        raise FormatError(path, "", "config.json is not a JSON object")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedError(
            path, "model_type", f"{model_type!r} is not served (served: {', '.join(ARCHITECTURES)})"
        )
    arch = architecture(model_type)
    for key, neutral in _NEUTRAL.items():
        if key in raw and raw[key] not in neutral:
            raise UnsupportedError(path, key, f"{raw[key]!r} changes the arithmetic in a way that is not served")
    layers = raw.get("layer_types") or ["full_attention"]
    if not isinstance(layers, list) or layers.count(layers[0]) < len(layers) or layers[0] not in _ATTENTION:
        raise UnsupportedError(path, "layer_types", "only one kind of attention in all layers is served")
    known = _FIELDS | _ROPE | _HARMLESS | set(_NEUTRAL) | arch.extra_keys
    for key in sorted(set(raw) - known):
        warnings.warn(f"{path}: unknown key {key!r} is ignored", stacklevel=2)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if key not in raw:
            raise FormatError(path, key, "is missing")
    values = {k: raw[k] for k in _FIELDS & set(raw) if raw[k] is not None}
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    try:
        values |= _rope(raw) | arch.read_extra(raw)
        return ModelConfig(**values)
    except ConfigError as error:
        kind = UnsupportedError if "not served" in error.reason else FormatError
        raise kind(path, error.field, error.reason) from error
    except TypeError as error:
        raise FormatError(path, "", f"a value has the wrong type: {error}") from error


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and scaling, from ``rope_parameters`` (transformers 5) or the two keys of transformers 4."""
    new = raw.get("rope_parameters")
    scaling = new if new is not None else raw.get("rope_scaling")
    values: dict[str, Any] = {}
    if scaling is not None and not isinstance(scaling, dict):
        raise ConfigError("rope_parameters" if new is not None else "rope_scaling", "is not an object")
    scaling = dict(scaling or {})
    theta = scaling.pop("rope_theta", raw.get("rope_theta"))
    if theta is not None:
        values["rope_theta"] = theta
    if "partial_rotary_factor" in scaling:
        values["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    kind = scaling.get("rope_type", scaling.get("type"))
    values["rope_scaling"] = None if kind in (None, "default") else scaling
    return values


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model whose weights are saved as `dtype` (``float32``, ``float16``, ``bfloat16``)."""
    raw: dict[str, Any] = {"architectures": [architecture(config.model_type).hf_class]}
    for field in fields(ModelConfig):
        value = getattr(config, field.name)
        if field.name not in ("rope_theta", "rope_scaling", "partial_rotary_factor"):
            raw[field.name] = list(value) if isinstance(value, tuple) else value
    rope = dict(config.rope_scaling or {"rope_type": "default"})
    raw["rope_theta"] = config.rope_theta
    raw["rope_scaling"] = dict(config.rope_scaling) if config.rope_scaling else None
    raw["rope_parameters"] = rope | {"rope_theta": config.rope_theta}
    if config.partial_rotary_factor != 1.0:
        raw["partial_rotary_factor"] = config.partial_rotary_factor
        raw["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    if config.model_type == "qwen2":
        raw["use_sliding_window"] = config.sliding_window is not None
        raw["max_window_layers"] = 0 if config.sliding_window else config.num_hidden_layers
    raw["torch_dtype"] = dtype
    return raw
