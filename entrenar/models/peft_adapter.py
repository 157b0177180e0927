"""LoRA adapters in PEFT's directory format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import AdapterError, ConfigError, FormatError
from entrenar.formats import files, safetensors
from entrenar.models import quantization
from entrenar.models.adapter_values import floats
from entrenar.models.adapters import Adaptable, Adapted, Adapter
from entrenar.models.dtype import DTYPES
from entrenar.models.targets import held_whole
from entrenar.nn.layers import Embedding
from entrenar.nn.lora import LoraConfig
from entrenar.nn.low_rank import Factors, LowRank, LowRankTable
from entrenar.tensor import Tensor

_PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# module, and what of it; a magnitude had another suffix in PEFT's first version of DoRA
_KEY = re.compile(
    r"base_model\.model\.(?P<path>.+?)\."
    r"(?P<kind>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?|base_layer\.weight|weight|bias)"
)
# key -> the values that need nothing but what is served
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "layer_replication": (None, []),
    "layers_pattern": (None, "", [], "layers", ["layers"], "model.layers", ["model.layers"]),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "ensure_weight_tying": (False, None),
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


def save(model: Adapted, adapter: Adapter, directory: Path) -> None:
    """Writes the two files. Factors that count otherwise than the settings say get the difference folded into B."""
    config = adapter.config
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": _targets(model, adapter),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "bias": "none",
        "modules_to_save": None if config.modules_to_save is None else list(config.modules_to_save),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors: dict[str, NDArray[Any]] = {}
    for path, factors in adapter.factors.items():
        scale = config.scale_of(path)
        more = np.float32(1 if factors.scale == scale else factors.scale / scale)
        for kind, tensor in factors.named():
            values = tensor.data.T if kind == "lora_embedding_A" else tensor.data
            tensors[f"{_PREFIX}{path}.{kind}"] = np.ascontiguousarray(values * more if tensor is factors.b else values)
    tensors |= {_PREFIX + name: tensor.data for name, tensor in adapter.saved.items()}
    directory.mkdir(parents=True, exist_ok=True)
    quantization.write(directory, adapter.base)
    safetensors.write(directory / WEIGHTS, tensors)
    files.write_json(directory / CONFIG, raw)


def _targets(model: Adapted, adapter: Adapter) -> str | list[str]:
    """PEFT's own form: a pattern stays, else the names of the layers reached, in full where a name reaches others."""
    config, targets = adapter.config, adapter.config.target_modules
    if isinstance(targets, str) and targets != "all-linear" and not config.exclude_modules:
        return targets
    names = set(targets) if isinstance(targets, tuple) else {path.rpartition(".")[2] for path in adapter.factors}
    reached = LoraConfig(target_modules=sorted(names), modules_to_save=config.modules_to_save)
    if {path for path, _ in model.adaptable() if reached.selects(path)} != set(adapter.factors):
        names = set(adapter.factors)
    return sorted(names)


def load(model: Adapted, directory: Path, trainable: bool) -> Adapter:
    """Reads the two files against the model's layers; nothing is attached yet."""
    config = read_config(directory / CONFIG)
    where = directory / WEIGHTS
    stored = safetensors.read(where)
    layers = dict(model.adaptable())
    found: dict[str, dict[str, NDArray[Any]]] = {}  # path -> kind -> factor
    saved: dict[str, Tensor] = {}
    own = dict(model.named_weights()) | {f"{path}.weight": layer.weight for path, layer in layers.items()}
    for key in stored:
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"{where}: {key}: not a LoRA factor of a layer; this kind is not served")
        path, kind = match["path"], match["kind"].replace("vector.weight", "vector")
        if kind in ("weight", "bias", "base_layer.weight"):
            name = f"{path}.{kind.removeprefix('base_layer.')}"
            if name not in own:
                raise AdapterError(f"{where}: {key}: the model has no weight {name!r}")
            whole = _whole(where, key, stored[key], own[name].shape, trainable)
            differs = not np.array_equal(whole.dense(), own[name].dense())
            if kind == "base_layer.weight" and differs:
                raise AdapterError(f"{where}: {key}: differs from the model's own weight; it is of another base")
            if differs or config.saves(path):  # PEFT may add the model's own beside an adapter
                saved[name] = whole
            continue
        if path not in layers:
            raise AdapterError(f"{where}: {key}: the model has no linear layer {path!r}")
        found.setdefault(path, {})[kind] = stored[key]
    if not found:
        raise AdapterError(f"{where}: holds no factors of a layer")
    if config.bounded:
        _compare(where, config, layers, found)
    else:
        warnings.warn(
            f"{directory / CONFIG}: a pattern of target_modules or exclude_modules could take too long to try; taken "
            "to mean the layers in the file",
            stacklevel=3,
        )
        config = replace(config, target_modules=sorted(found), exclude_modules=None)
    for name in held_whole(model, config):
        if name not in saved:
            raise FormatError(where, f"{_PREFIX}{name}", "is missing, though modules_to_save names it")
    factors = {path: _factors(where, config, path, layers[path], halves, trainable) for path, halves in found.items()}
    return Adapter(config, factors, saved)


