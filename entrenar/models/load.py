"""Loading a model: a GGUF file or a Hugging Face directory becomes a `CausalLM`."""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import ConfigError, UnsupportedError
from entrenar.models import memory
from entrenar.models.causal_lm import CausalLM
from entrenar.models.dtype import DTYPES, DTypeName, Policy
from entrenar.models.mixture import quant_named
from entrenar.models.quantization import Quantization
from entrenar.models.source import Source, open_model
from entrenar.models.storage import Empty, Plain, Quantized, aligned, kept_from
from entrenar.models.stream import LayerStream, layer_of, resident, streamed_layers
from entrenar.ops.parts import Weight
from entrenar.quant import QTensor, QType


def load(
    path: str | PathLike[str], quant: str | None = None, dtype: DTypeName = "auto", stream: bool = False
) -> CausalLM:
    """Loads a model and its tokenizer.

    Matrices stay in their stored type: f32, f16, bf16 or, in a GGUF file, quantized, and then they are read as they are
    by every product (`QTensor`). Norms and biases become f32.
    A model whose weights are all f32 in memory is trainable as a whole, and one for which `dtype` asks for bf16, with
    stochastic rounding; otherwise it is frozen, for adapters.

    Args:
        path: a ``.gguf`` file (the first of its shards), or a directory with config.json and safetensors.
        quant: type that the matrices of linear layers, but the head's, are quantized to, one after the other:
            ``"nf4"``, ``"nf4-f32"``, ``"fp4"``, ``"q4_0"``, ``"q8_0"``, ``"q4_k"`` and so on, or to a mixture,
            ``"q4_k_m"`` or ``"q5_k_m"``. The model is then frozen.
        dtype: with ``"auto"`` a model stored in f32 computes in f32, another in bf16 where the CPU multiplies that
            faster. ``"f32"`` makes all matrices f32 and computes in f32; ``"mixed"`` makes them f32, ``"bf16"`` bf16,
            and both compute in bf16; ``"f16"`` makes them f16 and computes as ``"auto"`` does. Quantized matrices are
            expanded by any but ``"auto"``.
        stream: the layers' quantized weights stay in the file, and are read when their turn comes, two layers in
            memory at a time: for a GGUF file that is larger than memory. It must not change while the model is used.

    Raises:
        FormatError: the file is missing or damaged. UnsupportedError: it asks for what is not served.
        ConfigError: `quant` is no type that weights can be quantized to, or the file's are quantized already; nothing
            can be streamed.
        MemoryLimitError: the weights would not fit; known before any is read.
    """
    policy, quant = Policy.named(dtype), None if quant is None else quant_named(quant)
    source = open_model(path)
    weights = _Weights(source, policy.storage, quant, stream)
    model = CausalLM(source.config, weights.take, source.tokenizer())
    model.source = str(path)
    model.quantization = Quantization.of(weights.kept, quant, source.stored)
    model.compute = policy.compute or model.compute
    return model.eval()


class _Weights:
    """Hands out a file's weights one at a time, as they are `kept`, by name."""

    def __init__(self, source: Source, wanted: np.dtype[Any] | None, quant: str | None, stream: bool) -> None:
        self._source = source
        shapes = source.config.parameter_shapes()
        self.kept = kept_from(source.stored, shapes, wanted, quant, source.config.num_hidden_layers)
        for name, kind in source.stored.items():
            if not kind.served:
                reason = f"is of type {kind.name}, which can be inspected, not computed with"
                raise UnsupportedError(source.path, f"tensor {source.names[name][0]!r}", reason)
        sizes = {
            name: kept.nbytes(math.prod(shapes[name])) if isinstance(kept, QType) else kept.nbytes(shapes[name])
            for name, kept in self.kept.items()
        }
        self._stream = LayerStream(source.read_into) if stream and source.read_into is not None else None
        streamed = streamed_layers(self.kept) if stream else {}
        if stream and not streamed:
            raise ConfigError("stream", f"{source.path}: no layer has quantized weights that could stay in the file")
        memory.require(resident(sizes, streamed), str(source.path))
        exact = all(kind == Plain(DTYPES["f32"]) for kind in self.kept.values())
        self._trainable = quant is None and (wanted == DTYPES["bf16"] or exact)

    def take(self, hf: str, shape: tuple[int, ...], empty: Empty) -> Weight:
        name, transform = self._source.names[hf]
        kept = self.kept[hf]
        weight: Weight
        layer = layer_of(hf)
        if isinstance(kept, QType) and self._stream is not None and layer is not None:
            return self._stream.weight(layer, name, kept, shape, kept.nbytes(math.prod(shape)), transform)
        if isinstance(kept, QType):  # rows of blocks change places as rows of numbers do
            rows = transform.from_gguf(self._source.raw(name).reshape(shape[0], -1))
            stored = aligned((rows.size,), np.dtype(np.uint8))
            stored.reshape(rows.shape)[...] = rows
            weight = QTensor(kept, shape, stored)
        else:
            values = transform.from_gguf(self._array(hf, shape, kept))
            weight = kept.weight(kept.placed(values, empty), self._trainable)
        self._source.store.release(name)
        return weight

    def _array(self, hf: str, shape: tuple[int, ...], kept: Plain | Quantized) -> NDArray[Any]:
        """The tensor's values, quantized ones expanded to the type that they are to have."""
        kind, name = self._source.stored[hf], self._source.names[hf][0]
        if kind.decodes and isinstance(kept, Plain):
            return QTensor(kind, shape, self._source.raw(name)).dense(kept.dtype)
        return self._source.store.array(name)
