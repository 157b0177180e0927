"""Writes tests/tokenizer/oracle_tokens.json: ids by the sentencepiece package and by llama.cpp (xllamacpp).

    PYTHONPATH=. python tests/oracles/tokens.py ../shared/data     (with sentencepiece and xllamacpp installed)

llama.cpp is called through the C symbols that xllamacpp's module exports. llama_model_params is passed as opaque
bytes, in which only `vocab_only` is set; VOCAB_ONLY is its offset in xllamacpp 2026.10.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece

from entrenar.formats import gguf_write
from entrenar.tokenizer import Tokenizer, from_characters, train_bpe

VOCAB_ONLY = 72
OUT = Path(__file__).resolve().parent.parent / "tokenizer/oracle_tokens.json"
SIZES = {"context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64,
         "attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
WORDS = ["The", "cat", "sat", "on", "a", "mat,", "once", "upon", "time", "there", "was", "Lily", "don't", "1234", "5",
         "naïve", "日本語", "🎉", "\n", "\n\n", "\t"]  # fmt: skip


class Parameters(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * 512),)


def llama_cpp() -> Any:
    package = importlib.util.find_spec("xllamacpp")
    assert package is not None
    assert package.origin is not None
    library = ctypes.PyDLL(str(Path(package.origin).parent / "xllamacpp.abi3.so"))
    library.llama_model_default_params.restype = Parameters
    library.llama_model_load_from_file.restype = ctypes.c_void_p
    library.llama_model_load_from_file.argtypes = [ctypes.c_char_p, Parameters]
    library.llama_model_get_vocab.restype = ctypes.c_void_p
    library.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
    library.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32,
        ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    library.llama_backend_init()
    return library


def ids_of(library: Any, path: Path, texts: list[str]) -> list[tuple[str, list[int]]]:
    parameters = library.llama_model_default_params()
    parameters.bytes[VOCAB_ONLY] = 1
    vocab = library.llama_model_get_vocab(library.llama_model_load_from_file(str(path).encode(), parameters))
    out = []
    for text in texts:
        data = text.encode()
        buffer = (ctypes.c_int32 * (len(data) + 8))()
        count = library.llama_tokenize(vocab, data, len(data), buffer, len(buffer), True, True)
        out.append((text, list(buffer[:count])))
    return out


def main(shared: Path) -> None:
    draw = random.Random(0)
    lines = [draw.choices(WORDS, k=draw.randrange(1, 12)) for _ in range(60)]
    plain = [" ".join(word for word in line if word.strip()) for line in lines]
    spaced = ["".join(word + draw.choice(("", " ", "  ")) for word in line) for line in lines[:45]]
    training = " ".join(" ".join(line) for line in lines)
    processor = sentencepiece.SentencePieceProcessor(str(shared / "models/tok512.model"))
    library = llama_cpp()
    found: dict[str, Any] = {"training text": training}
    made: dict[str, Tokenizer] = {"bpe": train_bpe([training], 400), "characters": from_characters(training)}
    with tempfile.TemporaryDirectory() as folder:
        for name, tokenizer in made.items():
            path = Path(folder) / f"{name}.gguf"
            sizes = {f"llama.{key}": value for key, value in SIZES.items()}
            gguf_write.write(path, {"general.architecture": "llama", **sizes, **tokenizer.gguf_metadata()}, [])
            found[name] = ids_of(library, path, spaced)
    found["stories260K"] = ids_of(library, shared / "models/stories260K.gguf", spaced)
    # sentencepiece also drops extra spaces, as tok512.model asks; a GGUF file does not hold that rule
    pieces = [(text, processor.encode(text)) for text in plain if text]
    OUT.write_text(json.dumps({"sentencepiece": pieces, "llama.cpp": found}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
