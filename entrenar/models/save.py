"""Saving a model: a Hugging Face directory or a GGUF file, which other programs load as they are."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from entrenar.formats import files, gguf_write, safetensors
from entrenar.formats.files import LazyArray
from entrenar.models.arch import architecture
from entrenar.models.arch.rope import llama3_divisors
from entrenar.models.dtype import DTYPES
from entrenar.models.gguf_config import gguf_metadata
from entrenar.models.hf_config import config_to_hf
from entrenar.ops.parts import Weight
from entrenar.tensor import Tensor

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM

_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # GGUF's general.file_type


def save(model: CausalLM, path: str | PathLike[str], dtype: np.dtype[Any] | None) -> None:
    """Writes every weight (matrices as `dtype`, None: as they are), the config and the tokenizer."""
    path = Path(path)
    if path.suffix == ".gguf":
        _save_gguf(model, path, dtype)
    else:
        _save_directory(model, path, dtype)


def _arrays(model: CausalLM, dtype: np.dtype[Any] | None) -> Iterator[tuple[str, LazyArray]]:
    """Every weight, converted only when it is written."""
    for name, weight in model.named_weights():
        stored = _dtype(weight) if dtype is None or weight.ndim == 1 else dtype
        yield name, LazyArray(weight.shape, stored, partial(weight.dense, stored))


def _dtype(weight: Weight) -> np.dtype[Any]:
    """The type it has in memory; of packed weights f16, whose rounding is far below their own."""
    return weight.dtype if isinstance(weight, Tensor) else DTYPES["f16"]


def _main_dtype(model: CausalLM, dtype: np.dtype[Any] | None) -> str:
    return str(dtype or _dtype(model.model.layers[0].mlp.down_proj.weight))


def _save_directory(model: CausalLM, path: Path, dtype: np.dtype[Any] | None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    safetensors.write_directory(path, dict(_arrays(model, dtype)))
    if model.tokenizer is not None:
        model.tokenizer.save(path)
    files.write_json(path / "config.json", config_to_hf(model.config, _main_dtype(model, dtype)))


def _save_gguf(model: CausalLM, path: Path, dtype: np.dtype[Any] | None) -> None:
    names = {w.hf: w for w in architecture(model.config.model_type).weight_names(model.config)}
    metadata = gguf_metadata(model.config)
    metadata["general.name"] = path.stem
    metadata["general.file_type"] = _FILE_TYPES[_main_dtype(model, dtype)]
    if model.tokenizer is not None:
        metadata |= model.tokenizer.gguf_metadata(model.config.vocab_size)

    def tensors() -> Iterator[tuple[str, NDArray[Any] | LazyArray]]:
        for name, array in _arrays(model, dtype):
            to_gguf = names[name].transform.to_gguf
            permuted = partial(lambda load, change: change(load()), array.load, to_gguf)
            yield names[name].gguf, LazyArray(array.shape, array.dtype, permuted)
        divisors = llama3_divisors(model.config)
        if divisors is not None:
            yield "rope_freqs.weight", divisors

    gguf_write.write(path, metadata, tensors())
