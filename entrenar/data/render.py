"""From a record to token ids and labels: what the model sees, and which tokens it is to learn.

| record | text | learned where the prompt is masked |
|---|---|---|
| text, plain text | BOS (where the model wants it), text, EOS | all of it |
| prompt and completion | BOS, prompt, completion, EOS | completion and EOS |
| conversation | the model's chat template, or the default one | assistant turns with what ends them |

The prompt is tokenized alone, exactly as when it is later given to the model. Assistant turns are found by
rendering the conversation up to each of them. A template that prints today's date gets a fixed one, so that a
run can be repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
import numpy.typing as npt

from entrenar.data.records import Record
from entrenar.errors import DataError, TokenizerError
from entrenar.tokenizer import Tokenizer

IGNORE = -100
TEMPLATE_DATE = datetime(2024, 7, 26)  # what Llama 3's own template prints when it is told nothing

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence. The model predicts each token from those before it, so `labels[0]` is never used.

    Attributes:
        ids: (T,) int32. labels: (T,) int32, the ids or -100 where nothing is learned.
        where: "file:line". truncated: whether tokens were cut off at the end.
    """

    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    where: str
    truncated: bool = False


def render(record: Record, tokenizer: Tokenizer, seq_len: int | None = None, mask_prompt: bool = True) -> Sample:
    """`record` as at most `seq_len` tokens.

    Raises DataError naming the record where no token is left to learn, or where the chat template refuses it.
    """
    try:
        ids, learned = _tokens(record, tokenizer, mask_prompt)
    except TokenizerError as e:
        raise DataError(f"{record.where}: {e}") from e
    tokens = np.array(ids, np.int32)
    labels = np.where(learned, tokens, IGNORE).astype(np.int32)
    if not (labels[1:seq_len] != IGNORE).any():
        raise DataError(f"{record.where}: {_nothing_learned(labels, seq_len)}")
    cut = seq_len is not None and len(ids) > seq_len
    return Sample(tokens[:seq_len], labels[:seq_len], record.where, cut)


def _nothing_learned(labels: npt.NDArray[np.int32], seq_len: int | None) -> str:
    learned = np.flatnonzero(labels[1:] != IGNORE)
    if len(learned):
        begin = learned[0] + 1
        return f"nothing to learn in the first {seq_len} tokens, the answer begins at {begin}; raise seq_len"
    return "nothing to learn: the completion, the text or every assistant turn is empty or masked"


def _tokens(record: Record, tokenizer: Tokenizer, mask_prompt: bool) -> tuple[list[int], list[bool]]:
    """Ids, and for each whether it is learned."""
    if record.messages:
        return _conversation(record, tokenizer, mask_prompt)
    eos = [tokenizer.eos_ids[0]] if tokenizer.eos_ids else []
    if record.prompt is None:
        ids = [*tokenizer.encode_prompt(record.text), *eos]
        return ids, [bool(record.text)] * len(ids)
    prompt, answer = tokenizer.encode_prompt(record.prompt), tokenizer.encode_continuation(record.text)
    learned = [not mask_prompt] * len(prompt) + [bool(answer)] * (len(answer) + len(eos))
    return [*prompt, *answer, *eos], learned


def _conversation(record: Record, tokenizer: Tokenizer, mask_prompt: bool) -> tuple[list[int], list[bool]]:
    text = _text(record, tokenizer, len(record.messages))
    spans = _assistant_spans(record, tokenizer, text) if mask_prompt else [(0, len(text))]
    plain, offsets = tokenizer.encode_with_offsets(text)
    learned = _overlap(offsets, spans)
    ids = tokenizer.opened(plain)
    learned = [not mask_prompt] * (len(ids) - len(plain)) + learned
    if record.messages[-1]["role"] == "assistant" and tokenizer.eos_ids:
        closing = [i for i, inside in zip(plain, _overlap(offsets, spans[-1:]), strict=True) if inside]
        if not set(closing) & set(tokenizer.eos_ids):  # the template leaves the answer open: teach its end too
            ids, learned = [*ids, tokenizer.eos_ids[0]], [*learned, bool(closing)]
    return ids, learned


def _overlap(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """For each token whether some of its characters are an answer's."""
    first, last = np.array(offsets, np.int64).reshape(-1, 2).T
    inside = np.zeros(len(offsets), bool)
    for start, end in spans:
        inside |= (first < end) & (last > start)
    flags: list[bool] = inside.tolist()
    return flags


def _text(record: Record, tokenizer: Tokenizer, count: int, prompt: bool = False) -> str:
    """The first `count` messages by the chat template."""
    return tokenizer.apply_chat_template(record.messages[:count], prompt, record.tools, now=TEMPLATE_DATE)


def _assistant_spans(record: Record, tokenizer: Tokenizer, whole: str) -> list[Span]:
    """The (start, end) characters of what the assistant says in the conversation's text `whole`."""
    spans = []
    for i, message in enumerate(record.messages):
        if message["role"] != "assistant":
            continue
        before = _text(record, tokenizer, i) if i else ""
        if not whole.startswith(before):
            raise DataError(
                f"{record.where}: the chat template rewrites earlier turns, so the answer in message {i} "
                "can't be found; give one answer a sample, or learn whole conversations (mask_prompt = false)"
            )
        opened = _shared(_text(record, tokenizer, i, prompt=True), whole) if i else 0
        answered = _shared(_text(record, tokenizer, i + 1), whole)
        spans.append((max(len(before), opened), answered))
    return spans


def _shared(a: str, b: str) -> int:
    """Number of characters with which both begin."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
