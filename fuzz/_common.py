"""What the targets share: corpora that start from small valid inputs, the same each time, and the loop itself."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import atheris
import ml_dtypes
import numpy as np

with atheris.instrument_imports(include=["entrenar"]):
    from entrenar.formats import gguf_write, safetensors


def run(one_input: Callable[[bytes], None], *seeds: Callable[[], Iterable[bytes]]) -> None:
    """Fuzz `one_input`; empty corpus folders named on the command line get the seeds first."""
    for folder in (Path(word) for word in sys.argv[1:] if not word.startswith("-")):
        if folder.is_dir() and not any(folder.iterdir()):
            for i, seed in enumerate(chain.from_iterable(make() for make in seeds)):
                (folder / f"seed{i}").write_bytes(seed)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


def _written(*writers: Callable[[Path], None]) -> Iterable[bytes]:
    with tempfile.TemporaryDirectory() as name:
        for write in writers:
            write(Path(name) / "file")
            yield (Path(name) / "file").read_bytes()


def ggufs() -> Iterable[bytes]:
    """Nothing, a vocabulary, and a model with every plain type."""
    words = {"tokenizer.ggml.tokens": ["<s>", "a", "é"], "tokenizer.ggml.scores": [0.0, -1.0, -2.0]}
    scalars = {f"k{i}": kind(1) for i, kind in enumerate((np.uint8, np.int16, np.int64, np.float32, np.float64))}
    tensors = [(d.__name__, np.ones((2, 32), d)) for d in (np.float32, np.float16, ml_dtypes.bfloat16)]
    return _written(
        lambda path: gguf_write.write(path, {}, []),
        lambda path: gguf_write.write(path, {"general.architecture": "llama", "flag": True, **words}, []),
        lambda path: gguf_write.write(path, {"general.alignment": 64, "ids": [1, -2], **scalars}, tensors),
    )


def weights() -> Iterable[bytes]:
    """No tensors, one, and one of each type with metadata."""
    names = ("f4", "f2", "f8", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
    return _written(
        lambda path: safetensors.write(path, {}, {}),
        lambda path: safetensors.write(path, {"a": np.ones((2, 3), np.float32)}),
        lambda path: safetensors.write(path, {name: np.ones((1, 2), name) for name in names}, {"é": '"\\'}),
    )


def adapter_configs() -> Iterable[bytes]:
    """As PEFT writes them: a list of names, a pattern, ranks and alphas of their own."""
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none"}
    for more in (
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "modules_to_save": None},
        {"target_modules": r".*layers\.1\.(q|v)_proj", "rank_pattern": {r"layers\.[01]\.q_proj": 4}},
        {"target_modules": "all-linear", "alpha_pattern": {".*mlp.(?:up|down)_proj?": 2.5}, "use_dora": False},
    ):
        yield json.dumps({**plain, **more}).encode()


def noise() -> Iterable[bytes]:
    """Draws for targets that build their input themselves."""
    rng = np.random.default_rng(0)
    return [rng.bytes(n) for n in (16, 64, 64, 256, 256, 256, 1024)]
