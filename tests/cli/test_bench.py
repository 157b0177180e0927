"""``entrenar bench step``: its figures agree with each other; what can't be measured is refused before it is built."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from importlib.resources import files
from pathlib import Path

import pytest

import entrenar as en
from entrenar import cli
from entrenar.models.flops import step_flops

BASE = str(files("entrenar.quickstart") / "base.gguf")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.main(["bench", *args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.tier2
def test_the_figures_of_a_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--batch-size", "1", "--seq-len", "8", "--steps", "3", "--rank", "2"]
    trace, picture = tmp_path / "trace.json", tmp_path / "time.svg"
    code, out, err = run(capsys, "step", "--model", BASE, *flags, "--json", "--profile", str(trace), "--picture",
                         str(picture))  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["work"] == "lora-r2"
    assert result["tokens_per_second"] == pytest.approx(8 / result["seconds_per_step"])
    low, high = result["tokens_per_second_range"]
    assert low <= result["tokens_per_second"] <= high
    model = en.load(BASE).add_lora(en.LoraConfig(r=2, target_modules="all-linear"))
    assert result["tflops"] == pytest.approx(step_flops(model, 1, 8) / result["seconds_per_step"] / 1e12)
    peak = result["peaks"][f"{result['arithmetic']}_gflops"]
    assert result["share_of_peak"] == pytest.approx(1e3 * result["tflops"] / peak)
    assert 0.01 < result["peak_rss_gb"] < 64
    assert result["recomputed_layers"] == 0
    calls = {row["name"]: row["calls"] for row in result["kernels"]}
    assert calls["attention"] == calls["attention_backward"] == model.config.num_hidden_layers
    events = json.loads(trace.read_text())["traceEvents"]
    assert len(events) == sum(row["calls"] for row in result["kernels"]) * result["profiled_steps"]
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")


@pytest.mark.tier2
def test_full_training_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "step", "--model", BASE, "--dtype", "f32", "--full", "--optimizer", "adamw_8bit",
                         "--batch-size", "1", "--seq-len", "4", "--steps", "1")  # fmt: skip
    assert code == 0
    assert "full, 1 x 4 tokens" in out
    assert "tokens/s (" in out
    assert "between kernels" in out
    assert err.startswith("step 1/1  ")


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["step"], "give either --preset or --model"),
        (["step", "--preset", "llama-124m", "--model", "x.gguf"], "give either --preset or --model"),
        (["step", "--preset", "llama-124m", "--quant", "nf5"], "quant: 'nf5' is not one of"),
        (["step", "--preset", "llama-124m", "--quant", "nf4", "--full"], "quantized weights are frozen"),
        (["step", "--preset", "llama-124m", "--memory-budget", "some"], "memory_budget: 'some'"),
        (["step", "--preset", "llama-125m"], "preset: no preset 'llama-125m'; did you mean llama-124m?"),
        (["step", "--preset", "llama-124m", "--steps", "0"], "steps: 0 must be at least 1"),
        (["step", "--preset", "llama-124m", "--seq-len", "1"], "seq_len: 1 must be at least 2"),
        (["steps", "--preset", "llama-124m"], "invalid choice 'steps'"),
    ],
)
def test_what_can_not_be_measured(args: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("entrenar bench: ")
    assert complaint in err
