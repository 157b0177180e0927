"""The run itself, shortened, and once in full."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from entrenar.cli import main
from entrenar.cli.quickstart import Command
from entrenar.errors import ConfigError, UsageError
from entrenar.models.load import load
from entrenar.observe.events import Event, subscribed
from entrenar.quickstart import story
from entrenar.quickstart.story import Answer, Score

SHORT = replace(story.TRAINING, max_steps=3, batch_size=2, eval_every=None)
HELD_OUT = 4


def tell(out: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    """The results of a short run and the page it wrote."""
    page = io.StringIO()
    settings = {"training": SHORT, "held_out": HELD_OUT} | settings
    return story.tell(out, Console(file=page, width=90), **settings), page.getvalue()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("story") / "out"
    return out, *tell(out)


@pytest.mark.tier2
def test_everything_it_names_is_there(told: tuple[Path, dict[str, Any], str]) -> None:
    out, results, page = told
    for name in ("adapter", "merged", "merged.gguf", "base.gguf", "data", "answers.jsonl", "run/loss.svg"):
        assert (out / name).exists()
        assert name in page
    assert (out / "adapter/adapter_model.safetensors").is_file()
    assert {path.name for path in out.iterdir()} == set(story.MADE)
    assert json.loads((out / story.MARKER).read_text()) == results
    assert results["before"]["notes"] == results["after"]["notes"] == HELD_OUT


@pytest.mark.tier2
def test_the_page_shows_the_held_out_notes_and_the_commands_to_go_on(told: tuple[Path, dict[str, Any], str]) -> None:
    out, _, page = told
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    flat = " ".join(page.split())
    for answer in answers[:3]:
        assert answer["prompt"].removeprefix("Note: ").removesuffix(" Record:") in flat
    for command in ("entrenar generate --model", "entrenar finetune --model YOUR.gguf", "entrenar inspect"):
        assert command in flat
    assert "\x1b" not in page  # a file gets no colours


@pytest.mark.tier2
def test_the_run_by_hand_makes_the_same_adapter(
    told: tuple[Path, dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, page = told
    command = next(line for line in page.splitlines() if "--out my-first-run" in line)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)[1:]) == 0
    made = tmp_path / "my-first-run/adapter/adapter_model.safetensors"
    assert made.read_bytes() == (out / "adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.tier2
def test_the_exported_model_is_the_base_with_the_adapter(told: tuple[Path, dict[str, Any], str]) -> None:
    out, _, _ = told
    adapted = load(out / "base.gguf", dtype="f32")
    adapted.load_adapter(out / "adapter")
    assert adapted.tokenizer is not None
    ids = [adapted.tokenizer.encode("Note: Ada from Lima wants two old hats on Friday and will pay 45 coins. Record:")]
    base = load(out / "base.gguf", dtype="f32")(ids).numpy()
    for name in ("merged.gguf", "merged"):
        merged = load(out / name, dtype="f32")(ids).numpy()
        np.testing.assert_allclose(merged, adapted(ids).numpy(), atol=0.05)  # the weights are rounded to f16
        assert np.abs(merged - base).max() > 0.5


@pytest.mark.tier2
def test_the_same_seed_gives_the_same_adapter_and_another_one_does_not(
    told: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    def weights(out: Path) -> bytes:
        return (out / "adapter/adapter_model.safetensors").read_bytes()

    tell(tmp_path / "again")
    tell(tmp_path / "other", seed=1)
    assert weights(tmp_path / "again") == weights(told[0])
    assert weights(tmp_path / "other") != weights(told[0])


@pytest.mark.tier2
def test_a_second_run_says_that_it_replaces_the_first_and_leaves_the_rest(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "replaces" not in tell(out)[1]
    (out / "mine.txt").write_text("kept")
    (out / "data/stale.txt").write_text("goes")
    assert f"{out} holds an earlier quickstart; this one replaces it." in " ".join(tell(out)[1].split())
    assert (out / "mine.txt").read_text() == "kept"
    assert not (out / "data/stale.txt").exists()


@pytest.mark.tier1
def test_what_is_not_a_quickstart_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds no quickstart"):
        story.claim(tmp_path)
    with pytest.raises(UsageError, match="holds no quickstart"):
        story.claim(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.tier1
def test_an_unfinished_run_is_replaced_too(tmp_path: Path) -> None:
    assert not story.claim(tmp_path / "out")
    assert story.claim(tmp_path / "out")


@pytest.mark.tier2
def test_an_interrupt_during_training_ends_the_story(tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.name == "train.step" and event.fields["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with subscribed(interrupt):
        results, page = tell(tmp_path / "out")
    assert results == {"stopped_by": "SIGTERM"}
    assert "What it learned" not in page
    assert not (tmp_path / "out/adapter").exists()


@pytest.mark.tier2
def test_a_terminal_without_unicode_gets_plain_characters(tmp_path: Path) -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="replace")  # as the command line sets it
    story.tell(tmp_path / "out", Console(file=file, width=60), training=SHORT, held_out=HELD_OUT)
    file.flush()
    text = raw.getvalue().decode("ascii")
    assert "What it learned" in text
    assert "...." in text  # an empty bar
    assert "1  The base model -----" in text  # a rule


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("given", "right", "is_json"),
    [
        ('{"a": 1}', True, True),
        ('{"a": 2}', False, True),
        ("[1]", False, False),
        ('{"a": 1', False, False),
        ("", False, False),
    ],
)
def test_answers_are_scored_to_the_letter(given: str, right: bool, is_json: bool) -> None:
    answer = Answer("note", '{"a": 1}', given)
    assert (answer.right, answer.is_json) == (right, is_json)
    assert Score.of([answer, answer]) == Score(2, 2 * right, 2 * is_json)


@pytest.mark.tier1
@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed: {seed} is not a whole number from 0"):
        Command(seed=seed)


@pytest.mark.slow
def test_the_full_story_raises_the_accuracy_by_far_more_than_40_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quickstart", "--out", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    results = json.loads(captured.out)
    assert "What it learned" in captured.err
    notes = results["after"]["notes"]
    assert notes >= 100
    assert results["before"]["exact"] <= 0.05 * notes
    assert results["after"]["exact"] >= 0.8 * notes
    assert results["exported"]["exact"] >= 0.8 * notes
