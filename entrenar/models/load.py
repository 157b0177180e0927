"""Loading a model: a GGUF file or a Hugging Face directory becomes a `CausalLM`."""

from __future__ import annotations

import math
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.backend import cpu
from entrenar.errors import ConfigError, UnsupportedError
from entrenar.models import memory
from entrenar.models.build import Take
from entrenar.models.causal_lm import CausalLM
from entrenar.models.dtype import DTYPES, DTypeName, Policy
from entrenar.models.mixture import quant_named
from entrenar.models.on_disk import on_disk
from entrenar.models.quantization import Quantization
from entrenar.models.source import Source, open_model
from entrenar.models.storage import Empty, Plain, Quantized, Rows, aligned, kept_from
from entrenar.models.stream import LayerStream, resident, streamed_layers
from entrenar.ops.parts import Weight
from entrenar.quant import QTensor, QType
from entrenar.tokenizer import Tokenizer


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
    weights = _Weights(source, policy.storage, quant)
    take = weights.streamed() if stream else weights.read
    memory.require(resident(weights.sizes(), streamed_layers(weights.kept) if stream else {}), str(source.path))
    model = CausalLM(source.config, take, _tokenizer(source))
    model.source = str(path)
    model.quantization = Quantization.of(weights.kept, quant, source.stored)
    model.compute = policy.compute or model.compute
    return model.eval()


def load_on_disk(path: str | PathLike[str], quant: str | None = None) -> CausalLM:
    """The model that `load` gives, of any size: its matrices stay in the files, see `entrenar.models.on_disk`.

    Raises:
        FormatError, UnsupportedError, ConfigError: as `load`.
    """
    quant = None if quant is None else quant_named(quant)
    source = open_model(path)
    weights = _Weights(source, None, quant)

    def left(hf: str, shape: tuple[int, ...], empty: Empty) -> Weight:
        if len(shape) < 2:
            return weights.read(hf, shape, empty)
        kept = weights.kept[hf]
        qtype = kept if isinstance(kept, QType) else kept.qtype
        return on_disk(lambda: weights.read(hf, shape, Rows(*shape).place(0, shape[0])), qtype, shape)

    model = CausalLM(source.config, left, _tokenizer(source))
    model.source = str(path)
    model.quantization = Quantization.of(weights.kept, quant, source.stored)
    return model.eval()


def _tokenizer(source: Source) -> Tokenizer | None:
    """What making it took besides, more than twice its own size, is given back."""
    tokenizer = source.tokenizer()
    cpu.trim()
    return tokenizer


class _Weights:
    """Reads a file's weights one at a time, as they are `kept`, by name."""

    def __init__(self, source: Source, wanted: np.dtype[Any] | None, quant: str | None) -> None:
        self._source = source
        self._shapes = source.config.parameter_shapes()
        self.kept = kept_from(source.stored, self._shapes, wanted, quant, source.config)
        for name, kind in source.stored.items():
            if not kind.served:
                reason = f"is of type {kind.name}, which can be inspected, not computed with"
                raise UnsupportedError(source.path, f"tensor {source.names[name][0]!r}", reason)
        exact = all(kind == Plain(DTYPES["f32"]) for kind in self.kept.values())
        self._trainable = quant is None and (wanted == DTYPES["bf16"] or exact)

    def sizes(self) -> dict[str, int]:
        """Bytes that each takes."""
        return {
            name: kept.nbytes(math.prod(shape)) if isinstance(kept, QType) else kept.nbytes(shape)
            for (name, kept), shape in zip(self.kept.items(), self._shapes.values(), strict=True)
        }

    def streamed(self) -> Take:
        """Gives the weights, those of layers that the file has quantized to be read when their turn comes.

        Raises:
            ConfigError: there are none.
        """
        layers = streamed_layers(self.kept)
        if self._source.read_into is None or not layers:
            reason = "no layer has quantized weights that could stay in the file"
            if self._source.quantized:
                reason = "another dtype expands the quantized weights, which could stay in the file otherwise"
            elif self._source.read_into is None:
                reason = "is no GGUF file; `entrenar quantize` makes one whose weights can stay there"
            raise ConfigError("stream", f"{self._source.path}: {reason}")
        stream = LayerStream(self._source.read_into)

        def take(hf: str, shape: tuple[int, ...], empty: Empty) -> Weight:
            kept = self.kept[hf]
            if hf not in layers or not isinstance(kept, QType):
                return self.read(hf, shape, empty)
            name, transform = self._source.names[hf]
            return stream.weight(layers[hf], name, kept, shape, kept.nbytes(math.prod(shape)), transform)

        return take

    def read(self, hf: str, shape: tuple[int, ...], empty: Empty) -> Weight:
        """One weight, now."""
        name, transform = self._source.names[hf]
        kept = self.kept[hf]
        weight: Weight
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
