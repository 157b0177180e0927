"""A small SentencePiece-style vocabulary, as a GGUF file would hold it."""

from __future__ import annotations

from typing import Any

PIECES = (
    "\u2581",
    "a",
    "b",
    "c",
    "é",
    "\u2581a",
    "ab",
    "\u2581ab",
    "bc",
    "abc",
    "\u2581\u2581",
    "aa",
    "<tool>",
)


def metadata(**changes: Any) -> dict[str, object]:
    """Keys under tokenizer.ggml., with `changes` (None removes one)."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 1), 4]
    keys: dict[str, object] = {
        "model": "llama",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES))],
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in {**keys, **changes}.items() if v is not None}
