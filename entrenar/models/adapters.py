"""A model's adapters: several on one base by name, which of them act and how much, and merging them.

Names follow PEFT. An adapter is its settings, the factors of the layers it changes, and the modules it holds whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Self, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import AdapterError, UsageError
from entrenar.models.dtype import sixteen_bit
from entrenar.models.quantization import Quantization, recorded
from entrenar.models.spec import ModelConfig
from entrenar.models.targets import held_whole, selected
from entrenar.nn.layers import Embedding, Linear
from entrenar.nn.lora import EMBEDDING, HEAD, LoraConfig
from entrenar.nn.low_rank import Factors, LowRank, LowRankTable, combined
from entrenar.nn.module import Module
from entrenar.ops.parts import Weight
from entrenar.quant import QTensor
from entrenar.tensor import Tensor

Adaptable: TypeAlias = Linear | Embedding
MAX_FACTOR = 1000  # times an adapter may count; what it does to a layer's output stays far from where f32 ends


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Attributes:
        config: its settings. factors: by path of the layer.
        saved: whole weights that stand in for the model's own while it acts, by the weight's path.
        base: how the model was quantized that it was trained on; None where that is not known.
    """

    config: LoraConfig
    factors: Mapping[str, Factors]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    base: Quantization | None = None


class Adapted(Module):
    """A model with linear layers and an embedding, and the adapters on it.

    Attributes:
        config: the `ModelConfig`. source: the file or directory it was loaded from, or None.
        quantization: of its layers. adapters: by name. training: whether dropout acts.
    """

    config: ModelConfig
    source: str | None
    quantization: Quantization

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.training = True
        self._active: dict[str, float] = {}  # name -> how much it counts
        self._own: dict[str, Weight] = {}  # the model's weights that others stand in for now

    # ---- layers and weights ---------------------------------------------------------------------------------------

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Every linear layer with its path, the head included."""
        for path, module in self.named_modules():
            if isinstance(module, Linear):
                yield path, module

    def adaptable(self) -> Iterator[tuple[str, Adaptable]]:
        """Every linear layer and the embedding, with their paths."""
        for path, module in self.named_modules():
            if isinstance(module, Linear | Embedding):
                yield path, module

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The trainable weights under Hugging Face's and PEFT's paths (``….q_proj.lora_A.weight``)."""
        for name, weight in self.named_weights():
            if isinstance(weight, Tensor) and weight.requires_grad:
                yield name, weight
        for path, module in self.adaptable():
            if module.lora is not None:
                named = ((f"{path}.{kind}", tensor) for kind, tensor in module.lora.named())
                yield from ((name, tensor) for name, tensor in named if tensor.requires_grad)

    def parameters(self) -> list[Tensor]:
        """The trainable weights."""
        return [weight for _, weight in self.named_parameters()]

    def train(self, mode: bool = True) -> Self:
        """Lets dropout act (or not); returns the model."""
        self.training = mode
        for _, linear in self.linears():
            if linear.lora is not None:
                linear.lora.training = mode
        return self

    def eval(self) -> Self:
        """The same as ``train(False)``."""
        return self.train(False)

    # ---- adding, choosing, removing -------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act now."""
        return list(self._active)

    @property
    def adapter(self) -> LoraConfig | None:
        """The settings of the adapter that acts, of the first if several do, or None."""
        return next((self.adapters[name].config for name in self._active), None)

    def add_lora(self, config: LoraConfig, seed: int = 0, name: str = "default") -> Self:
        """Freezes the weights and gives the selected layers a trainable adapter that changes nothing yet.

        It alone acts then, see `set_adapter`; returns the model.

        Raises:
            AdapterError: an adapter has this name, or no layer is selected (the error lists the names).
        """
        self._require_free(name)
        with self.disable_adapter():  # what is copied and measured are the model's own weights
            adapter = self._fresh(config, seed)
        self.attach(adapter, name)
        return self

    def _fresh(self, config: LoraConfig, seed: int) -> Adapter:
        """One that changes nothing yet."""
        factors: dict[str, Factors] = {}
        for index, (path, module) in enumerate(selected(dict(self.adaptable()), config).items()):
            out, in_ = module.weight.shape
            rank, scale = config.rank_of(path), config.scale_of(path)
            rng = np.random.Generator(np.random.PCG64([seed, index]))
            if isinstance(module, Embedding):
                factors[path] = LowRankTable.init(out, in_, rank, scale, rng)
                continue
            low = factors[path] = LowRank.init(out, in_, rank, scale, config.lora_dropout, rng)
            if config.use_dora:
                low.magnitude = Tensor(low.row_norms(module.weight).copy(), requires_grad=True)
        copies = {
            name: Tensor(_copied(weight), requires_grad=True)
            for name, weight in held_whole(self, config).items()
        }
        return Adapter(config, factors, copies, self.quantization)

    def attach(self, adapter: Adapter, name: str = "default") -> None:
        """Puts an adapter in place, freezes the model's own weights, and makes this the only one that acts.

        Raises:
            AdapterError: an adapter has this name, or is a DoRA of rows that have no direction.
        """
        self._require_free(name)
        with self.disable_adapter():  # norms are those of the model's own weights
            layers = dict(self.adaptable())
            for path, factors in adapter.factors.items():
                if isinstance(factors, LowRank) and factors.magnitude is not None:
                    _require_directions(path, factors.row_norms(layers[path].weight))
        self.set_adapter([])
        for _, weight in self.named_weights():
            if isinstance(weight, Tensor):
                weight.requires_grad = False
        self.adapters[name] = adapter
        self.set_adapter(name)

    def set_adapter(self, names: str | Iterable[str] | Mapping[str, float]) -> None:
        """Chooses which adapters act: one, several (their sum, frozen), or none for an empty list.

        Args:
            names: a mapping says how much each counts, 1.0 being as trained: ``{"style": 0.5, "facts": 1.0}``;
                from -1000 to 1000. DoRA and whole modules count 1 or not at all.

        Raises:
            AdapterError: no adapter has such a name, a factor is none, or what they change can't be added up.
        """
        if not isinstance(names, Iterable):
            raise AdapterError(f"set_adapter takes an adapter's name, a list of names or a mapping, not {names!r}")
        wanted = {}
        for name in [names] if isinstance(names, str) else names:
            self._require_known(name)
            wanted[name] = _factor(name, self.adapters[name], names[name] if isinstance(names, Mapping) else 1.0)
        layers: dict[str, list[tuple[Factors, float]]] = {}
        whole: dict[str, Tensor] = {}
        for name, factor in wanted.items():
            adapter = self.adapters[name]
            for path, factors in adapter.factors.items():
                layers.setdefault(path, []).append((factors, factor))
            for weight in adapter.saved:
                if weight in whole:
                    raise AdapterError(f"{weight} is held whole by several of {', '.join(wanted)}; set one of them")
                whole[weight] = adapter.saved[weight] if len(wanted) == 1 else adapter.saved[weight].detach()
        acting = {
            path: combined(path, terms) if len(wanted) > 1 else terms[0][0].times(terms[0][1])
            for path, terms in layers.items()
        }
        for path, module in self.adaptable():
            module.lora = acting.get(path)
        self._replace(whole)
        self._active = wanted
        self.train(self.training)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it no adapter acts."""
        before = dict(self._active)
        self.set_adapter([])
        try:
            yield
        finally:
            self.set_adapter(before)

    def delete_adapter(self, name: str) -> None:
        """Forgets an adapter."""
        self._require_known(name)
        self.set_adapter({other: factor for other, factor in self._active.items() if other != name})
        del self.adapters[name]

    def unload_adapter(self) -> None:
        """Takes all adapters off; the base model stays as it was."""
        self.set_adapter([])
        self.adapters.clear()

    def _require_known(self, name: str) -> None:
        if not isinstance(name, str) or name not in self.adapters:
            known = ", ".join(self.adapters) or "none is loaded"
            raise AdapterError(f"there is no adapter {name!r} ({known})")

    def _require_free(self, name: str) -> None:
        if not isinstance(name, str):
            raise AdapterError(f"an adapter's name is a string, not {name!r}")
        if name in self.adapters:
            raise AdapterError(
                f"the model has an adapter {name!r} already: give the new one another name, or merge_adapter() or "
                "unload_adapter() first"
            )

    def _replace(self, whole: Mapping[str, Weight]) -> None:
        """Puts whole weights in the places of the model's own, which come back where they are not replaced now."""
        modules = dict(self.named_modules())

        def put(name: str, weight: Weight) -> Weight:
            path, _, kind = name.rpartition(".")
            own: Weight = getattr(modules[path], kind)
            setattr(modules[path], kind, weight)
            return own

        for name, weight in self._own.items():
            put(name, weight)
        self._own = {name: put(name, weight) for name, weight in whole.items()}

    # ---- merging --------------------------------------------------------------------------------------------------

    def merge_adapter(self) -> dict[str, Factors]:
        """Adds what acts into the weights and takes all adapters off.

        A 16-bit weight is added to in f32 and rounded once; a packed one becomes f16, or bf16 where that is too small.
        Where head and embedding are tied and one of them changes, each becomes a weight of its own.

        Returns:
            The factors by path, for `unmerge_adapter`.

        Raises:
            AdapterError: no adapter acts.
        """
        factors = self.active_factors()
        whole = {n: weight for name in self._active for n, weight in self.adapters[name].saved.items()}
        parts = self.parts_head()
        self.unload_adapter()
        modules = dict(self.named_modules())
        if parts:
            self.config = self.config.replace(tie_word_embeddings=False)
            head = cast(Linear, modules[HEAD])
            if isinstance(head.weight, Tensor):
                head.weight = Tensor(head.weight.data.copy())
        self.quantization = Quantization()  # the sum is no model that an adapter's record could name
        for path, module in self.adaptable():
            if path in factors:
                _write(module, "weight", factors[path].merged(module.weight.dense()))
        for name, saved in whole.items():
            path, _, kind = name.rpartition(".")
            _write(modules[path], kind, saved.data)
        return factors

    def active_factors(self) -> dict[str, Factors]:
        """What acts now, by path of its layer, for merging.

        Raises:
            AdapterError: no adapter acts.
        """
        if not self._active:
            raise AdapterError("the model has no adapter")
        return {path: m.lora for path, m in self.adaptable() if m.lora is not None}

    def acting(self) -> list[Adapter]:
        """The adapters that act."""
        return [self.adapters[name] for name in self._active]

    def parts_head(self) -> bool:
        """Whether merging what acts makes a head that is tied to the embedding another weight than that."""
        outer = [(path, module) for path, module in self.adaptable() if path in (EMBEDDING, HEAD)]
        changed = any(module.lora is not None or f"{path}.weight" in self._own for path, module in outer)
        return self.config.tie_word_embeddings and changed

    def unmerge_adapter(self, config: LoraConfig, factors: Mapping[str, Factors]) -> None:
        """Subtracts what `merge_adapter` added, to within one rounding of the weights' type, and attaches it again. A
        head that was tied to the embedding stays a weight of its own.

        Raises:
            AdapterError: DoRA, which leaves no way back; or `config` is not of these factors, as none is of a sum's.
        """
        if config.use_dora or config.modules_to_save:
            raise AdapterError("DoRA and whole modules can't be taken out of the weights again; load the base anew")
        for path, one in factors.items():
            if one.rank != config.rank_of(path):
                reason = f"{path} was given factors of rank {one.rank}, and the config says {config.rank_of(path)}"
                raise AdapterError(f"{reason}: what several adapters added together is no adapter; load the base anew")
        for path, module in self.adaptable():
            if path in factors:
                back = factors[path].times(-1.0)
                _write(module, "weight", back.merged(module.weight.dense()))
        self.attach(Adapter(config, dict(factors)))

    # ---- files ----------------------------------------------------------------------------------------------------

    def save_adapter(self, path: str | PathLike[str], name: str | None = None) -> None:
        """Writes an adapter: ``*.gguf`` for llama.cpp, else a directory for PEFT.

        Args:
            name: of an adapter, which is saved as it was trained; without a name it is the one that acts, counting as
                much as it does now.

        Raises:
            AdapterError: there is none, or more than one acts and no name is given; the form can't hold it.
        """
        from entrenar.models import gguf_adapter, peft_adapter
        from entrenar.models.save import is_gguf

        factor = 1.0
        if name is None:
            if len(self._active) != 1:
                what = f"{', '.join(self._active)} act" if self._active else "the model has no adapter"
                raise AdapterError(f"save_adapter: {what}; name the one to save")
            ((name, factor),) = self._active.items()
        self._require_known(name)
        adapter, target = self.adapters[name], _path(path)
        form = gguf_adapter if is_gguf(target) else peft_adapter
        acting = {where: factors.times(factor) for where, factors in adapter.factors.items()}
        form.save(self, replace(adapter, factors=acting), target)

    def load_adapter(self, path: str | PathLike[str], trainable: bool = False, name: str = "default") -> None:
        """Attaches an adapter: a directory in PEFT's format, or a GGUF adapter. It alone acts then.

        Warns where the model is not quantized as the one that the adapter was trained on.

        Raises:
            FormatError: the files are damaged; AdapterError: the adapter is of another model or kind, or an adapter
                has this name already.
        """
        from entrenar.models import gguf_adapter, peft_adapter

        self._require_free(name)
        source = _path(path)
        form = gguf_adapter if source.is_file() else peft_adapter
        with self.disable_adapter():  # its shapes and copies are compared with the model's own weights
            adapter = form.load(self, source, trainable)
            base = recorded(source)
        self.attach(replace(adapter, base=self.quantization if trainable else base), name)
        if (unlike := self.quantization.unlike(base)) is not None:
            warnings.warn(f"{path}: {unlike}", stacklevel=2)


