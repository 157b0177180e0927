"""LoRA adapters as llama.cpp's GGUF files.

Source: convert_lora_to_gguf.py and src/llama-adapter.cpp of llama.cpp (MIT). A tensor's two factors are
``<its name>.lora_a`` (r, in) and ``.lora_b`` (out, r), the embedding's lora_a (vocab, r); llama.cpp counts them
alpha/r times, with one alpha for the file and each tensor's own r. Rows of B lie in the order of the file's weight.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import AdapterError, FormatError
from entrenar.formats import gguf_read, gguf_write
from entrenar.models import quantization
from entrenar.models.adapter_values import floats
from entrenar.models.adapters import Adapted, Adapter
from entrenar.models.arch import architecture
from entrenar.models.arch.base import WeightName
from entrenar.nn.layers import Embedding
from entrenar.nn.lora import EMBEDDING, HEAD, MAX_ALPHA, MAX_RANK, LoraConfig
from entrenar.nn.low_rank import Factors, LowRank, LowRankTable
from entrenar.tensor import Tensor

_ALPHA = "adapter.lora.alpha"


def save(model: Adapted, adapter: Adapter, path: Path) -> None:
    """Writes the file.

    Factors that count neither alpha/r times for one alpha nor all alike get their difference folded into B.

    Raises:
        AdapterError: llama.cpp's adapters can't hold it: DoRA, whole modules, head or embedding that are tied.
    """
    if adapter.config.use_dora:
        raise AdapterError("llama.cpp has no DoRA adapters: merge this one (entrenar merge) and save the model instead")
    if adapter.saved:
        raise AdapterError(
            f"{min(adapter.saved)} is held whole, which llama.cpp's adapters can't: merge this one (entrenar merge) "
            "and save the model instead"
        )
    sides = [path for path in (HEAD, EMBEDDING) if path in adapter.factors]
    if model.config.tie_word_embeddings and sides:  # llama.cpp would take them for its head as well, and abort
        raise AdapterError(
            f"the adapter changes {sides[0]}, but head and embedding are tied: the base's GGUF file has one weight for "
            "both, and llama.cpp can't adapt one side of it: merge this one (entrenar merge) and save the model instead"
        )
    names = {name.hf.removesuffix(".weight"): name for name in _weights(model)}
    alphas = {path: float(np.float32(f.scale * f.rank)) for path, f in adapter.factors.items()}
    ((alpha, _),) = Counter(abs(a) or 1.0 for a in alphas.values()).most_common(1)  # 0 would mean factors as they are
    tensors: list[tuple[str, NDArray[Any]]] = []
    for hf, factors in adapter.factors.items():
        b = factors.b.data if alphas[hf] == alpha else factors.b.data * np.float32(alphas[hf] / alpha)
        tensors.append((f"{names[hf].gguf}.lora_a", factors.a.data))
        tensors.append((f"{names[hf].gguf}.lora_b", np.ascontiguousarray(names[hf].transform.to_gguf(b))))
    metadata = {
        "general.type": "adapter",
        "general.architecture": architecture(model.config.model_type).gguf_name,
        "general.name": path.stem,
        "adapter.type": "lora",
        _ALPHA: np.float32(alpha),
        **quantization.header(adapter.base),
    }
    gguf_write.write(path, metadata, tensors)


def load(model: Adapted, path: Path, trainable: bool) -> Adapter:
    """Reads the file against the model's layers; nothing is attached yet."""
    file = gguf_read.read(path)
    wanted = {
        "general.type": "adapter",
        "general.architecture": architecture(model.config.model_type).gguf_name,
        "adapter.type": "lora",
    }
    for key, value in wanted.items():
        if file.metadata.expect(key, "str") != value:
            raise AdapterError(f"{path}: {key} is {file.metadata[key]!r}; an adapter for this model has {value!r}")
    for key in file.metadata:
        if key.startswith("adapter.alora."):
            raise AdapterError(f"{path}: {key}: activated LoRA is not served")
    alpha = file.metadata.expect(_ALPHA, "float")
    if not 0 <= alpha <= MAX_ALPHA:
        raise FormatError(path, f"key {_ALPHA!r}", f"is {alpha}")
    halves: dict[str, dict[str, NDArray[Any]]] = {}
    for name in file.tensors:
        base, _, half = name.rpartition(".")
        if half not in ("lora_a", "lora_b"):
            raise AdapterError(f"{path}: {name}: not a LoRA factor of a weight; this kind is not served")
        halves.setdefault(base, {})[half] = floats(path, name, file.array(name))
    if not halves:
        raise AdapterError(f"{path}: holds no adapter weights")
    layers, names = dict(model.adaptable()), {name.gguf: name for name in _weights(model)}
    factors: dict[str, Factors] = {}
    for base, pair in halves.items():
        hf = names[base].hf.removesuffix(".weight") if base in names else ""
        if hf not in layers:
            raise AdapterError(f"{path}: {base}: the model has no layer of this name")
        for half in ("lora_a", "lora_b"):
            if half not in pair:
                raise FormatError(path, f"{base}.{half}", "is missing")
        a, b, (out, in_) = pair["lora_a"], pair["lora_b"], layers[hf].weight.shape
        table = isinstance(layers[hf], Embedding)
        rank = a.shape[table] if a.ndim == 2 else 0
        shapes = ((out, rank), (in_, rank)) if table else ((rank, in_), (out, rank))
        if not 1 <= rank <= MAX_RANK or (a.shape, b.shape) != shapes:
            raise AdapterError(f"{path}: {base}: lora_a {a.shape} and lora_b {b.shape} for a weight {(out, in_)}")
        scale = alpha / rank if alpha else 1.0  # as llama.cpp
        b = np.ascontiguousarray(names[base].transform.from_gguf(b))
        tensors = (Tensor(a, requires_grad=trainable), Tensor(b, requires_grad=trainable))
        factors[hf] = LowRankTable(*tensors, scale) if table else LowRank(*tensors, scale, 0.0)
    return Adapter(_config(factors, alpha), factors)


def _weights(model: Adapted) -> list[WeightName]:
    names = architecture(model.config.model_type).weight_names(model.config)
    return [name for name in names if name.hf.endswith(".weight")]


def _config(factors: dict[str, Factors], alpha: float) -> LoraConfig:
    """Settings that say the same: the commonest rank, and the others by path."""
    ((rank, _),) = Counter(f.rank for f in factors.values()).most_common(1)
    ranks = {path: f.rank for path, f in factors.items() if f.rank != rank}
    alphas = {} if alpha else {path: float(r) for path, r in ranks.items()}
    targets = sorted({path.rpartition(".")[2] for path in factors})
    return LoraConfig(
        r=rank, lora_alpha=alpha or float(rank), target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas
    )
