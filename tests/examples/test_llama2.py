"""The examples run as a reader would run them, on tiny sizes, and stay short and within the public surface."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import entrenar

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples" / "llama2"
TEXT = "".join(f"The {a} {b} over the {c}.\n" for a in ("cat", "dog", "fox") for b in ("runs", "jumps")
               for c in ("wall", "road", "hill", "brook")) * 40  # fmt: skip


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, FOLDER / script, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def test_training_then_fine_tuning(tmp_path, text):
    (tmp_path / "tiny.toml").write_text(
        "[model]\nvocab_size = 300\nhidden_size = 32\nintermediate_size = 64\nnum_hidden_layers = 2\n"
        "num_attention_heads = 2\nmax_position_embeddings = 64\n"
    )
    said = run("train.py", tmp_path / "tiny.toml", text, tmp_path / "run", "--steps", 30, "--seq-len", 32)
    assert "parameters" in said
    assert entrenar.load(tmp_path / "run" / "model.gguf").config.hidden_size == 32
    said = run(
        "finetune_lora.py", tmp_path / "run" / "model.gguf", text, tmp_path / "tuned", "--steps", 20,
        "--seq-len", 32, "--rank", 4, "--prompt", "The cat",
    )  # fmt: skip
    before, after = (line.split(":", 1)[1] for line in said.splitlines() if line.startswith(("before", "after")))
    assert before != after
    assert (tmp_path / "tuned" / "adapter" / "adapter_model.safetensors").exists()
    assert entrenar.load(tmp_path / "tuned" / "merged.gguf").tokenizer is not None


@pytest.mark.tier1
@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.py")), ids=lambda p: p.name)
def test_examples_are_short_and_use_the_public_surface(script):
    source = script.read_text()
    assert source.count("\n") <= 60
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("entrenar"):
            assert node.module.count(".") <= 1
            module = __import__(node.module, fromlist=["__all__"])
            assert {alias.name for alias in node.names} <= set(module.__all__)
