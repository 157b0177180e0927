"""Fuzz vocabularies from strangers: from_gguf and decoding accept or raise TokenizerError; streams equal decode."""

from __future__ import annotations

from typing import Any

import _common
import atheris

with atheris.instrument_imports(include=["entrenar"]):
    from entrenar.errors import TokenizerError
    from entrenar.tokenizer import from_gguf

KEYS = ["model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id", "eot_token_id",
        "unknown_token_id", "padding_token_id", "add_bos_token", "add_eos_token", "add_space_prefix"]  # fmt: skip
BYTES = [f"<0x{b:02X}>" for b in range(256)]
BASE = {"model": "llama", "tokens": [*BYTES, "a", "b", "ab"], "scores": [0.0] * 259, "unknown_token_id": 0}


def value(data: atheris.FuzzedDataProvider, depth: int = 0) -> Any:
    kind = data.ConsumeIntInRange(0, 5 if depth < 2 else 4)
    if kind == 5:
        return [value(data, depth + 1) for _ in range(data.ConsumeIntInRange(0, 12))]
    return (data.ConsumeInt(5), data.ConsumeFloat(), data.ConsumeBool(), data.ConsumeUnicodeNoSurrogates(8),
            data.PickValueInList(["llama", "gpt2", "qwen2", "a", "b", "a b", 0, 1, 3]))[kind]  # fmt: skip


def one_input(raw: bytes) -> None:
    data = atheris.FuzzedDataProvider(raw)
    changes = {data.PickValueInList(KEYS): value(data) for _ in range(data.ConsumeIntInRange(0, 5))}
    try:
        tokenizer = from_gguf({f"tokenizer.ggml.{key}": v for key, v in {**BASE, **changes}.items()})
        ids = tokenizer.encode(data.ConsumeUnicode(40))
        ids += [data.ConsumeIntInRange(0, tokenizer.vocab_size) for _ in range(20)]
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids)
        tokenizer.gguf_metadata()
    except TokenizerError:
        pass


if __name__ == "__main__":
    _common.run(one_input, _common.noise)
