"""Saving a model: a Hugging Face directory or a GGUF file, which other programs load as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import ConfigError, UsageError
from entrenar.formats import files, gguf_write, safetensors
from entrenar.formats.files import LazyArray
from entrenar.models.arch import architecture
from entrenar.models.arch.base import SAME, Transform
from entrenar.models.arch.rope import llama3_divisors
from entrenar.models.dtype import DTYPES, overflows, storage_named
from entrenar.models.gguf_config import gguf_metadata
from entrenar.models.hf_config import config_to_hf
from entrenar.models.mixture import MIXTURES, file_type, in_file, quant_named
from entrenar.models.spec import ModelConfig
from entrenar.nn.lora import HEAD
from entrenar.nn.low_rank import Factors
from entrenar.ops.parts import Weight
from entrenar.quant import QTYPES, QTensor, QType, quantize
from entrenar.quant.qtensor import ENCODED
from entrenar.tensor import Tensor

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM

# GGUF's general.file_type: the type of most tensors. Source: enum llama_ftype in llama.h of llama.cpp (MIT)
_FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 11, "q4_k": 14,
    "q5_k": 16, "q6_k": 18, "iq4_nl": 25, "iq4_xs": 30, "bf16": 32,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
GGUF_QUANTS = (*(name for name in ENCODED if name in _FILE_TYPES and name not in DTYPES), *MIXTURES)
WEIGHTS_ALONE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")  # files that are a part of a directory
Written: TypeAlias = Callable[[str, NDArray[np.float32], NDArray[np.float32]], None]


def is_gguf(path: str | PathLike[str]) -> bool:
    """Whether this is the name of a GGUF file, in any case; any other is that of a directory.

    Raises:
        UsageError: it is the name of another kind of file, and would become a directory's.
    """
    suffix = Path(path).suffix.lower()
    if suffix in WEIGHTS_ALONE:
        raise UsageError(f"{path}: {suffix} files are not written alone; give a directory, or a name ending in .gguf")
    return suffix == ".gguf"


@dataclass(frozen=True)
class Content:
    """What a file is to hold of a model.

    Attributes:
        dtype: of the matrices, None for the one they have. quant: type of the matrices of a GGUF file instead.
        factors: adapters by layer, to be merged on the way; the model's own weights stay as they are.
        written: is told the path, the merged weight and what it is in the file, both f32, of each layer of `factors`.
    """

    dtype: np.dtype[Any] | None = None
    quant: str | None = None
    factors: Mapping[str, Factors] | None = None
    written: Written | None = None

    def stored_as(self, name: str, weight: Weight, config: ModelConfig, gguf: bool) -> np.dtype[Any] | QType:
        """The type that a weight has in the file.

        As llama.cpp has it, embedding and head get more bits than other matrices, types whose blocks rows do not fill
        give way to smaller ones, and vectors stay f32.
        """
        if weight.ndim == 1:
            return DTYPES["f32"]
        if self.quant is not None:
            kind = in_file(self.quant, name, weight.shape[-1], config)
            return DTYPES[kind] if kind in DTYPES else QTYPES[kind]
        if self.dtype is not None:
            return self.dtype
        if isinstance(weight, Tensor):
            return weight.dtype
        return weight.qtype if gguf and not weight.qtype.flat and not self._changes(name) else DTYPES["f16"]

    def _changes(self, name: str) -> bool:
        return self.factors is not None and name.removesuffix(".weight") in self.factors

    def values(self, name: str, weight: Weight, dtype: np.dtype[Any], transform: Transform = SAME) -> NDArray[Any]:
        """The weight as `dtype`, merged, its rows in the file's order.

        Raises:
            ConfigError: it is too large for f16.
        """
        changes = self._changes(name)
        merged = self._merged(name, weight) if changes else None
        with np.errstate(over="ignore"):
            values = weight.dense(dtype) if merged is None else merged.astype(dtype, copy=False)
        if overflows(values):
            raise ConfigError("dtype", f"{name} has values beyond f16's largest, 65504; bf16 and f32 hold them")
        if merged is not None:
            self._tell(name, merged, values.astype(np.float32, copy=False))
        return transform.to_gguf(values)

    def blocks(self, name: str, weight: Weight, kind: QType, transform: Transform) -> NDArray[Any]:
        """The same as a quantized type's blocks; a packed weight that does not change keeps its own."""
        changes = self._changes(name)
        if isinstance(weight, QTensor) and weight.qtype is kind and not changes:
            return transform.to_gguf(weight.bytes.reshape(weight.shape[0], -1)).reshape(-1)
        values = self._merged(name, weight) if changes else weight.dense(np.float32)
        packed = quantize(transform.to_gguf(values), kind.name)
        if changes:
            self._tell(name, values, transform.from_gguf(packed.dense(np.float32)))
        return packed.bytes

    def _merged(self, name: str, weight: Weight) -> NDArray[np.float32]:
        assert self.factors is not None
        return self.factors[name.removesuffix(".weight")].merged(weight.dense(np.float32))

    def _tell(self, name: str, merged: NDArray[np.float32], stored: NDArray[np.float32]) -> None:
        if self.written is not None:
            self.written(name.removesuffix(".weight"), merged, stored)


