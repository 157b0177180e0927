"""The main job on a real model and real data, with nothing but the defaults; killed on the way and resumed."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import entrenar
from entrenar.formats import safetensors


def command(shared_data, out, *more, model="stories260K.gguf"):
    return [
        sys.executable, "-m", "entrenar.cli", "finetune", "--model", str(shared_data / "models" / model),
        "--data", str(shared_data / "text" / "wikisql"), "--out", str(out), *more,
    ]  # fmt: skip


def steps(out):
    metrics = out / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


@pytest.mark.slow
def test_stories260k_learns_wikisql_and_survives_being_killed(tmp_path, shared_data):
    done = subprocess.run(command(shared_data, tmp_path / "whole", "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["eval_loss"] <= 2.2  # nats a token
    for model in ("stories260K-q8_0.gguf", "stories260K-q4_0.gguf"):  # QLoRA learns as LoRA does
        words = command(shared_data, tmp_path / model, "--json", model=model)
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["eval_loss"] <= 1.02 * report["eval_loss"]

    killed = tmp_path / "killed"
    with subprocess.Popen(command(shared_data, killed, "--save-every", "10"), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while steps(killed) < 25 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    resumed = subprocess.run(command(shared_data, killed, "--save-every", "10", "--resume"), capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    folders = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "killed"))
    whole, again = map(safetensors.read, folders)
    assert whole.keys() == again.keys()
    assert all(np.array_equal(whole[name], again[name]) for name in whole)

    model = entrenar.load(shared_data / "models" / "stories260K.gguf")
    model.load_adapter(killed / "adapter")
    assert entrenar.count_parameters(model) == 0  # loaded for use, not for training
