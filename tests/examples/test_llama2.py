"""The examples run as a reader would run them, on tiny sizes, and stay short and within the public surface."""

import ast
import json
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import entrenar

BASE = files("entrenar.quickstart") / "base.gguf"
FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples" / "llama2"
TEXT = "".join(f"The {a} {b} over the {c}.\n" for a in ("cat", "dog", "fox") for b in ("runs", "jumps")
               for c in ("wall", "road", "hill", "brook")) * 40  # fmt: skip


def start(script, *arguments):
    command = [sys.executable, FOLDER / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def run(script, *arguments):
    done = start(script, *arguments)
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


def test_qlora_trains_an_adapter_on_weights_of_4_bits(tmp_path, text):
    said = run("finetune_qlora.py", BASE, text, tmp_path / "run", "--quant", "nf4", "--steps", 3, "--seq-len", 32,
               "--rank", 2, "--memory-budget", "2GB")  # fmt: skip
    model = entrenar.load(BASE, quant="nf4")
    model.load_adapter(tmp_path / "run" / "adapter", trainable=True)
    assert model.adapter.r == 2
    assert f"{entrenar.count_parameters(model):,} parameters are trained" in said
    assert re.search(r"^0\.\d\d GiB at the peak, 0 layers computed again$", said, re.MULTILINE)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert f"training loss {sum(losses) / 3:.3f}" in said


def test_memory_of_two_ranks():
    lines = run("memory_benchmarks.py", "--preset", "llama-124m", "--ranks", 2, 8, "--seq-len", 64).splitlines()
    rows = [re.split(r"  +", line.strip()) for line in lines[1:]]
    assert [(row[0], row[1]) for row in rows] == [("2", "16 bit"), ("2", "nf4"), ("8", "16 bit"), ("8", "nf4")]
    config = entrenar.ModelConfig.preset("llama-124m")
    assert config.kv_heads == config.num_attention_heads  # so that q, k, v and o are square
    sides = 4 * 2 * config.hidden_size + 3 * (config.hidden_size + config.intermediate_size)  # inputs and outputs
    for rank, _, trained, reduction, _ in rows:
        count = config.num_hidden_layers * int(rank) * sides
        assert (trained, reduction) == (f"{count:,}", f"{1 - count / config.num_parameters():.3%}")
    peaks = [float(row[-1]) for row in rows]
    assert peaks[1] < peaks[0] < peaks[2] > peaks[3] > peaks[1]


@pytest.mark.parametrize(
    ("script", "arguments", "complaint"),
    [
        ("train.py", "absent.toml TEXT OUT", "absent.toml"),
        ("train.py", "TEXT TEXT OUT", "TEXT: is no TOML with a [model] table"),
        ("train.py", "WRONG TEXT OUT", "vocab_sise"),
        ("train.py", f"{BASE} TEXT OUT", "base.gguf: is no TOML with a [model] table"),
        ("finetune_lora.py", "absent.gguf TEXT OUT", "absent.gguf: no such file or directory"),
        ("finetune_lora.py", f"{BASE} TEXT OUT --rank 0", "r: 0 is not a rank from 1 to 512"),
        ("finetune_lora.py", f"{BASE} absent.txt OUT", "absent.txt: no such file or directory"),
        ("finetune_qlora.py", f"{BASE} TEXT OUT --quant nf5", "quant: 'nf5' is not one of"),
        ("finetune_qlora.py", f"{BASE} TEXT OUT --memory-budget 1MB", "memory_budget: 1.00 MB is too little"),
        ("memory_benchmarks.py", "--preset llama3", "preset: no preset 'llama3'"),
        ("memory_benchmarks.py", "--ranks 0", "rank: 0 is not a rank from 1 to 512"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, text, script, arguments, complaint):
    (tmp_path / "wrong.toml").write_text("[model]\nvocab_sise = 300\n")
    places = {"TEXT": str(text), "OUT": str(tmp_path / "run"), "WRONG": str(tmp_path / "wrong.toml")}
    done = start(script, *(places.get(word, word) for word in arguments.split()))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert complaint.replace("TEXT", places["TEXT"]) in line


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
