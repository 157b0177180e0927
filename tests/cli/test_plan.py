"""``entrenar plan``: what it says agrees with the shapes, and what it suggests fits."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from entrenar import cli


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
def test_suggestions_fit_and_are_flags(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--preset", "llama2-7b", "--fit", "8GB")
    assert not found["fits"]
    assert found["suggestions"]
    for row in found["suggestions"]:
        assert row["predicted_peak_gb"] * 2**30 <= 8e9
        flags = [word for flag in row["flags"] for word in flag.split()]
        again = plan(capsys, "--preset", "llama2-7b", "--fit", "8GB", *flags)
        assert again["predicted_peak_gb"] <= row["predicted_peak_gb"] * 1.01
        assert again["fits"]
    assert plan(capsys, "--preset", "llama2-70b", "--fit", "1GB")["suggestions"] == []


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
        ("--target q_proj,v_proj", 2, "put spaces between them: --target q_proj v_proj"),
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
