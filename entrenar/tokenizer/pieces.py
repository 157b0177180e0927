"""From a vocabulary entry to the bytes it stands for.

Decoding is a concatenation of bytes, read as UTF-8 with U+FFFD for what is not valid; so a stream of ids can
be decoded piece by piece with the same result. Two ways to spell bytes are in use:

- *byte level* (GPT-2, Qwen2, Llama 3): every byte is one printable character; `BYTE_TO_CHAR` is that
  alphabet.
- *SentencePiece* (Llama 2, Phi-3): plain text in which U+2581 stands for a space, and ``<0x0A>`` for one
  byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as Engine

from entrenar.errors import TokenizerError

SPACE = "\u2581"  # LOWER ONE EIGHTH BLOCK, SentencePiece's visible space
SEQUENCES = ("decoders", "normalizers", "pretokenizers", "processors")  # where a sequence's steps lie, by component
BYTE_PIECES = tuple(f"<0x{b:02X}>" for b in range(256))
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[int, str]:
    """Byte -> character: printable Latin-1 stands for itself, the other 68 bytes for U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}


def byte_level(token: str) -> bytes:
    """Bytes of a byte-level token; a character outside the alphabet stands for its own UTF-8."""
    return b"".join(bytes((CHAR_TO_BYTE[c],)) if c in CHAR_TO_BYTE else c.encode() for c in token)


def sentence_piece(token: str) -> bytes:
    """Bytes of a SentencePiece token."""
    if match := _BYTE_PIECE.fullmatch(token):
        return bytes((int(match[1], 16),))
    return token.replace(SPACE, " ").encode()


def steps(part: Any) -> list[dict[str, Any]]:
    """A component of the engine (normalizer, pre-tokenizer, decoder or None) as a flat list of JSON steps."""
    return [] if part is None else flatten(json.loads(part.__getstate__()))


def flatten(step: object) -> list[dict[str, Any]]:
    """The steps of a component's JSON, sequences of sequences laid end to end; what is no step is left out."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence":
        inner: list[object] = next((step[name] for name in SEQUENCES if isinstance(step.get(name), list)), [])
        return [leaf for item in inner for leaf in flatten(item)]
    return [step]


def decoding(engine: Engine) -> tuple[Callable[[str], bytes], bool]:
    """How the engine's tokens become bytes: (token -> bytes, whether a leading space belongs to the
    encoding).

    Raises TokenizerError for a decoder that is neither byte level nor SentencePiece's.
    """
    found = steps(engine.decoder)
    names = {step["type"] for step in found}
    if names == {"ByteLevel"}:
        return byte_level, False
    if names and names <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and all(map(_is_space, found)):
        return sentence_piece, any(map(_strips_space, found))
    raise TokenizerError(
        f"tokenizer.json: decoder {'+'.join(s['type'] for s in found) or 'null'} is not served; "
        "entrenar reads byte-level and SentencePiece-style tokenizers"
    )


def _is_space(step: dict[str, Any]) -> bool:
    """False for a replacement other than the visible space's, which would change other text."""
    if step["type"] == "Replace":
        return bool(step["pattern"] == {"String": SPACE} and step["content"] == " ")
    return bool(step["type"] != "Metaspace" or step["replacement"] == SPACE)


def _strips_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Strip":
        return bool(step["content"] == " " and step["start"] >= 1)
    return bool(step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
