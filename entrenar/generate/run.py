"""The loop: prefill, then one token at a time, with stop strings and text that never breaks a character."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import ConfigError, UsageError
from entrenar.generate.sample import Sampler, SamplingConfig
from entrenar.nn.cache import KVCache
from entrenar.tokenizer import Tokenizer

ROOM = 1024  # new tokens that the cache has room for before it grows


class LanguageModel(Protocol):
    """What the loop needs of a model."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def config(self) -> Any: ...
    @property
    def training(self) -> bool: ...
    def train(self, mode: bool = True) -> Any: ...
    def new_cache(self, capacity: int) -> KVCache: ...
    def next_logits(self, ids: NDArray[np.int64], cache: KVCache) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Generation:
    """What came out.

    Attributes:
        text: the new text (empty without a tokenizer). ids: the new token ids, an end token included.
        prompt_ids: what the model read. finish_reason: ``stop`` (an end token or a stop string) or ``length``.
    """

    text: str
    ids: list[int]
    prompt_ids: list[int]
    finish_reason: Literal["stop", "length"]


class GenerationStream(Iterator[str]):
    """Yields pieces of text; `result` is set when it ends."""

    def __init__(self, pieces: Iterator[str | Generation]) -> None:
        self._pieces = pieces
        self.result: Generation | None = None

    def __next__(self) -> str:
        piece = next(self._pieces)
        if isinstance(piece, Generation):
            self.result = piece
            return next(self)
        return piece

    def drain(self) -> Generation:
        """Runs to the end and returns the result."""
        for _ in self:
            pass
        assert self.result is not None
        return self.result


def generate(
    model: LanguageModel,
    prompt: str | Sequence[int] | NDArray[np.integer[Any]],
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop: tuple[str, ...] = (),
) -> GenerationStream:
    """Continues `prompt` by at most `max_new_tokens` tokens; arguments are checked before the first token.

    A text that outgrows the model's context goes on from the last half of it: beyond the positions that it has
    learned, a model writes noise.

    Raises:
        UsageError: text without a tokenizer, an empty prompt where the model has no begin token, a prompt beyond the
            context, an empty stop string.
        ConfigError: `max_new_tokens` is below 1.
    """
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError("max_new_tokens", f"{max_new_tokens!r} is not a whole number ≥ 1")
    if any(not s for s in stop):
        raise ConfigError("stop", "an empty stop string would end every text at once")
    if stop and model.tokenizer is None:
        raise UsageError("stop strings need a tokenizer, and this model has none")
    ids = _prompt_ids(model, prompt)
    return GenerationStream(_run(model, ids, max_new_tokens, Sampler(sampling), stop))


def _prompt_ids(model: LanguageModel, prompt: str | Sequence[int] | NDArray[np.integer[Any]]) -> list[int]:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise UsageError("a prompt in words needs a tokenizer, and this model has none; pass token ids")
        ids = model.tokenizer.encode_prompt(prompt)
        if not ids and model.tokenizer.bos_id is not None:
            ids = [model.tokenizer.bos_id]
    else:
        ids = [int(i) for i in prompt]
    if not ids:
        raise UsageError("the prompt is empty and the model has no begin-of-text token; give it some text")
    context = model.config.max_position_embeddings
    if len(ids) > context:
        raise UsageError(f"the prompt has {len(ids):,} tokens and the model's context holds {context:,}; shorten it")
    return ids


def _end_ids(model: LanguageModel) -> frozenset[int]:
    ends = set(model.config.eos_token_ids)
    if model.tokenizer is not None:
        ends.update(model.tokenizer.eos_ids)
    return frozenset(ends)


def _run(
    model: LanguageModel, prompt_ids: list[int], budget: int, sampler: Sampler, stop: tuple[str, ...]
) -> Iterator[str | Generation]:
    """Yields text pieces, then the `Generation`; dropout does not act meanwhile."""
    was_training = model.training
    model.train(False)
    try:
        yield from _tokens(model, prompt_ids, budget, sampler, stop)
    finally:
        model.train(was_training)


def _tokens(
    model: LanguageModel, prompt_ids: list[int], budget: int, sampler: Sampler, stop: tuple[str, ...]
) -> Iterator[str | Generation]:
    ends, context = _end_ids(model), model.config.max_position_embeddings
    cache = model.new_cache(len(prompt_ids) + min(budget, ROOM))
    decoder = None if model.tokenizer is None else model.tokenizer.stream(prefix=prompt_ids)
    holder = StopStrings(stop)
    new: list[int] = []
    given: list[str] = []
    reason: Literal["stop", "length"] = "length"
    step = np.array([prompt_ids], np.int64)
    while len(new) < budget:
        token = sampler(model.next_logits(step, cache), prompt_ids + new)
        new.append(token)
        if token in ends:
            reason = "stop"
            break
        if decoder is not None:
            piece = holder.push(decoder.push(token))
            if piece:
                given.append(piece)
                yield piece
            if holder.found:
                reason = "stop"
                break
        read = [token]
        if cache.length >= context:
            read = (prompt_ids + new)[-max(1, context // 2) :]
            cache = model.new_cache(len(read) + min(budget, ROOM))
        step = np.array([read], np.int64)
    if decoder is not None and not holder.found:
        tail = holder.push(decoder.finish()) + holder.finish()
        if tail:
            given.append(tail)
            yield tail
    yield Generation("".join(given), new, prompt_ids, reason)


class StopStrings:
    """Passes text through up to the first stop string, holding back an end that may be the start of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is now certain to come before any stop string."""
        if self.found:
            return ""
        self._held += text
        at = min((i for s in self._stop if (i := self._held.find(s)) >= 0), default=-1)
        if at >= 0:
            self.found = True
            self._held, out = "", self._held[:at]
            return out
        keep = max((n for s in self._stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        cut = len(self._held) - keep
        self._held, out = self._held[cut:], self._held[:cut]
        return out

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        out, self._held = self._held, ""
        return out
