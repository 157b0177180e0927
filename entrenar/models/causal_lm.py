"""`CausalLM`: a decoder with its head, its tokenizer and, where one is attached, its adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from entrenar import ops
from entrenar.errors import AdapterError, DataError, DTypeError, ShapeError
from entrenar.generate import Generation, GenerationStream, SamplingConfig, generate
from entrenar.models import memory
from entrenar.models.adapters import Adapted
from entrenar.models.build import build
from entrenar.models.dtype import DTYPES, Compute, DTypeName, StorageName, fresh, natural
from entrenar.models.mixture import quant_named
from entrenar.models.quantization import Quantization
from entrenar.models.spec import ModelConfig, spec_of
from entrenar.models.storage import Empty, kept_as, qtype_of
from entrenar.nn.cache import KVCache
from entrenar.nn.layers import dropout_of, has_magnitude
from entrenar.ops.parts import Weight
from entrenar.tensor import Tensor, no_grad
from entrenar.tokenizer import Tokenizer

if TYPE_CHECKING:
    from entrenar.models.save import Written

DRAWN = 1 << 20  # random numbers drawn at a time
IGNORE = -100  # a label that does not count, as in Hugging Face's trainers


class CausalLM(Adapted):
    """A language model of the Llama family.

    Weights are `Tensor`s and `QTensor`s under Hugging Face's module paths. Those in f32 are trainable until `add_lora`
    freezes them, those in bf16 where bf16 was asked for; others are frozen. Matrices may be f32, f16, bf16 or
    `QTensor`s, which stay packed; norms and biases are always f32.

    Attributes:
        compute: "f32" or "bf16", the type of what flows from layer to layer; sums, losses and all gradients of weights
            are f32 in any case.
        logits_rows: positions whose logits `loss` holds at once, None for as many as are fastest.
        config: the `ModelConfig`. tokenizer: the `Tokenizer`, or None. adapter: the acting `LoraConfig`, or None.
        source: the file or directory it was loaded from, or None. quantization: of its layers, see `Quantization`.
    """

    def __init__(self, config: ModelConfig, weights: Any, tokenizer: Tokenizer | None = None) -> None:
        """`weights` gives each weight as a Tensor, see `build`; use `from_config` or `entrenar.load` instead."""
        super().__init__()
        self.model, self.lm_head = build(spec_of(config), weights)
        self.config = config
        self.tokenizer = tokenizer
        self.source: str | None = None
        self.quantization = Quantization()
        self.logits_rows: int | None = None
        self.compute = natural(qtype_of(weight) for _, weight in self.named_weights())

    @property
    def compute(self) -> Compute:
        return self.model.compute

    @compute.setter
    def compute(self, value: Compute) -> None:
        self.model.compute = value

    @classmethod
    def from_config(
        cls, config: ModelConfig, seed: int = 0, dtype: DTypeName = "auto", quant: str | None = None
    ) -> CausalLM:
        """A model with random weights, made one tensor at a time.

        Matrices are normal with ``config.initializer_range`` as standard deviation, divided by √(2·layers) where a
        product ends in the residual stream (GPT-2's rule); norms are one, biases zero. The values depend on `seed`
        and on each weight's place only.

        Args:
            quant: type that the linear layers' matrices are quantized to, but the head; see `entrenar.load`.
            dtype: ``"mixed"`` keeps the matrices in f32 and computes in bf16; ``"f32"`` computes in f32 as well;
                ``"auto"`` is mixed where the CPU multiplies bf16 faster, else f32. ``"bf16"`` is trained with
                stochastic rounding and computes in bf16, ``"f16"`` is frozen. With `quant` all weights are frozen, and
                ``"auto"`` keeps the other matrices in bf16.

        Raises:
            MemoryLimitError: the weights would not fit; ConfigError: `dtype` or `quant` is not served.
        """
        policy = fresh(dtype, quant)
        storage = policy.storage or DTYPES["f32"]
        shapes = config.parameter_shapes()
        kept = {name: kept_as(name, shape, storage, quant, config) for name, shape in shapes.items()}
        memory.require(
            {name: kept[name].nbytes(shape) for name, shape in shapes.items()},
            f"a model of {config.num_parameters():,} parameters in {quant or storage}",
        )
        places = {name: i for i, name in enumerate(shapes)}
        residual = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)

        trainable = quant is None and storage != np.float16

        def random(name: str, shape: tuple[int, ...], empty: Empty) -> Weight:
            if len(shape) == 1:
                values = empty(DTYPES["f32"])
                values.fill(0.0 if name.endswith(".bias") else 1.0)
                return Tensor(values, requires_grad=trainable)
            values = kept[name].room(shape, empty)
            rng = np.random.Generator(np.random.PCG64([seed, places[name]]))
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            deviation = np.float32(residual if into_residual else config.initializer_range)
            for part in np.array_split(values, -(-values.size // DRAWN)):
                part[...] = rng.standard_normal(part.shape, np.float32) * deviation
            return kept[name].weight(values, trainable)

        model = cls(config, random)
        model.quantization = Quantization.of(kept, quant and quant_named(quant), {})
        model.compute = policy.compute or model.compute
        return model

    def __call__(self, ids: ArrayLike) -> Tensor:
        """Logits (B, T, vocab) f32 of token ids (B, T), or (T,) for a batch of one."""
        return self.lm_head(ops.cast(self.model(as_ids(ids)), "f32"))

    def loss(
        self,
        ids: ArrayLike,
        labels: ArrayLike | None = None,
        denominator: float | None = None,
        starts: NDArray[np.int32] | None = None,
    ) -> Tensor:
        """Cross-entropy of each next token, in nats a token, as a scalar.

        Args:
            ids: (B, T) token ids. labels: (B, T), by default `ids`: position t's label is what position t - 1 should
                predict (the shift happens here), and -100 does not count.
            denominator: divides the sum of losses; by default the number of labels that count.
            starts: (B, T) int32, the first position each token may see (packed sequences).

        Raises:
            DataError: no label counts. ShapeError: `labels` has another shape than `ids`.
        """
        ids = as_ids(ids)
        labels = ids if labels is None else as_ids(labels)
        if labels.shape != ids.shape:
            raise ShapeError(f"loss: labels {labels.shape} and ids {ids.shape} differ")
        batch, tokens = ids.shape
        targets = np.full((batch, tokens), IGNORE, np.int64)
        targets[:, :-1] = labels[:, 1:]
        if np.all(targets == IGNORE):
            raise DataError("loss: every label is masked (-100) or the sequences have a single token; nothing to learn")
        hidden = self.model(ids, starts)
        if dropout_of([self.lm_head]) or has_magnitude(self.lm_head):  # of the head itself: no part of the fused loss
            return ops.cross_entropy(ops.cast(self.lm_head(hidden), "f32"), targets, IGNORE, denominator)
        return ops.linear_cross_entropy(
            hidden, self.lm_head.part(), targets, IGNORE, denominator, at_once=self.logits_rows
        )

    # ---- files and text -------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | PathLike[str],
        quant: str | None = None,
        dtype: StorageName = "auto",
        merge: bool = False,
        written: Written | None = None,
    ) -> None:
        """Writes the model: ``*.gguf``, in any case, as GGUF, anything else as a Hugging Face directory. Atomic.

        Args:
            quant: type that a GGUF file's matrices are quantized to, such as ``"q4_k"``; embedding and head get
                ``q6_k`` (``q8_0`` beside ``q8_0``; an untied embedding has the layers' type in a mixture), and rows
                that do not fill a type's blocks what llama.cpp takes.
            dtype: type of the matrices in the file; ``"auto"`` keeps each as it is in memory, packed ones in a GGUF
                file as well.
            merge: with the acting adapters in the weights, layer by layer on the way; the model stays as it is.
            written: for a report on merging, see `entrenar.models.save.Content`.

        Raises:
            AdapterError: an adapter acts, and `merge` is not set; ConfigError: `dtype` or `quant` is not served, both
                are given, or a weight is too large for f16. UsageError: a name such as m.safetensors, which is neither.
        """
        from entrenar.models.save import requested, save

        if self.adapter is not None and not merge:
            raise AdapterError("an adapter is attached: merge_adapter() first, or save_adapter() to keep it apart")
        factors = self.active_factors() if merge else None
        save(self, path, replace(requested(path, quant, dtype), factors=factors, written=written))

    def next_logits(self, ids: NDArray[np.int64], cache: KVCache) -> NDArray[np.float32]:
        """Logits (vocab,) after the last of ids (1, T), which follow what the cache holds and are added to it."""
        with no_grad():
            hidden = self.model(ids, cache=cache)
            last = Tensor(hidden.data[:, -1])
            logits: NDArray[np.float32] = self.lm_head(ops.cast(last, "f32")).data[0]
        return logits

    def new_cache(self, capacity: int) -> KVCache:
        """An empty cache for one sequence, with room for `capacity` tokens before it has to grow."""
        c = self.config
        return KVCache(c.num_hidden_layers, 1, capacity, c.kv_heads, c.head_size, DTYPES[self.compute])

    def generate(
        self,
        prompt: str | Sequence[int] | NDArray[np.integer[Any]],
        max_new_tokens: int = 128,
        *,
        stop: str | Iterable[str] = (),
        stream: bool = False,
        **sampling: Any,
    ) -> Generation | GenerationStream:
        """Continues a prompt (text, or token ids as they are).

        Args:
            stop: strings that end the text, themselves left out. stream: yield pieces of text as they come instead.
            sampling: fields of `generate.SamplingConfig`: temperature, top_k, top_p, min_p, repetition_penalty, seed.

        Returns:
            A `Generation` with ``.text`` and ``.ids`` (the new tokens); with `stream`, an iterator of text whose
            ``.result`` is that, once it ends.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        pieces = generate(self, prompt, max_new_tokens, SamplingConfig.of(sampling), stops)
        return pieces if stream else pieces.drain()


def count_parameters(model: CausalLM | ModelConfig, trainable_only: bool = True) -> int:
    """Number of trainable weights of a model (all with ``trainable_only=False``), or of all weights of a config."""
    if isinstance(model, ModelConfig):
        return model.num_parameters()
    if trainable_only:
        return sum(weight.size for weight in model.parameters())
    added = sum(t.data.size for _, m in model.adaptable() if m.lora is not None for _, t in m.lora.named())
    return sum(weight.size for _, weight in model.named_weights()) + added


def as_ids(ids: ArrayLike) -> NDArray[np.int64]:
    """Token ids as a (B, T) int64 array; one sequence becomes a batch of one.

    Raises:
        DTypeError: not integers; ShapeError: empty, or of other than one or two dimensions.
    """
    array = np.asarray(ids)
    if array.size == 0 or array.ndim not in (1, 2):
        raise ShapeError(f"token ids have shape {array.shape}; expected (T,) or (B, T) with at least one token")
    if array.dtype.kind not in "iu":
        raise DTypeError(f"token ids are {array.dtype}; expected integers")
    return np.atleast_2d(array).astype(np.int64, copy=False)
