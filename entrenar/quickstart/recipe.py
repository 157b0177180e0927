"""How base.gguf was made: `entrenar train` on the world's texts, then `entrenar convert` to F16 GGUF.

``python -m entrenar.quickstart.recipe`` makes it again and compares the bits; ``--write`` replaces it. All is
computed with the AVX2 kernels, whose results depend on neither the machine nor the number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from entrenar.quickstart import world

HERE = Path(__file__).parent
BASE, SETTINGS = HERE / "base.gguf", HERE / "base.toml"
ISA = "avx2"
SEED, TEXTS = 0, 40_000

# The model after a few steps on a few texts. It changes when a kernel's bits do: then the base must be made again.
FIRST_STEPS, FIRST_TEXTS = 4, 600
FIRST_DIGEST = "8f43c7810274199f277792dcccda3db41ba269e90e8b16a43b85bcbc6bfc12e7"


def entrenar(*args: str | Path) -> None:
    """Runs one command of this package with the recipe's kernels; raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "entrenar.cli", *map(str, args)]
    subprocess.run(command, env={**os.environ, "ENTRENAR_ISA": ISA}, check=True)


def train(work: Path, texts: int = TEXTS, *flags: str) -> Path:
    """Trains in the empty directory `work` and returns the model's Hugging Face directory, in f32."""
    data = work / "texts.jsonl"
    with data.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in world.corpus(SEED, texts))
    entrenar("train", "--config", SETTINGS, "--data", data, "--out", work / "run", *flags)
    return work / "run/model"


def make(work: Path) -> Path:
    """The whole recipe; returns the GGUF file."""
    entrenar("convert", "--model", train(work), "--out", work / BASE.name, "--dtype", "f16")
    return work / BASE.name


def first_digest(work: Path) -> str:
    """SHA-256 of the weights after the first steps."""
    model = train(work, FIRST_TEXTS, "--max-steps", str(FIRST_STEPS), "--valid-fraction", "0")
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m entrenar.quickstart.recipe", description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the shipped base instead of comparing with it")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as work:
        made = make(Path(work))
        if write:
            shutil.copyfile(made, BASE)
            first = Path(work, "first")
            first.mkdir()
            print(f"{BASE} written, {BASE.stat().st_size:,} bytes; set FIRST_DIGEST = {first_digest(first)!r}")
            return 0
        same = made.read_bytes() == BASE.read_bytes()
    print("the same bits" if same else f"{BASE} has other bits; --write replaces it")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