def _factor(name: str, adapter: Adapter, factor: float) -> float:
    """How much an adapter is to count, if it can."""
    number = isinstance(factor, int | float | np.integer | np.floating) and not isinstance(factor, bool)
    if not number or not abs(factor) <= MAX_FACTOR:
        raise AdapterError(
            f"adapter {name!r} can't count {factor!r} times; give a number from -{MAX_FACTOR} to {MAX_FACTOR}"
        )
    if factor != 1 and (adapter.config.use_dora or adapter.saved):
        raise AdapterError(
            f"adapter {name!r} counts 1 or not at all, not {factor}: DoRA's magnitudes and whole modules are no "
            "changes that could be multiplied; give it 1.0 or leave it out"
        )
    return float(factor)


def _path(path: str | PathLike[str]) -> Path:
    if not isinstance(path, str | PathLike):
        raise UsageError(f"the path of an adapter is a string or a pathlib.Path, not {path!r}")
    return Path(path)


def _write(module: Module, kind: str, values: NDArray[np.float32]) -> None:
    """Gives a weight of the module other values; a packed one becomes one of 16 bits."""
    weight: Weight = getattr(module, kind)
    if isinstance(weight, QTensor):
        setattr(module, kind, Tensor(sixteen_bit(values)))
        return
    weight.data[...] = values
    weight.version += 1


def _require_directions(path: str, norms: NDArray[np.float32]) -> None:
    """Refuses rows of the length 0, by which DoRA would divide."""
    zeros = np.flatnonzero(norms == 0)
    if zeros.size:
        raise AdapterError(
            f"{path}: rows of its weight are all 0, {zeros.size} of {norms.size}, the first is {zeros[0]}; DoRA needs "
            "their direction: leave it out of target_modules, or train without DoRA"
        )


def _copied(weight: Weight) -> NDArray[np.float32]:
    """Its values as an array of their own, made once."""
    return weight.data.astype(np.float32) if isinstance(weight, Tensor) else weight.dense()