def requested(path: str | PathLike[str], quant: str | None, dtype: str) -> Content:
    """What is to be at this path, where the types are given by their names; see `CausalLM.save`.

    Raises:
        ConfigError: there is no such type, or this form can't hold it. UsageError: see `is_gguf`.
    """
    gguf, storage = is_gguf(path), storage_named(dtype)
    if quant is None:
        return Content(storage)
    name = quant_named(quant)
    if not gguf:
        raise ConfigError("quant", f"{quant!r}: quantized models are GGUF files; give a name ending in .gguf")
    if name not in GGUF_QUANTS:
        raise ConfigError("quant", f"{quant!r} is no type of GGUF files; {', '.join(GGUF_QUANTS)} are")
    if storage is not None:
        raise ConfigError("dtype", f"{dtype!r} beside quant {quant!r}, which decides the type of every weight")
    return Content(quant=name)


def save(model: CausalLM, path: str | PathLike[str], content: Content) -> None:
    """Writes the weights, the config and the tokenizer."""
    (_save_gguf if is_gguf(path) else _save_directory)(model, Path(path), content)


def _config_and_weights(model: CausalLM) -> tuple[ModelConfig, dict[str, Weight]]:
    """What the file is of: the head as a weight of its own where merging parts it from the embedding."""
    weights = dict(model.named_weights())
    if not model.parts_head():
        return model.config, weights
    return model.config.replace(tie_word_embeddings=False), weights | {f"{HEAD}.weight": model.lm_head.weight}


def _save_directory(model: CausalLM, path: Path, content: Content) -> None:
    path.mkdir(parents=True, exist_ok=True)
    config, weights = _config_and_weights(model)
    arrays = {}
    for name, weight in weights.items():
        kind = content.stored_as(name, weight, config, gguf=False)
        assert isinstance(kind, np.dtype)
        arrays[name] = LazyArray(weight.shape, kind, partial(content.values, name, weight, kind))
    safetensors.write_directory(path, arrays)
    if model.tokenizer is not None:
        model.tokenizer.save(path)
    main = arrays["model.layers.0.mlp.down_proj.weight"].dtype
    files.write_json(path / "config.json", config_to_hf(config, str(main)))


def _save_gguf(model: CausalLM, path: Path, content: Content) -> None:
    config, weights = _config_and_weights(model)
    names = {w.hf: w for w in architecture(config.model_type).weight_names(config)}
    tensors: list[tuple[str, gguf_write.Item]] = []
    kinds: dict[str, str] = {}  # of matrices
    for name, weight in weights.items():
        kind, transform = content.stored_as(name, weight, config, gguf=True), names[name].transform
        item: gguf_write.Item
        if isinstance(kind, QType):
            item = gguf_write.LazyBlocks(weight.shape, kind, partial(content.blocks, name, weight, kind, transform))
        else:
            item = LazyArray(weight.shape, kind, partial(content.values, name, weight, kind, transform))
        tensors.append((names[name].gguf, item))
        if weight.ndim > 1:
            kinds[name] = kind.name if isinstance(kind, QType) else _NAMES[kind]
    divisors = llama3_divisors(config)
    if divisors is not None:
        tensors.append(("rope_freqs.weight", divisors))
    metadata = gguf_metadata(config)
    metadata["general.name"] = path.stem
    ((main, _),) = Counter(kinds.values()).most_common(1)
    metadata["general.file_type"] = file_type(kinds, config) or _FILE_TYPES.get(main, 1)
    if any(kind not in DTYPES for kind in kinds.values()):
        metadata["general.quantization_version"] = 2
    if model.tokenizer is not None:
        metadata |= model.tokenizer.gguf_metadata(config.vocab_size)
    gguf_write.write(path, metadata, tensors)

