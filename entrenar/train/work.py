"""`Work`: a model, whether it exists or not, and what is to be done with it: sizes, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from entrenar.models.dtype import Compute
from entrenar.models.spec import ModelConfig
from entrenar.models.storage import qtype_of
from entrenar.models.stream import StreamedQTensor, resident, streamed_layers
from entrenar.models.targets import selected, whole
from entrenar.nn.lora import EMBEDDING, HEAD, LoraConfig
from entrenar.quant import QType
from entrenar.train.config import TrainConfig

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM


@dataclass(frozen=True)
class Work:
    """A model and what of it is trained, and how.

    Attributes:
        types: the type that each of the model's own weights has in memory, by name. adapter: None where all of them are
            trained.
        streamed: whether layers' quantized weights stay in the file; None where there is no such file.
        tokenizer: whether there is one in memory too.
    """

    config: ModelConfig
    types: Mapping[str, QType]
    compute: Compute
    adapter: LoraConfig | None
    training: TrainConfig
    streamed: bool | None = None
    tokenizer: bool = False

    @classmethod
    def of(cls, model: CausalLM, training: TrainConfig) -> Work:
        """The work of training a model that is loaded."""
        with model.disable_adapter():  # its own weights, not those that an adapter holds whole
            types = {name: qtype_of(weight) for name, weight in model.named_weights()}
            streamed = any(isinstance(weight, StreamedQTensor) for _, weight in model.named_weights()) or None
        tokenizer = model.tokenizer is not None
        return cls(model.config, types, model.compute, model.adapter, training, streamed, tokenizer)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the model's own weights."""
        return self.config.parameter_shapes()

    @cached_property
    def elements(self) -> dict[str, int]:
        """Of each of the model's own weights."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes of the model's own weights, by name."""
        return {name: self.types[name].nbytes(count) for name, count in self.elements.items()}

    @cached_property
    def resident(self) -> dict[str, int]:
        """Bytes of those in memory, by name, and of the room for streamed layers."""
        return resident(self.weights, streamed_layers(self.types) if self.streamed else {})

    @cached_property
    def adapters(self) -> dict[str, tuple[int, int, int]]:
        """Rank, input and output size of each layer's adapter, by path.

        Raises:
            AdapterError: the adapter's settings don't fit the model, see `entrenar.models.targets`.
        """
        if self.adapter is None:
            return {}
        matrices = {path: max(weights.values(), key=len) for path, weights in self._modules().items()}
        chosen = selected({path: shape for path, shape in matrices.items() if len(shape) == 2}, self.adapter)
        return {path: (self.adapter.rank_of(path), in_, out) for path, (out, in_) in chosen.items()}

    @cached_property
    def trained(self) -> dict[str, int]:
        """Number of trained elements, by weight's name or adapter's path.

        Raises:
            AdapterError: see `adapters`.
        """
        if self.adapter is None:
            return self.elements
        dora = self.adapter.use_dora
        factors = {path: rank * (in_ + out) + out * dora for path, (rank, in_, out) in self.adapters.items()}
        return factors | {name: math.prod(shape) for name, shape in whole(self._modules(), self.adapter).items()}

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.training.batch_size * self.training.seq_len

    def _modules(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Names and shapes of the weights of each module that has some, by path; a tied head by its own as well."""
        modules: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in self.shapes.items():
            modules.setdefault(name.rpartition(".")[0], {})[name] = shape
        if self.config.tie_word_embeddings:
            modules[HEAD] = {f"{HEAD}.weight": self.shapes[f"{EMBEDDING}.weight"]}
        return modules
