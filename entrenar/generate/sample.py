"""From logits to a token: repetition penalty, temperature, top-k, top-p, min-p, then a draw. f64 throughout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import ConfigError, NonFiniteError


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen, under Hugging Face's GenerationConfig names.

    Args:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it.
        top_k: keep the k likeliest (0: all). top_p: keep the fewest whose probabilities reach p (arXiv 1904.09751).
        min_p: keep those at least p times as likely as the likeliest (arXiv 2407.01082).
        repetition_penalty: divides (multiplies, where negative) the logits of tokens seen (arXiv 1909.05858).
        seed: of the draw; None takes one from the operating system.

    Raises:
        ConfigError: a value is impossible.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ConfigError(name, f"{value!r:.80} is not a number")
        checks = {
            "temperature": (self.temperature >= 0 and math.isfinite(self.temperature), "a number ≥ 0"),
            "top_k": (isinstance(self.top_k, int) and self.top_k >= 0, "a whole number ≥ 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1)"),
            "repetition_penalty": (
                self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
                "a number > 0",
            ),
            "seed": (self.seed is None or (isinstance(self.seed, int) and self.seed >= 0), "a whole number ≥ 0"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ConfigError(name, f"{getattr(self, name)!r} is not {expected}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SamplingConfig:
        """From keyword arguments; an unknown one is a ConfigError that lists the names."""
        names = [f.name for f in fields(cls)]
        for key in values:
            if key not in names:
                raise ConfigError(key, f"is not a sampling setting (those are {', '.join(names)})")
        return cls(**values)


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens."""

    def __init__(self, config: SamplingConfig) -> None:
        self._config = config
        self._rng = np.random.default_rng(config.seed)

    def __call__(self, logits: NDArray[np.float32], seen: Sequence[int]) -> int:
        """The next token id, from logits (vocab,) after the tokens `seen`.

        Raises:
            NonFiniteError: a logit is NaN or +inf: the weights are damaged or the model overflowed.
        """
        c = self._config
        if np.isnan(logits).any() or np.isposinf(logits).any():
            raise NonFiniteError("generate: the model's logits hold NaN or infinity; its weights are damaged")
        scores = logits.astype(np.float64)
        if c.repetition_penalty != 1.0 and seen:
            ids = np.unique(np.asarray(seen))
            s = scores[ids]
            scores[ids] = np.where(s > 0, s / c.repetition_penalty, s * c.repetition_penalty)
        if c.temperature == 0:
            return int(scores.argmax())
        with np.errstate(over="ignore"):  # to -inf, at the smallest temperatures
            return self._draw((scores - scores.max()) / c.temperature)

    def _draw(self, scores: NDArray[np.float64]) -> int:
        c = self._config
        order = np.argsort(-scores, kind="stable")
        if c.top_k:
            order = order[: c.top_k]
        p = np.exp(scores[order] - scores[order[0]])  # relative to the likeliest, descending
        p /= p.sum()
        if c.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(p), c.top_p)) + 1
            order, p = order[:keep], p[:keep]
        if c.min_p > 0:
            keep = int(np.count_nonzero(p >= c.min_p * p[0]))
            order, p = order[:keep], p[:keep]
        cumulative = np.cumsum(p)
        at = np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right")
        return int(order[min(int(at), len(order) - 1)])
