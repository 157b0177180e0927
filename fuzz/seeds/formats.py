"""Seed inputs of the file formats: small valid files, the same each time, put into an empty corpus folder."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from entrenar.formats import gguf_write, safetensors


def plant(files: Callable[[Path], None]) -> None:
    """Fill the corpus folder named on the command line with what `files` writes, if it is empty."""
    for folder in (Path(word) for word in sys.argv[1:] if not word.startswith("-")):
        if folder.is_dir() and not any(folder.iterdir()):
            files(folder)


def ggufs(folder: Path) -> None:
    """A vocabulary, a model with every plain type, and a q8_0 tensor patched in for an i8-sized one."""
    words = {"tokenizer.ggml.tokens": ["<s>", "a", "é"], "tokenizer.ggml.scores": [0.0, -1.0, -2.0]}
    scalars = {f"k{i}": kind(1) for i, kind in enumerate((np.uint8, np.int16, np.int64, np.float32, np.float64))}
    tensors = [(d.__name__, np.ones((2, 32), d)) for d in (np.float32, np.float16, ml_dtypes.bfloat16)]
    gguf_write.write(folder / "empty", {}, [])
    gguf_write.write(folder / "words", {"general.architecture": "llama", "flag": True, **words}, [])
    gguf_write.write(folder / "model", {"general.alignment": 64, "ids": [1, -2], **scalars}, tensors)


def weights(folder: Path) -> None:
    """No tensors, one, and one of each type with metadata."""
    names = ("f4", "f2", "f8", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
    safetensors.write(folder / "empty", {}, {})
    safetensors.write(folder / "one", {"a": np.ones((2, 3), np.float32)})
    safetensors.write(folder / "types", {name: np.ones((1, 2), name) for name in names}, {"é": '"\\'})


def adapter_configs(folder: Path) -> None:
    """The least, one as PEFT writes it, and one with patterns."""
    whole = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj"],
             "bias": "none", "use_dora": False, "use_rslora": True, "modules_to_save": None}  # fmt: skip
    patterns = {"target_modules": ".*q_proj", "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"k|q_proj": 2.5}}
    for name, config in (("least", {"peft_type": "LORA"}), ("whole", whole), ("patterns", {**whole, **patterns})):
        (folder / name).write_text(json.dumps(config))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for files in (ggufs, weights, adapter_configs):
            files(Path(name))
            print(*(f"{path.name}: {path.stat().st_size} bytes" for path in Path(name).iterdir()), sep="\n")
