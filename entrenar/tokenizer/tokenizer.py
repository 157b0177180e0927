"""The tokenizer that every model carries, and its stream for text that arrives token by token.

Splitting text is the work of the `tokenizers` library (the *engine*); which ids frame a text, which end a
turn, what a token's bytes are and how a conversation reads is decided here. Only `chat_template` may be set
later.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from os import PathLike
from typing import Any

from tokenizers import Encoding, processors
from tokenizers import Tokenizer as Engine

from entrenar.errors import TokenizerError
from entrenar.tokenizer import chat, pieces

Message = Mapping[str, Any]

# Tokens that end a turn in the chat formats of the models served, whatever their file calls "eos".
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>")


class Tokenizer:
    """Text to ids and back.

    Attributes:
        bos_id, unk_id, pad_id: ids or None.
        eos_ids: ids that end a text or a turn, the one that training appends first; may be empty.
        add_bos, add_eos: whether `encode` frames a text with them.
        chat_template: the model's own Jinja template, or None.
        vocab_size: number of ids (the highest one plus 1).
        special_ids: ids that are no text, hidden by `decode`.
        strips_space: whether encoding puts a space before a text, which decoding takes away.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        pad_id: int | None = None,
        unk_id: int | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        chat_template: str | None = None,
        config: Mapping[str, Any] | None = None,
        gguf: Mapping[str, object] | None = None,
    ) -> None:
        """`config` is the tokenizer_config.json, `gguf` the small GGUF keys it came from, where it did."""
        self.engine = engine
        self._piece, self.strips_space = pieces.decoding(engine)
        added = engine.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        top = max(added, default=-1)
        self.vocab_size = max(engine.get_vocab_size(with_added_tokens=True), top + 1)
        named = (i for t in TURN_ENDS if (i := engine.token_to_id(t)) is not None and i in added)
        self.bos_id, self.pad_id, self.unk_id = bos_id, pad_id, unk_id
        self.eos_ids = tuple(dict.fromkeys([*eos_ids, *named]))
        self.add_bos = add_bos and bos_id is not None
        self.add_eos = add_eos and bool(self.eos_ids)
        self.chat_template = chat_template
        self.config, self.gguf = dict(config or {}), dict(gguf or {})
        self._bytes: dict[int, bytes] = {}
        self._continuing: Engine | None = None

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, bos_id={self.bos_id}, eos_ids={self.eos_ids})"

    @property
    def eos_id(self) -> int | None:
        """The id that training appends to a text, or None."""
        return self.eos_ids[0] if self.eos_ids else None

    # ---- text to ids

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of `text`; `add_special` puts BOS and EOS around it where the model wants them.

        Special tokens that the text spells out ("<|im_end|>") become their ids; a BOS that it spells out is not
        doubled.
        """
        ids = self._encode(self.engine, text).ids
        if not add_special:
            return ids
        return [*self.opened(ids), *self.eos_ids[:1]] if self.add_eos else self.opened(ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that the model shall go on from: BOS where it wants one, never EOS."""
        return self.opened(self.encode(text, add_special=False))

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of `text` as it goes on from earlier text: no BOS, no SentencePiece space in front."""
        if self._continuing is None:
            self._continuing = _without_prefix(self.engine)
        return self._encode(self._continuing, text).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids without framing, and for each the (start, end) of the characters that it covers."""
        encoding = self._encode(self.engine, text)
        return encoding.ids, encoding.offsets

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation by the chat template, with exactly one BOS where the model wants one."""
        text = self.apply_chat_template(messages, add_generation_prompt, tools)
        return self.encode_prompt(text)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The conversation as text, by the model's template or, where it has none, `chat.DEFAULT_TEMPLATE`.

        `now` is the time that a template may print (default: the present). Raises TokenizerError where the
        template is broken or refuses the messages.
        """
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return chat.render(
            self.chat_template or chat.DEFAULT_TEMPLATE,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            now=now,
            special={name: self.token(i) for name, i in ids.items() if i is not None},
        )

    def opened(self, ids: list[int]) -> list[int]:
        """`ids` with one BOS in front where the model wants it."""
        if not self.add_bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    @staticmethod
    def _encode(engine: Engine, text: str) -> Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            what = "half of a surrogate pair, or a byte that is not UTF-8"
            raise TokenizerError(f"text: character {e.start} is {what}") from None
        return engine.encode(text, add_special_tokens=False)

    # ---- ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8, and ids that the vocabulary lacks, show as U+FFFD."""
        stream = self.stream(skip_special=skip_special)
        data = b"".join(map(stream.bytes_of, ids))
        return data.decode("utf-8", "replace")

    def stream(self, prefix: Iterable[int] = (), skip_special: bool = True) -> Stream:
        """A decoder for ids that come one by one; `prefix` are the ids before them, whose text is known.

        An answer after a prompt begins with the space that its first token holds, unless the prompt is empty or ends
        with a special token, after which SentencePiece puts a space that is not text.
        """
        stream = Stream(self, skip_special)
        last = None
        for last in prefix:
            stream.push(last)
        stream.strip = self.strips_space and (last is None or last in self.special_ids)
        return stream

    def token(self, id: int) -> str:
        """The vocabulary's own spelling of an id."""
        token = self.engine.id_to_token(id) if 0 <= id < self.vocab_size else None
        if token is None:
            raise TokenizerError(f"token id {id} is outside the vocabulary of {self.vocab_size}")
        return token

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry by its own spelling, or None."""
        return self.engine.token_to_id(token)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that an id stands for."""
        id = int(id)
        if id not in self._bytes:
            if id < 0:
                raise TokenizerError(f"token id {id} is negative")
            token = self.engine.id_to_token(id) if id < self.vocab_size else "\ufffd"
            if token is None or id in self.special_ids:
                self._bytes[id] = (token or "\ufffd").encode()
            else:
                self._bytes[id] = self._piece(token)
        return self._bytes[id]

    # ---- out

    def save(self, directory: str | PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them."""
        from entrenar.tokenizer.directory import save

        save(self, directory)

    def gguf_metadata(self, size: int | None = None) -> dict[str, object]:
        """The ``tokenizer.*`` keys of a GGUF file whose embedding has `size` rows (default: one an id).

        Raises TokenizerError where GGUF has no way to say what this tokenizer does, or it has more ids than that.
        """
        from entrenar.tokenizer.export import metadata

        return metadata(self, size)


class Stream:
    """Decodes ids one by one: the pushed pieces and `finish()` together are `decode` of all ids.

    Incomplete UTF-8 (three bytes at most) is held back until it is complete or can't become a character.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self.strip = tokenizer.strips_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def bytes_of(self, id: int) -> bytes:
        """Bytes of the next id; the first visible one loses the space that encoding put in front."""
        data = b"" if id in self._hidden else self._tokenizer.token_bytes(id)
        if self.strip and data:
            self.strip = False
            data = data.removeprefix(b" ")
        return data

    def push(self, id: int) -> str:
        """The text that is certain after one more id, perhaps empty."""
        return self._utf8.decode(self.bytes_of(id))

    def finish(self) -> str:
        """What was held back: U+FFFD where the ids ended inside a character."""
        return self._utf8.decode(b"", final=True)


def framed(engine: Engine, **fields: Any) -> Tokenizer:
    """A Tokenizer whose engine adds BOS and EOS too, as programs that load its tokenizer.json expect."""
    tokenizer = Tokenizer(engine, **fields)
    bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    eos = [tokenizer.eos_ids[0]] if tokenizer.add_eos else []
    # the engine's pattern language splits at spaces, so the tokens go by names of their own
    ids = {"BOS": bos, "EOS": eos}
    special = [{"id": n, "ids": i, "tokens": [tokenizer.token(i[0])]} for n, i in ids.items() if i]
    if special:
        one = [*["BOS"] * len(bos), "$A", *["EOS"] * len(eos)]
        two = [f"{name}:1".replace("$A", "$B") for name in one]
        engine.post_processor = processors.TemplateProcessing(single=one, pair=[*one, *two], special_tokens=special)
    return tokenizer


def _without_prefix(engine: Engine) -> Engine:
    """The same engine without the space that it puts before a text; itself where it puts none."""
    parts = [*pieces.steps(engine.normalizer), *pieces.steps(engine.pre_tokenizer)]
    if not any(_adds_prefix(step) for step in parts):
        return engine
    description = json.loads(engine.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        description[name] = _drop_prefix(description[name])
    return Engine.from_str(json.dumps(description))


def _adds_prefix(step: dict[str, Any]) -> bool:
    return bool(
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        or (step["type"] == "ByteLevel" and step.get("add_prefix_space"))  # as a normalizer it has none
    )


def _drop_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    for name in pieces.SEQUENCES:
        if name in step:
            return {**step, name: [kept for inner in step[name] if (kept := _drop_prefix(inner))]}
    if _adds_prefix(step):
        never = {"prepend_scheme": "never"} if step["type"] == "Metaspace" else {"add_prefix_space": False}
        return {**step, **never}
    return step
