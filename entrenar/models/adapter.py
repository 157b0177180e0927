"""LoRA adapters as files, in PEFT's directory format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import AdapterError, ConfigError, FormatError
from entrenar.formats import files, safetensors
from entrenar.nn.layers import Linear
from entrenar.nn.lora import LoraConfig, LowRank
from entrenar.tensor import Tensor

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM

_PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# key -> the values that mean "plain LoRA"; any other needs something that is not served
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    # others change the base's weights as well, and PEFT does that again when it loads
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
}


def save_adapter(model: CausalLM, factors: dict[str, LowRank], path: str | PathLike[str]) -> None:
    """Writes the two files; `factors` by the path of their linear layer."""
    directory = Path(path)
    if directory.suffix == ".gguf":
        raise ConfigError("path", f"{path}: adapters are written as a directory in PEFT's format, not as GGUF")
    assert model.adapter is not None
    config = model.adapter
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": _targets(config, factors),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors: dict[str, NDArray[Any]] = {}
    for name, factor in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = factor.a.data
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = factor.b.data
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write(directory / WEIGHTS, tensors)
    files.write_json(directory / CONFIG, raw)


def _targets(config: LoraConfig, factors: dict[str, LowRank]) -> str | list[str]:
    """PEFT's own form: a pattern stays, everything else becomes the sorted names of the layers reached."""
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        return config.target_modules
    if isinstance(config.target_modules, tuple):
        return sorted(config.target_modules)
    return sorted({name.rpartition(".")[2] for name in factors})


def load_adapter(model: CausalLM, path: str | PathLike[str], trainable: bool) -> tuple[LoraConfig, dict[str, LowRank]]:
    """Reads the two files against the model's layers; nothing is attached yet."""
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise FormatError(path, "", "is no directory; an adapter is one in PEFT's format")
    config = read_config(directory / CONFIG)
    linears = dict(model.linears())
    stored = safetensors.read(directory / WEIGHTS)
    where = directory / WEIGHTS
    halves: dict[str, dict[str, NDArray[Any]]] = {}
    for key in stored:
        if _is_own_weight(key, stored, linears):
            continue
        name, _, kind = key.removeprefix(_PREFIX).rpartition(".lora_")
        if not key.startswith(_PREFIX) or kind not in ("A.weight", "B.weight"):
            raise AdapterError(f"{where}: {key}: not a LoRA factor of a linear layer; this kind is not served")
        if name not in linears:
            raise AdapterError(f"{where}: {key}: the model has no linear layer {name!r}")
        halves.setdefault(name, {})[kind[0]] = stored[key]
    if not halves:
        raise AdapterError(f"{where}: holds no adapter weights")
    factors: dict[str, LowRank] = {}
    for name, pair in halves.items():
        out, in_ = linears[name].weight.shape
        rank = config.rank_of(name)
        for half, expected in (("A", (rank, in_)), ("B", (out, rank))):
            if half not in pair:
                raise FormatError(where, f"{_PREFIX}{name}.lora_{half}.weight", "is missing")
            if pair[half].shape != expected:
                raise AdapterError(
                    f"{where}: {name}.lora_{half}: shape {pair[half].shape}, where the model and rank {rank} "
                    f"need {expected}"
                )
        a, b = (Tensor(np.array(pair[h], np.float32), requires_grad=trainable) for h in "AB")
        factors[name] = LowRank(a, b, config.scale_of(name), config.lora_dropout)
    return config, factors


def _is_own_weight(key: str, stored: Mapping[str, NDArray[Any]], linears: Mapping[str, Linear]) -> bool:
    """Whether it is a copy of the model's own weight, which PEFT adds where the head has an adapter."""
    name = key.removeprefix(_PREFIX).removesuffix(".base_layer.weight")
    if name not in linears or key != f"{_PREFIX}{name}.base_layer.weight":
        return False
    own = linears[name].weight.data
    return np.array_equal(stored[key].astype(np.float32), own.astype(np.float32))


def read_config(path: Path) -> LoraConfig:
    """An adapter_config.json as a `LoraConfig`.

    Raises:
        FormatError: missing, not JSON or with an impossible value; AdapterError: a kind of adapter not served.
    """
    raw = files.read_json(path)
    for key, plain in _PLAIN.items():
        if key in raw and raw[key] not in plain:
            raise AdapterError(f"{path}: {key}: {raw[key]!r} is not served; only plain LoRA on linear layers is")
    if "peft_type" not in raw:
        raise FormatError(path, "peft_type", "is missing; this is no adapter")
    given = {f.name: raw[f.name] for f in fields(LoraConfig) if f.init and raw.get(f.name) is not None}
    try:
        return LoraConfig(**given)
    except ConfigError as error:
        raise FormatError(path, error.field, error.reason) from error
