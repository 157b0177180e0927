"""A model's files, open: its config, and how each weight is stored. No weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import FormatError, UnsupportedError
from entrenar.formats import files, gguf_read, safetensors
from entrenar.models.arch import architecture
from entrenar.models.arch.base import SAME, Transform
from entrenar.models.arch.rope import llama3_scaling
from entrenar.models.dtype import DTYPES
from entrenar.models.gguf_config import config_from_gguf, original_context
from entrenar.models.hf_config import config_from_hf
from entrenar.models.spec import ModelConfig
from entrenar.quant import QTYPES, QType
from entrenar.tokenizer import Tokenizer, from_directory, from_gguf

_ROPE_FREQS = "rope_freqs.weight"


class Store(Protocol):
    """An open file of tensors."""

    def array(self, name: str) -> NDArray[Any]: ...
    def release(self, name: str) -> None: ...


@dataclass(frozen=True)
class Source:
    """What `open_model` found.

    Attributes:
        store: the tensors, under the file's names. names: Hugging Face's name -> the file's, and how the layouts
            differ. stored: Hugging Face's name -> the type in the file, f32 for numbers that become f32 when read.
        raw: a tensor's stored bytes, where the file may have quantized ones; read_into: the same into an array given.
        tokenizer: reads it; None where there is none.
    """

    path: Path
    config: ModelConfig
    store: Store
    names: Mapping[str, tuple[str, Transform]]
    stored: Mapping[str, QType]
    raw: Callable[[str], NDArray[Any]]
    read_into: Callable[[str, NDArray[Any]], None] | None
    tokenizer: Callable[[], Tokenizer | None]

    @property
    def quantized(self) -> bool:
        """Whether some weights are quantized in the file."""
        return any(kind.decodes for kind in self.stored.values())


def open_model(path: str | PathLike[str]) -> Source:
    """Opens a ``.gguf`` file (the first of its shards), or a directory with config.json and safetensors.

    Raises:
        FormatError: it is missing or damaged, or lacks a weight. UnsupportedError: it asks for what is not served.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if path.is_file():
        return _open_gguf(path)
    raise FormatError(path, "", "is not a regular file" if path.exists() else "no such file or directory")


def _open_gguf(path: Path) -> Source:
    file = gguf_read.read(path)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    config = config_from_gguf(file.metadata, shapes, path)
    if _ROPE_FREQS in file.tensors:
        divisors = file.array(_ROPE_FREQS).astype(np.float32)
        scaling = llama3_scaling(divisors, config, original_context(file.metadata, path))
        if scaling is None or config.rope_scaling is not None:
            raise UnsupportedError(path, _ROPE_FREQS, "these rotary divisors are not Llama 3's, or not alone")
        config = config.replace(rope_scaling=scaling)
    names = {w.hf: (w.gguf, w.transform) for w in architecture(config.model_type).weight_names(config)}
    _check(path, config, names, shapes, {_ROPE_FREQS})
    stored = {hf: file.tensors[name].qtype for hf, (name, _) in names.items()}
    return Source(path, config, file, names, stored, file.raw, file.read_into, lambda: from_gguf(file.metadata))


def _open_directory(path: Path) -> Source:
    if not (path / "config.json").exists():
        hint = "".join(f"; did you mean {file}?" for file in sorted(path.glob("*.gguf"))[:1])
        raise FormatError(path, "", f"is no Hugging Face directory: it has no config.json{hint}")
    config = config_from_hf(files.read_json(path / "config.json"), path / "config.json")
    store = safetensors.read(path)
    shapes = {name: info.shape for name, info in store.tensors.items()}
    tied = config.tie_word_embeddings and "lm_head.weight" in store
    ignore = {name for name in store if name.endswith("rotary_emb.inv_freq")} | ({"lm_head.weight"} if tied else set())
    names = {name: (name, SAME) for name in config.parameter_shapes()}
    _check(path, config, names, shapes, ignore)
    types = {name: store.tensors[name].dtype.lower() for name in names}
    stored = {name: QTYPES[kind if kind in DTYPES else "f32"] for name, kind in types.items()}
    return Source(path, config, store, names, stored, store.array, None, lambda: from_directory(path))


def _check(
    path: Path,
    config: ModelConfig,
    names: Mapping[str, tuple[str, Transform]],
    shapes: Mapping[str, tuple[int, ...]],
    ignore: set[str],
) -> None:
    """The file has what the config calls for, and nothing whose meaning is unknown."""
    for hf, shape in config.parameter_shapes().items():
        name = names[hf][0]
        if name not in shapes:
            raise FormatError(path, name, f"the tensor is missing (the config calls for {shape})")
        if shapes[name] != shape:
            raise FormatError(path, name, f"has shape {shapes[name]} where the config calls for {shape}")
    extra = sorted(set(shapes) - {name for name, _ in names.values()} - ignore)
    if extra:
        raise UnsupportedError(path, extra[0], "the architecture has no such tensor; its meaning is not served")
