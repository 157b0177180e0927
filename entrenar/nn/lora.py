"""LoRA (arXiv 2106.09685) and its variants: which layers get an adapter, with which rank and scale."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from entrenar.errors import ConfigError
from entrenar.nn.pattern import Endings, bounded, compiled, endings

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"  # paths of the two modules that "all-linear" leaves alone
MAX_RANK = 512
MAX_ALPHA = float(np.finfo(np.float32).max)

_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # the number of the layer that a path is in, where PEFT looks for it


@dataclass(frozen=True)
class LoraConfig:
    """An adapter's settings, under PEFT's names and with PEFT's meanings.

    Args:
        r: rank, 1 to 512. lora_alpha: the product is scaled by alpha/r, or alpha/√r with `use_rslora`.
        lora_dropout: chance that an element of the adapter's input is dropped while training.
        target_modules: ``"all-linear"`` (all but the head), a list of module names or path endings, a regular
            expression that must match the whole path, or None for q_proj and v_proj (qkv_proj where fused). The
            embedding, embed_tokens, can have an adapter as well.
        use_rslora: rank-stabilized LoRA (arXiv 2312.03732). use_dora: DoRA, see `entrenar.nn.dora`.
        modules_to_save: names or path endings of modules that are trained and saved whole, with all they consist of,
            such as embed_tokens, lm_head or a norm. None of these gets an adapter.
        rank_pattern, alpha_pattern: path ending or regular expression -> value that replaces r or lora_alpha there;
            the expressions are simple ones, see `entrenar.nn.pattern`.
        exclude_modules: names, path endings or an expression, as in target_modules, of what gets no adapter.
        layers_to_transform: the number of a layer, or a list of them, beside a list of target_modules: only layers
            of these numbers get adapters, and what is named in full.

    Raises:
        ConfigError: a value is impossible.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] | list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] | list[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | tuple[str, ...] | list[str] | None = None
    layers_to_transform: int | tuple[int, ...] | list[int] | None = None
    _layers: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _ranks: Endings = field(init=False, repr=False, compare=False)  # the two patterns, compiled
    _alphas: Endings = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
                raise ConfigError(name, "is not a table of patterns and numbers")
        for name, rank in [("r", self.r), *((f"rank_pattern.{k}", v) for k, v in self.rank_pattern.items())]:
            if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
                raise ConfigError(name, f"{rank!r} is not a rank from 1 to {MAX_RANK}")
        alphas = [("lora_alpha", self.lora_alpha), *((f"alpha_pattern.{k}", v) for k, v in self.alpha_pattern.items())]
        for name, alpha in alphas:
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= MAX_ALPHA:
                raise ConfigError(name, f"{alpha!r} is not a positive number (of float32)")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise ConfigError("lora_dropout", f"{self.lora_dropout!r} is not in [0, 1)")
        for name, switch in (("use_rslora", self.use_rslora), ("use_dora", self.use_dora)):
            if not isinstance(switch, bool):
                raise ConfigError(name, f"{switch!r} is neither true nor false")
        if self.modules_to_save is not None:
            object.__setattr__(self, "modules_to_save", _names("modules_to_save", self.modules_to_save) or None)
        for name in ("target_modules", "exclude_modules"):
            wanted = getattr(self, name)
            if isinstance(wanted, str):
                compiled(name, wanted)
            elif wanted is not None:
                object.__setattr__(self, name, _names(name, wanted))
        if self.target_modules == ():
            raise ConfigError("target_modules", "is empty; name modules, or say 'all-linear'")
        object.__setattr__(self, "_layers", _numbers(self.layers_to_transform))
        if self._layers and isinstance(self.target_modules, str):
            raise ConfigError("layers_to_transform", "goes with a list of target_modules, not with a pattern")
        object.__setattr__(self, "_ranks", endings("rank_pattern", self.rank_pattern))
        object.__setattr__(self, "_alphas", endings("alpha_pattern", self.alpha_pattern))

    def selects(self, path: str) -> bool:
        """Whether the linear layer or embedding at this module path gets an adapter."""
        if self.saves(path) or (self.exclude_modules and _named(path, self.exclude_modules)):
            return False
        if self.target_modules == "all-linear":
            return path not in (HEAD, EMBEDDING)
        targets = ("q_proj", "v_proj", "qkv_proj") if self.target_modules is None else self.target_modules
        if self._layers and path not in targets:  # what is named in full has no need of a number, such as lm_head
            layer = _LAYER.match(path)
            if layer is None or int(layer[1]) not in self._layers:
                return False
        return _named(path, targets)

    def saves(self, path: str) -> bool:
        """Whether the module at this path is trained and saved whole, by itself or as a part of another."""
        return any(within(path, name) for name in self.modules_to_save or ())

    @property
    def bounded(self) -> bool:
        """Whether `selects` takes bounded time: a pattern could take forever, see `entrenar.nn.pattern`."""
        return all(bounded(wanted) for wanted in (self.target_modules, self.exclude_modules) if isinstance(wanted, str))

    def rank_of(self, path: str) -> int:
        return int(_matching(self._ranks, path, self.r))

    def scale_of(self, path: str) -> float:
        alpha, rank = _matching(self._alphas, path, self.lora_alpha), self.rank_of(path)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _matching(patterns: Endings, path: str, default: float) -> float:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def within(path: str, name: str) -> bool:
    """Whether a module is called so, or is part of one that is."""
    return f".{name}." in f".{path}."


def _named(path: str, wanted: str | Iterable[str]) -> bool:
    """Whether a pattern matches the whole path, or the path is one of the names, or ends in one from a dot on."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def _names(field: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | set) or not all(isinstance(name, str) and name for name in value):
        raise ConfigError(field, f"{value!r} is no list of names" + " or pattern" * (field != "modules_to_save"))
    return tuple(value)


def _numbers(layers: object) -> tuple[int, ...]:
    """The layers that layers_to_transform means; none are all."""
    numbers = () if layers is None else layers if isinstance(layers, list | tuple) else (layers,)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ConfigError("layers_to_transform", f"{layers!r} is no layer's number, nor a list of them")
    return tuple(numbers)
