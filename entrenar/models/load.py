"""Loading a model: a GGUF file or a Hugging Face directory becomes a `CausalLM`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import FormatError, UnsupportedError
from entrenar.formats import files, gguf_read, safetensors
from entrenar.models import memory
from entrenar.models.arch import architecture
from entrenar.models.arch.base import SAME, Transform
from entrenar.models.arch.rope import llama3_scaling
from entrenar.models.causal_lm import CausalLM, refuse_quant
from entrenar.models.dtype import DTYPES, DTypeName, Policy
from entrenar.models.gguf_config import config_from_gguf, original_context
from entrenar.models.hf_config import config_from_hf
from entrenar.models.spec import ModelConfig
from entrenar.models.storage import Empty
from entrenar.tensor import Tensor
from entrenar.tokenizer import from_directory, from_gguf

_ROPE_FREQS = "rope_freqs.weight"


def load(path: str | PathLike[str], quant: str | None = None, dtype: DTypeName = "auto") -> CausalLM:
    """Loads a model and its tokenizer.

    Matrices stay in their stored type (f32, f16, bf16); quantized ones expand to f16, whose rounding is far below
    their own, or to f32 where a value exceeds f16's range. Norms and biases become f32.
    A model whose weights are all f32 in memory is trainable as a whole, and one for which `dtype` asks for bf16, with
    stochastic rounding; otherwise it is frozen, for adapters.

    Args:
        path: a ``.gguf`` file (the first of its shards), or a directory with config.json and safetensors.
        dtype: with ``"auto"`` a model stored in f32 computes in f32, another in bf16 where the CPU multiplies that
            faster. ``"f32"`` makes all matrices f32 and computes in f32; ``"mixed"`` makes them f32, ``"bf16"`` bf16,
            and both compute in bf16; ``"f16"`` makes them f16 and computes as ``"auto"`` does.

    Raises:
        FormatError: the file is missing or damaged. UnsupportedError: it asks for what is not served.
        MemoryLimitError: the weights would not fit; known before any is read.
    """
    refuse_quant(quant)
    policy = Policy.named(dtype)
    path = Path(path)
    if path.is_dir():
        model = _load_directory(path, policy.storage)
    elif path.is_file():
        model = _load_gguf(path, policy.storage)
    else:
        raise FormatError(path, "", "is not a regular file" if path.exists() else "no such file or directory")
    model.source = str(path)
    model.compute = policy.compute or model.compute
    return model.eval()


def _load_gguf(path: Path, wanted: np.dtype[Any] | None) -> CausalLM:
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
    stored = {name: DTYPES.get(info.qtype.name, DTYPES["f16"]) for name, info in file.tensors.items()}
    weights = _Weights(file, path, config, names, shapes, stored, wanted, {_ROPE_FREQS})
    return CausalLM(config, weights.take, from_gguf(file.metadata))


def _load_directory(path: Path, wanted: np.dtype[Any] | None) -> CausalLM:
    if not (path / "config.json").exists():
        hint = "".join(f"; did you mean {file}?" for file in sorted(path.glob("*.gguf"))[:1])
        raise FormatError(path, "", f"is no Hugging Face directory: it has no config.json{hint}")
    config = config_from_hf(files.read_json(path / "config.json"), path / "config.json")
    store = safetensors.read(path)
    shapes = {name: info.shape for name, info in store.tensors.items()}
    stored = {name: safetensors.DTYPES[info.dtype][1] or DTYPES["f32"] for name, info in store.tensors.items()}
    tied = config.tie_word_embeddings and "lm_head.weight" in store
    ignore = {name for name in store if name.endswith("rotary_emb.inv_freq")} | ({"lm_head.weight"} if tied else set())
    names = {name: (name, SAME) for name in config.parameter_shapes()}
    weights = _Weights(store, path, config, names, shapes, stored, wanted, ignore)
    return CausalLM(config, weights.take, from_directory(path))


class Store(Protocol):
    """An open file of tensors."""

    def array(self, name: str) -> NDArray[Any]: ...
    def release(self, name: str) -> None: ...


class _Weights:
    """Checks a file's tensors against what the config needs, then hands them out one at a time."""

    def __init__(
        self,
        store: Store,
        path: Path,
        config: ModelConfig,
        names: Mapping[str, tuple[str, Transform]],
        shapes: Mapping[str, tuple[int, ...]],
        stored: Mapping[str, np.dtype[Any]],
        wanted: np.dtype[Any] | None,
        ignore: set[str],
    ) -> None:
        self._store, self._names = store, names
        self._target: dict[str, np.dtype[Any]] = {}
        sizes = {}
        for hf, shape in config.parameter_shapes().items():
            name = names[hf][0]
            if name not in shapes:
                raise FormatError(path, name, f"the tensor is missing (the config calls for {shape})")
            if shapes[name] != shape:
                raise FormatError(path, name, f"has shape {shapes[name]} where the config calls for {shape}")
            matrix = len(shape) > 1 and stored[name] in DTYPES.values()
            self._target[hf] = (wanted or stored[name]) if matrix else DTYPES["f32"]
            sizes[hf] = math.prod(shape) * self._target[hf].itemsize
        extra = sorted(set(shapes) - {names[hf][0] for hf in sizes} - ignore)
        if extra:
            raise UnsupportedError(path, extra[0], "the architecture has no such tensor; its meaning is not served")
        memory.require(sizes, str(path))
        self._keep = wanted is None
        self._trainable = wanted == DTYPES["bf16"] or all(dtype == np.float32 for dtype in self._target.values())

    def take(self, hf: str, shape: tuple[int, ...], empty: Empty) -> Tensor:
        name, transform = self._names[hf]
        array = transform.from_gguf(self._store.array(name))
        target = self._target[hf]
        if self._keep and array.dtype == np.float32:
            target = array.dtype  # a quantized tensor that f16 could not hold
        values = empty(target)
        values[...] = array
        self._store.release(name)
        return Tensor(values, requires_grad=self._trainable)
