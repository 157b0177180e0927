"""Loading a model: a GGUF file or a Hugging Face directory becomes a `CausalLM`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import ConfigError, FormatError, UnsupportedError
from entrenar.formats import files, gguf_read, safetensors
from entrenar.models import memory
from entrenar.models.arch import architecture
from entrenar.models.arch.base import SAME, Transform
from entrenar.models.arch.rope import llama3_scaling
from entrenar.models.causal_lm import CausalLM
from entrenar.models.dtype import DTYPES, DTypeName, Policy
from entrenar.models.gguf_config import config_from_gguf, original_context
from entrenar.models.hf_config import config_from_hf
from entrenar.models.spec import ModelConfig
from entrenar.models.storage import Empty, Plain, Quantized, aligned, kept_as
from entrenar.ops.parts import Weight
from entrenar.quant import QTensor, QType
from entrenar.tokenizer import from_directory, from_gguf

_ROPE_FREQS = "rope_freqs.weight"


def load(path: str | PathLike[str], quant: str | None = None, dtype: DTypeName = "auto") -> CausalLM:
    """Loads a model and its tokenizer.

    Matrices stay in their stored type: f32, f16, bf16 or, in a GGUF file, quantized, and then they are read as they are
    by every product (`QTensor`). Norms and biases become f32.
    A model whose weights are all f32 in memory is trainable as a whole, and one for which `dtype` asks for bf16, with
    stochastic rounding; otherwise it is frozen, for adapters.

    Args:
        path: a ``.gguf`` file (the first of its shards), or a directory with config.json and safetensors.
        quant: type that the matrices of linear layers, but the head's, are quantized to, one after the other:
            ``"nf4"``, ``"nf4-f32"``, ``"fp4"``, ``"q4_0"``, ``"q8_0"``, ``"q4_k"`` and so on. The model is then frozen.
        dtype: with ``"auto"`` a model stored in f32 computes in f32, another in bf16 where the CPU multiplies that
            faster. ``"f32"`` makes all matrices f32 and computes in f32; ``"mixed"`` makes them f32, ``"bf16"`` bf16,
            and both compute in bf16; ``"f16"`` makes them f16 and computes as ``"auto"`` does. Quantized matrices are
            expanded by any but ``"auto"``.

    Raises:
        FormatError: the file is missing or damaged. UnsupportedError: it asks for what is not served.
        ConfigError: `quant` is no type that weights can be quantized to, or the file's are quantized already.
        MemoryLimitError: the weights would not fit; known before any is read.
    """
    policy = Policy.named(dtype)
    path = Path(path)
    if path.is_dir():
        model = _load_directory(path, policy.storage, quant)
    elif path.is_file():
        model = _load_gguf(path, policy.storage, quant)
    else:
        raise FormatError(path, "", "is not a regular file" if path.exists() else "no such file or directory")
    model.source = str(path)
    model.compute = policy.compute or model.compute
    return model.eval()


def _load_gguf(path: Path, wanted: np.dtype[Any] | None, quant: str | None) -> CausalLM:
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
    stored = {name: DTYPES.get(info.qtype.name, info.qtype) for name, info in file.tensors.items()}
    weights = _Weights(file, path, config, names, shapes, stored, wanted, quant, {_ROPE_FREQS})
    weights.raw = file.raw
    return CausalLM(config, weights.take, from_gguf(file.metadata))


def _load_directory(path: Path, wanted: np.dtype[Any] | None, quant: str | None) -> CausalLM:
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
    weights = _Weights(store, path, config, names, shapes, stored, wanted, quant, ignore)
    return CausalLM(config, weights.take, from_directory(path))


class Store(Protocol):
    """An open file of tensors."""

    def array(self, name: str) -> NDArray[Any]: ...
    def release(self, name: str) -> None: ...


class _Weights:
    """Checks a file's tensors against what the config needs, then hands them out one at a time.

    Attributes:
        raw: the stored bytes of a tensor, where a file has quantized ones.
    """

    raw: Callable[[str], NDArray[Any]]

    def __init__(
        self,
        store: Store,
        path: Path,
        config: ModelConfig,
        names: Mapping[str, tuple[str, Transform]],
        shapes: Mapping[str, tuple[int, ...]],
        stored: Mapping[str, np.dtype[Any] | QType],
        wanted: np.dtype[Any] | None,
        quant: str | None,
        ignore: set[str],
    ) -> None:
        self._store, self._names, self._stored = store, names, stored
        self._kept: dict[str, Plain | Quantized | QType] = {}
        sizes = {}
        for hf, shape in config.parameter_shapes().items():
            name = names[hf][0]
            if name not in shapes:
                raise FormatError(path, name, f"the tensor is missing (the config calls for {shape})")
            if shapes[name] != shape:
                raise FormatError(path, name, f"has shape {shapes[name]} where the config calls for {shape}")
            kind = stored[name]
            if isinstance(kind, QType):
                if quant is not None:
                    what = f"{path} is quantized already ({name} is {kind.name}); leave it out"
                    raise ConfigError("quant", f"{quant!r}: {what}")
                if not kind.served:
                    reason = f"is of type {kind.name}, which can be inspected, not computed with"
                    raise UnsupportedError(path, f"tensor {name!r}", reason)
                if wanted is None and len(shape) == 2:
                    self._kept[hf], sizes[hf] = kind, kind.nbytes(math.prod(shape))
                    continue
                kind = DTYPES["f16"]
            kept = kept_as(hf, shape, wanted or (kind if kind in DTYPES.values() else DTYPES["f32"]), quant)
            self._kept[hf], sizes[hf] = kept, kept.nbytes(shape)
        extra = sorted(set(shapes) - {names[hf][0] for hf in sizes} - ignore)
        if extra:
            raise UnsupportedError(path, extra[0], "the architecture has no such tensor; its meaning is not served")
        memory.require(sizes, str(path))
        exact = all(kind == Plain(DTYPES["f32"]) for kind in self._kept.values())
        self._trainable = quant is None and (wanted == DTYPES["bf16"] or exact)

    def take(self, hf: str, shape: tuple[int, ...], empty: Empty) -> Weight:
        name, transform = self._names[hf]
        kept = self._kept[hf]
        weight: Weight
        if isinstance(kept, QType):  # rows of blocks change places as rows of numbers do
            rows = transform.from_gguf(self.raw(name).reshape(shape[0], -1))
            stored = aligned((rows.size,), np.dtype(np.uint8))
            stored.reshape(rows.shape)[...] = rows
            weight = QTensor(kept, shape, stored)
        else:
            values = transform.from_gguf(self._array(name, shape, kept))
            weight = kept.weight(kept.placed(values, empty), self._trainable)
        self._store.release(name)
        return weight

    def _array(self, name: str, shape: tuple[int, ...], kept: Plain | Quantized) -> NDArray[Any]:
        """The tensor's values, quantized ones expanded to the type that they are to have."""
        kind = self._stored[name]
        if isinstance(kind, QType) and isinstance(kept, Plain):
            return QTensor(kind, shape, self.raw(name)).dense(kept.dtype)
        return self._store.array(name)
