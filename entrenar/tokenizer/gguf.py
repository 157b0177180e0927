"""A tokenizer from the ``tokenizer.ggml.*`` keys of a GGUF file.

Every key is checked for type, length and range before it is used: a vocabulary is data from strangers.
Where a key is absent llama.cpp's default holds; an id of 4294967295 (or -1) means none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken

from entrenar.errors import TokenizerError
from entrenar.tokenizer import bytelevel, sentencepiece
from entrenar.tokenizer.pieces import BYTE_PIECES, BYTE_TO_CHAR
from entrenar.tokenizer.tokenizer import Tokenizer, framed

GGML = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NONE_ID = 0xFFFFFFFF
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
_LARGE = ("tokens", "merges")  # regenerated on export rather than kept


class _Keys:
    """Typed access to the metadata; each error names the key."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self.metadata = metadata

    def has(self, name: str) -> bool:
        return GGML + name in self.metadata

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The scalar under `name`, of Python type `kind`."""
        value = self.metadata.get(GGML + name, default)
        if value is not default and type(value) is not kind:
            item = value.item() if isinstance(value, np.generic) else value
            if type(item) is not kind:
                raise _fault(name, f"must be {kind.__name__}, is {type(value).__name__}")
            value = item
        return value

    def array(self, name: str, is_item: Callable[[object], bool], what: str) -> list[Any]:
        """The array under `name`, every item of which `is_item`."""
        value = self.metadata.get(GGML + name)
        if value is None:
            raise _fault(name, "is missing")
        items = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(items, list | tuple):
            raise _fault(name, f"must be an array of {what}, is {type(value).__name__}")
        wrong = next((i for i, item in enumerate(items) if not is_item(item)), None)
        if wrong is not None:
            raise _fault(name, f"must hold {what}, item {wrong} is {items[wrong]!r:.60}")
        return list(items)

    def id(self, name: str, size: int, default: int | None = None) -> int | None:
        """The token id under ``<name>_token_id``, None where there is none."""
        value: int | None = self.get(f"{name}_token_id", int, default)
        if value is None or value in (NONE_ID, -1) or (value == default and value >= size):
            return None
        if not 0 <= value < size:
            raise _fault(f"{name}_token_id", f"is {value}, the vocabulary has {size} tokens")
        return value


def _fault(name: str, reason: str) -> TokenizerError:
    return TokenizerError(f"{GGML}{name} {reason}")


def _is_text(item: object) -> bool:
    return isinstance(item, str)


def _is_int(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _is_number(item: object) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool) and not math.isnan(item)


def from_gguf(metadata: Mapping[str, object]) -> Tokenizer | None:
    """The tokenizer that a GGUF file's metadata describes, None where it has no ``tokenizer.ggml.*`` key at
    all.

    Raises TokenizerError naming the key that is missing, of the wrong type or length, or contradicts another.
    """
    if not any(name.startswith(GGML) for name in metadata):
        return None
    keys = _Keys(metadata)
    model = keys.get("model", str)
    if model not in _MODELS:
        raise _fault("model", "is missing" if model is None else f"is {model!r}; served are {', '.join(_MODELS)}")
    template = metadata.get(TEMPLATE)
    if template is not None and not isinstance(template, str):
        raise TokenizerError(f"{TEMPLATE} must be str, is {type(template).__name__}")
    vocab = _vocabulary(keys)
    types = _token_types(keys, vocab)
    build = _MODELS[model]
    engine, defaults = build(keys, vocab, types)
    bos, eos, unk = (keys.id(n, len(vocab), defaults.get(n)) for n in ("bos", "eos", "unknown"))
    rstrip = metadata.get("general.architecture") == "phi3" and model == "llama"
    engine.add_tokens(_added_tokens(vocab, types, {i for i in (bos, eos, unk) if i is not None}, rstrip))
    add_bos = bool(keys.get("add_bos_token", bool, defaults["add_bos"]))
    add_eos = bool(keys.get("add_eos_token", bool, False))
    eot = keys.id("eot", len(vocab))
    return framed(
        engine,
        bos_id=bos,
        eos_ids=[i for i in (eos, eot) if i is not None],
        pad_id=keys.id("padding", len(vocab)),
        unk_id=unk,
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template,
        gguf={k: v for k, v in metadata.items() if k.startswith("tokenizer.") and k[len(GGML) :] not in _LARGE},
    )


def _vocabulary(keys: _Keys) -> dict[str, int]:
    tokens = keys.array("tokens", _is_text, "strings")
    if not tokens:
        raise _fault("tokens", "is empty")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        again = next(i for i, token in enumerate(tokens) if vocab[token] != i)
        raise _fault("tokens", f"holds {tokens[again]!r:.60} twice, at {again} and {vocab[tokens[again]]}")
    return vocab


def _token_types(keys: _Keys, vocab: Mapping[str, int]) -> list[int]:
    if not keys.has("token_type"):
        return [NORMAL] * len(vocab)
    types = keys.array("token_type", _is_int, "integers")
    _same_length(keys, "token_type", types, vocab)
    wrong = next((i for i, t in enumerate(types) if not 0 <= t <= BYTE), None)
    if wrong is not None:
        raise _fault("token_type", f"item {wrong} is {types[wrong]}, no type of token")
    return types


def _same_length(keys: _Keys, name: str, items: Sequence[object], vocab: Mapping[str, int]) -> None:
    if len(items) != len(vocab):
        raise _fault(name, f"has {len(items)} items, {GGML}tokens has {len(vocab)}")


def _added_tokens(vocab: Mapping[str, int], types: Sequence[int], named: set[int], rstrip: bool) -> list[AddedToken]:
    """Tokens that are found in a text before it is split.

    Phi-3's control tokens swallow the space after them.
    """
    keeps_space = ("<unk>", "<s>", "<|endoftext|>")
    return [
        AddedToken(
            token,
            special=types[i] != USER_DEFINED,
            normalized=False,
            rstrip=rstrip and token not in keeps_space and (types[i] == CONTROL or token == "</s>"),
        )
        for token, i in vocab.items()
        if token and (types[i] in (CONTROL, USER_DEFINED, UNKNOWN) or i in named)
    ]


def _byte_level(keys: _Keys, vocab: dict[str, int], types: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    name = keys.get("pre", str, "default")
    pre = bytelevel.PRE.get(name)
    if pre is None:
        raise _fault("pre", f"is {name!r}; served are {', '.join(bytelevel.PRE)}")
    pairs = []
    for i, merge in enumerate(keys.array("merges", _is_text, "strings")):
        cut = merge.find(" ", 1)
        a, b = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not b:
            raise _fault("merges", f"item {i} is {merge!r:.60}, not two tokens")
        unknown = next((t for t in (a, b, a + b) if t not in vocab), None)
        if unknown is not None:
            raise _fault("merges", f"item {i} ({merge!r:.60}) needs {unknown!r:.60}, which {GGML}tokens lacks")
        pairs.append((a, b))
    unk = keys.id("unknown", len(vocab))
    if unk is None:
        lost = [b for b in range(256) if BYTE_TO_CHAR[b] not in vocab and b not in (0xC0, 0xC1) and b < 0xF5]
        if lost:
            raise _fault("tokens", f"can't spell {len(lost)} bytes of UTF-8, the first is 0x{lost[0]:02X}")
    unk_token = None if unk is None else list(vocab)[unk]
    return bytelevel.engine(vocab, pairs, pre, unk_token), {"add_bos": pre.add_bos}


def _sentence_piece(keys: _Keys, vocab: dict[str, int], types: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    scores = keys.array("scores", _is_number, "numbers")
    _same_length(keys, "scores", scores, vocab)
    results = [i for i, t in enumerate(types) if t in (NORMAL, UNUSED)]
    tokens = list(vocab)
    long = next((i for i in results if len(tokens[i]) > sentencepiece.LONGEST_PIECE), None)
    if long is not None:
        raise _fault(
            "tokens",
            f"item {long} has {len(tokens[long])} characters; {sentencepiece.LONGEST_PIECE} is the most",
        )
    unk = keys.id("unknown", len(vocab), 0)
    if unk is None and any(piece not in vocab for piece in BYTE_PIECES):
        raise _fault("unknown_token_id", "is none, and the vocabulary lacks byte tokens: unknown text would be lost")
    pairs = sentencepiece.merges(vocab, scores, results)
    space = bool(keys.get("add_space_prefix", bool, True))
    engine = sentencepiece.engine(vocab, pairs, None if unk is None else tokens[unk], space)
    return engine, {"add_bos": True, "bos": 1, "eos": 2, "unknown": 0}


_MODELS: dict[str, Callable[[_Keys, dict[str, int], Sequence[int]], tuple[Any, dict[str, Any]]]] = {
    "llama": _sentence_piece,
    "gpt2": _byte_level,
}
