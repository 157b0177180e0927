"""LoRA (arXiv 2106.09685): which layers get an adapter, with which rank and scale, and the two factors themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from entrenar import ops
from entrenar.errors import ConfigError
from entrenar.nn.pattern import Endings, compiled, endings
from entrenar.tensor import Tensor

MAX_RANK = 512
MAX_ALPHA = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class LoraConfig:
    """An adapter's settings, under PEFT's names and with PEFT's meanings.

    Args:
        r: rank, 1 to 512. lora_alpha: the product is scaled by alpha/r, or alpha/√r with `use_rslora`.
        lora_dropout: chance that an element of the adapter's input is dropped while training.
        target_modules: ``"all-linear"`` (all but the head), a list of module names or path endings, a regular
            expression that must match the whole path, or None for q_proj and v_proj (qkv_proj where fused).
        rank_pattern, alpha_pattern: path ending or regular expression -> value that replaces r or lora_alpha there;
            the expressions are simple ones, see `entrenar.nn.pattern`.

    Raises:
        ConfigError: a value is impossible.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] | list[str] | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
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
        if not isinstance(self.use_rslora, bool):
            raise ConfigError("use_rslora", f"{self.use_rslora!r} is neither true nor false")
        targets = self.target_modules
        if isinstance(targets, str):
            compiled("target_modules", targets)
        elif targets is not None:
            if not isinstance(targets, list | tuple | set) or not all(isinstance(t, str) and t for t in targets):
                raise ConfigError("target_modules", f"{targets!r} is neither a pattern nor a list of names")
            if not targets:
                raise ConfigError("target_modules", "is empty; name modules, or say 'all-linear'")
            object.__setattr__(self, "target_modules", tuple(targets))
        object.__setattr__(self, "_ranks", endings("rank_pattern", self.rank_pattern))
        object.__setattr__(self, "_alphas", endings("alpha_pattern", self.alpha_pattern))

    def selects(self, path: str) -> bool:
        """Whether the linear layer at this module path gets an adapter."""
        targets = self.target_modules
        if targets is None:
            return path.endswith((".q_proj", ".v_proj", ".qkv_proj"))
        if targets == "all-linear":
            return path != "lm_head"
        if isinstance(targets, str):
            return re.fullmatch(targets, path) is not None
        return any(path == t or path.endswith(f".{t}") for t in targets)

    def rank_of(self, path: str) -> int:
        return int(_matching(self._ranks, path, self.r))

    def scale_of(self, path: str) -> float:
        alpha, rank = _matching(self._alphas, path, self.lora_alpha), self.rank_of(path)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _matching(patterns: Endings, path: str, default: float) -> float:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns if pattern.match(path)), default)


class LowRank:
    """The adapter of one linear layer: scale · (dropout(x) · Aᵀ) · Bᵀ, with A (r, in) and B (out, r) in f32."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        self.a = a
        self.b = b
        self.scale = scale
        self.dropout = dropout
        self.training = True

    @classmethod
    def init(cls, out: int, in_: int, rank: int, scale: float, dropout: float, rng: np.random.Generator) -> LowRank:
        """A uniform in ±1/√in (Kaiming with a = √5, as PEFT), B zero: the layer starts as it was."""
        a = (rng.random((rank, in_), dtype=np.float32) * 2 - 1) * np.float32(1 / math.sqrt(in_))
        b = np.zeros((out, rank), np.float32)
        return cls(Tensor(a, requires_grad=True), Tensor(b, requires_grad=True), scale, dropout)

    def factors(self) -> ops.Lora:
        return ops.Lora(self.a, self.b, self.scale)

    @property
    def active_dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def delta(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """scale · B·A, (out, in) f32: what merging adds to the weight."""
        with_scale: np.ndarray[Any, np.dtype[np.float32]] = self.b.backend.matmul(self.b.data, self.a.data)
        with_scale *= np.float32(self.scale)
        return with_scale
