"""``entrenar plan``: what it says agrees with the shapes, and what it suggests fits."""

from __future__ import annotations

import json

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