def _compare(where: Path, config: LoraConfig, layers: Iterable[str], found: Container[str]) -> None:
    """Whether the file has the layers that the settings select: PEFT would read past others, and do without some."""
    for path in layers:
        if path in found and not config.selects(path):
            raise AdapterError(
                f"{where}: {_PREFIX}{path}: the settings select no such layer, so PEFT would ignore its factors; mend "
                f"target_modules, exclude_modules, layers_to_transform or modules_to_save in {CONFIG}"
            )
        if path not in found and config.selects(path):
            raise FormatError(
                where, f"{_PREFIX}{path}", "is missing, though the settings select this layer; if it is to have no "
                f"adapter, name those that have one as target_modules in {CONFIG}"
            )  # fmt: skip


def _whole(where: Path, key: str, array: NDArray[Any], shape: tuple[int, ...], trainable: bool) -> Tensor:
    """A weight that is saved whole: f32 where it is trained, else as stored."""
    if array.shape != shape:
        raise AdapterError(f"{where}: {key}: shape {array.shape}, the model's is {shape}")
    values = floats(where, key, array)
    keep = array.ndim > 1 and not trainable and array.dtype in DTYPES.values()
    return Tensor(np.array(array) if keep else values, requires_grad=trainable)


def _factors(
    where: Path, config: LoraConfig, path: str, layer: Adaptable, found: Mapping[str, NDArray[Any]], trainable: bool
) -> Factors:
    """The checked factors of one layer."""
    rank, scale = config.rank_of(path), config.scale_of(path)
    out, in_ = layer.weight.shape
    table = isinstance(layer, Embedding)
    shapes: dict[str, tuple[int, ...]]
    if table:
        shapes = {"lora_embedding_A": (rank, out), "lora_embedding_B": (in_, rank)}
    else:
        shapes = {"lora_A.weight": (rank, in_), "lora_B.weight": (out, rank)}
    if config.use_dora:
        shapes["lora_magnitude_vector"] = (out,)
    for kind in (*found, *shapes):
        if kind not in shapes:
            raise AdapterError(f"{where}: {path}.{kind}: the settings and this kind of layer call for no such tensor")
        if kind not in found:
            raise FormatError(where, f"{_PREFIX}{path}.{kind}", "is missing")
        if found[kind].shape != shapes[kind]:
            raise AdapterError(
                f"{where}: {path}.{kind.removesuffix('.weight')}: shape {found[kind].shape}, where the model and rank "
                f"{rank} need {shapes[kind]}"
            )
    tensors = {kind: floats(where, f"{_PREFIX}{path}.{kind}", found[kind]) for kind in shapes}
    if table:
        if config.use_dora:
            raise AdapterError(f"{where}: {path}: use_dora is served on linear layers only")
        tensors["lora_embedding_A"] = np.ascontiguousarray(tensors["lora_embedding_A"].T)
    a, b, *magnitude = (Tensor(array, requires_grad=trainable) for array in tensors.values())
    if table:
        return LowRankTable(a, b, scale)
    return LowRank(a, b, scale, config.lora_dropout, magnitude[0] if magnitude else None)


def read_config(path: Path) -> LoraConfig:
    """An adapter_config.json as a `LoraConfig`.

    ``fan_in_fan_out`` says how the base stores its weights and changes nothing here.

    Raises:
        FormatError: missing, not JSON or with an impossible value; AdapterError: a kind of adapter not served.
    """
    raw = files.read_json(path)
    for key, plain in _PLAIN.items():
        if key in raw and raw[key] not in plain:
            raise AdapterError(f"{path}: {key}: {raw[key]!r} is not served; LoRA, rsLoRA and DoRA are")
    if "peft_type" not in raw:
        raise FormatError(path, "peft_type", "is missing; this is no adapter")
    given = {f.name: raw[f.name] for f in fields(LoraConfig) if f.init and raw.get(f.name) is not None}
    try:
        return LoraConfig(**given)
    except ConfigError as error:
        raise FormatError(path, error.field, error.reason) from error
