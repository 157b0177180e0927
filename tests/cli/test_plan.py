"""``entrenar plan``: what it says agrees with the shapes, and what it suggests fits."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.resources import files

import pytest

from entrenar import cli
from entrenar.cli import finetune, train
from entrenar.cli.plan import Command as Planned
from entrenar.cli.settings import parse
from entrenar.train.footprint import RUN

BASE = str(files("entrenar.quickstart") / "base.gguf")


def plan(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    assert cli.main(["plan", *flags, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.tier2
@pytest.mark.parametrize(("targets", "trained"), [
    (("q_proj", "v_proj"), 8_388_608), (("q_proj", "k_proj", "v_proj", "o_proj"), 16_777_216),
    (("all-linear",), 39_976_960),
])  # fmt: skip
def test_true_counts_of_a_7b_model(
    targets: tuple[str, ...], trained: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(capsys, "--preset", "llama2-7b", "--quant", "nf4", "--dtype", "bf16", "--target", *targets)
    assert (found["parameters"], found["trained"]) == (6_738_415_616, trained)
    assert sum(row["bytes"] for row in found["weights"].values()) == pytest.approx(3.865e9, rel=1e-3)
    assert sum(found["bytes"].values()) == pytest.approx(found["predicted_peak_gb"] * 2**30)


@pytest.mark.tier2
@pytest.mark.parametrize(
    ("flags", "fit", "suggested"),
    [
        ("--preset llama2-7b", "8GB", {"--quant"}),
        ("--preset llama2-7b --dtype f32", "30GB", {"--dtype", "--quant", "--batch-size", "--seq-len"}),
        ("--preset llama2-7b --quant nf4 --rank 256 --dora --dropout 0.1", "9GB", {"--rank", "--target"}),
        ("--preset llama2-70b --quant nf4", "26GB", {"--batch-size", "--rank", "--quant"}),
        ("--preset qwen2.5-0.5b --modules-to-save embed_tokens", "2.6GB", {"--optimizer"}),
        (f"--model {BASE} --dtype bf16 --rank 512 --batch-size 32", "230MB", {"--batch-size", "--rank", "--seq-len"}),
        ("--preset llama-124m --full", "1.5GB", {"--optimizer", "entrenar finetune"}),
        (f"--model {BASE} --full --dtype f32 --batch-size 32", "180MB", {"--batch-size", "--seq-len"}),
    ],
)
def test_suggestions_fit_are_needed_and_are_commands(
    flags: str, fit: str, suggested: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*flags.split(), "--fit", fit]
    found = plan(capsys, *given)
    assert not found["fits"]
    named = set()
    for row in found["suggestions"]:
        changes = [flag for flag in row["flags"] if not flag.startswith("--memory-budget")]
        named |= {flag.split()[0] for flag in changes}
        if row["trained"] < found["trained"] and "--full" in given:
            named.add("entrenar finetune")
            given = [word for word in given if word != "--full"]
        again = plan(capsys, *given, *words(row["flags"]))
        assert again["fits"]
        assert row["predicted_peak_gb"] <= found["limit_gb"]
        assert row["bytes"]["process"] == again["bytes"]["process"] + RUN
        for spared in changes:  # with every layer computed again the least that a step takes without this change
            without = [flag for flag in changes if flag != spared]
            assert not plan(capsys, *given, *words(without), "--gradient-checkpointing")["fits"] or not without
        if row["command"] is None:
            assert flags.startswith("--model")
            assert "--full" in flags
            continue
        program, name, *rest = shlex.split(row["command"])
        assert (program, name) == ("entrenar", "train" if "--full" in given else "finetune")
        command = parse(train.Command if name == "train" else finetune.Command, rest, name)
        again = parse(Planned, [*given, *words(row["flags"])], "plan")
        shared = {f.name for f in fields(again)} & {f.name for f in fields(command)} - {"json", "model"}
        if name == "finetune":
            assert command.model == (again.model or "MODEL")
        assert {f: getattr(command, f) for f in shared} == {f: getattr(again, f) for f in shared}
    assert suggested <= named
    assert "--optimizer" not in named - suggested
    assert not [flag for row in found["suggestions"] for flag in row["flags"] if flag.startswith("--no-")]


@pytest.mark.tier2
def test_an_adapter_that_can_not_be_is_not_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--preset", "llama-124m", "--full", "--target", "qproj", "--fit", "1GB")
    assert [row["flags"] for row in found["suggestions"]] == []
    found = plan(capsys, "--preset", "llama-124m", "--full", "--rank", "0", "--fit", "1.5GB")
    assert [row["flags"][0] for row in found["suggestions"]] == ["--optimizer adamw_8bit"]


def words(flags: list[str]) -> list[str]:
    return [word for flag in flags for word in flag.split()]


@pytest.mark.tier2
def test_what_nothing_helps_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(capsys, "--preset", "llama2-70b", "--fit", "1GB")["suggestions"] == []
    assert cli.main(["plan", "--preset", "llama2-70b", "--fit", "1GB"]) == 0
    assert "nor with all that was tried together: smaller types, batches, ranks" in capsys.readouterr().out


@pytest.mark.tier2
def test_a_suggestion_is_shown_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--preset", "llama2-7b", "--target", "q_proj", "v_proj", "--fit", "7GB"]) == 0
    *_, row, command = capsys.readouterr().out.splitlines()
    assert row.endswith("tokens/s  --quant nf4 --memory-budget 7.00GB")
    assert command == (
        "the first one: entrenar finetune --model MODEL --target q_proj v_proj --quant nf4 --memory-budget 7.00GB "
        "--data DATA --out RUN"
    )


PEAK = """
import contextlib, io, sys
from entrenar.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(sys.argv[1:]) == 0
status = open("/proc/self/status").read()  # ru_maxrss would count the process that forked this one as well
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.parametrize("more", [[], ["--dora", "--modules-to-save", "lm_head", "--fit", "64GB"]])
def test_the_largest_preset_is_planned_in_100_mb(more: list[str]) -> None:
    command = [sys.executable, "-c", PEAK, "plan", "--preset", "llama2-70b", "--quant", "nf4", *more]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 100e6


@pytest.mark.tier1
def test_a_sequence_beyond_the_context_is_lowered_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--preset", "llama2-7b", "--seq-len", "5000", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["seq_len"] == 4096
    assert err == "seq_len 5000 is lowered to the model's context, 4096 tokens\n"


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("flags", "code", "complaint"),
    [
        ("--target qproj", 1, "target_modules: 'qproj' selects no linear layer; there are down_proj, embed_tokens, "
         "gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"),
        ("--target q_proj qkv_proj", 1, "target_modules: 'qkv_proj' selects no linear layer; there are down_proj, "),
        ("--target q_proj,v_proj", 2, "is one word and no list of names: --target q_proj v_proj"),
        ("--modules-to-save head", 1, "modules_to_save: no module with weights is named 'head'"),
        ("--dora --target embed_tokens", 1, "model.embed_tokens: use_dora is served on linear layers only"),
        ("--rank 0", 2, "rank: 0 is not a rank from 1 to 512"),
        ("--dropout 1", 2, "dropout: 1.0 is not in [0, 1)"),
        ("--gradient-accumulation-steps 0", 2, "gradient_accumulation_steps: 0 must be at least 1"),
        ("--fit lots", 2, "fit: 'lots'"),
    ],
)  # fmt: skip
def test_what_can_not_be_planned(
    flags: str, code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--preset", "llama2-7b", *flags.split()]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in err
