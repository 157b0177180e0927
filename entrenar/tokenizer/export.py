"""The ``tokenizer.*`` keys of a GGUF file for any tokenizer, such that llama.cpp reads text as we do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from entrenar.errors import TokenizerError
from entrenar.tokenizer import bytelevel, sentencepiece
from entrenar.tokenizer.gguf import BYTE, CONTROL, GGML, NORMAL, TEMPLATE, UNKNOWN, UNUSED, USER_DEFINED
from entrenar.tokenizer.pieces import BYTE_PIECES, steps
from entrenar.tokenizer.tokenizer import Tokenizer


def metadata(tokenizer: Tokenizer, size: int | None = None) -> dict[str, object]:
    """The ``tokenizer.*`` keys for `tokenizer`; what came from a GGUF file comes back as it was.

    size: rows of the embedding, which llama.cpp wants a token for, each; unused ones follow the vocabulary.
    """
    size = tokenizer.vocab_size if size is None else size
    if size < tokenizer.vocab_size:
        raise TokenizerError(f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding {size} rows")
    description = json.loads(tokenizer.engine.to_str())
    model = description["model"]
    found = [tokenizer.engine.id_to_token(i) for i in range(size)]
    holes = [i for i, token in enumerate(found) if token is None]
    tokens = [f"[PAD{i}]" if token is None else token for i, token in enumerate(found)]
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model.get("merges", ())]
    out: dict[str, object] = (
        _padded(tokenizer.gguf, size) if tokenizer.gguf else _described(tokenizer, description, tokens, pairs, holes)
    )
    out[GGML + "tokens"] = tokens
    if out[GGML + "model"] == "gpt2":
        out[GGML + "merges"] = [f"{a} {b}" for a, b in pairs]
    if tokenizer.chat_template is not None:
        out[TEMPLATE] = tokenizer.chat_template
    return out


def _padded(kept: Mapping[str, object], size: int) -> dict[str, object]:
    """The keys that came from a file, those that hold one item a token made `size` long."""
    out = dict(kept)
    for name, fill in (("token_type", lambda types: UNUSED), ("scores", np.min)):
        if GGML + name in out:
            items = np.asarray(out[GGML + name])
            out[GGML + name] = np.append(items, np.full(size - len(items), fill(items), items.dtype))
    return out


def _described(
    tokenizer: Tokenizer,
    description: dict[str, Any],
    tokens: list[str],
    pairs: list[tuple[str, ...]],
    holes: list[int],
) -> dict[str, object]:
    """All keys but tokens and merges, from what the engine does."""
    model = description["model"]
    if model["type"] != "BPE":
        raise TokenizerError(f"tokenizer.json: a {model['type']} model can't be written to GGUF, only BPE")
    added = tokenizer.engine.get_added_tokens_decoder()
    types = np.full(len(tokens), NORMAL, np.int32)
    types[holes] = UNUSED
    for i, entry in added.items():
        types[i] = CONTROL if entry.special else USER_DEFINED
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "padding": tokenizer.pad_id,
        "unknown": tokenizer.unk_id,
    }
    byte_level = [s["type"] for s in steps(tokenizer.engine.decoder)] == ["ByteLevel"]
    kind: dict[str, object]
    if byte_level:
        pre = bytelevel.pre_name(tokenizer.engine, bool(model.get("ignore_merges")))
        kind = {GGML + "model": "gpt2", GGML + "pre": pre}
    else:
        if tokenizer.unk_id is not None:
            types[tokenizer.unk_id] = UNKNOWN
        for i, token in enumerate(tokens):
            if token in BYTE_PIECES and model.get("byte_fallback"):
                types[i] = BYTE
        kind = {
            GGML + "model": "llama",
            GGML + "pre": "default",
            GGML + "scores": _scores(tokens, pairs, added),
            GGML + "add_space_prefix": tokenizer.strips_space,
        }
    return {
        **kind,
        GGML + "token_type": types,
        **{f"{GGML}{name}_token_id": np.uint32(i) for name, i in ids.items() if i is not None},
        GGML + "add_bos_token": tokenizer.add_bos,
        GGML + "add_eos_token": tokenizer.add_eos,
    }


def _scores(tokens: list[str], pairs: list[tuple[str, ...]], added: Mapping[int, object]) -> np.ndarray[Any, Any]:
    """Scores under which SentencePiece joins what `pairs` join: minus the rank of a piece's first pair."""
    vocab = {token: i for i, token in enumerate(tokens)}
    ranks: dict[str, int] = {}
    for a, b in pairs:
        ranks.setdefault(a + b, len(ranks))
    known = {(a, b) for a, b in pairs}
    for i, token in enumerate(tokens):
        splits = [] if i in added or token in BYTE_PIECES else sentencepiece.splits(token, vocab)
        missing = next((pair for pair in splits if pair not in known), None)
        if missing is not None:
            raise TokenizerError(
                f"tokenizer.json: no merge joins {missing[0]!r} and {missing[1]!r} into {token!r}, which GGUF can't say"
            )
    lowest = -float(len(ranks))
    scores = [0.0 if i in added else -float(ranks[t]) if t in ranks else lowest for i, t in enumerate(tokens)]
    return np.array(scores, np.float32)
