"""Settings: defaults, file, flags and overrides; precedence; what bad ones say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.cli.settings import option, parse, positional, read_words, required, settings_of
from entrenar.errors import ConfigError, UsageError

pytestmark = pytest.mark.tier1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A group of settings that others inherit."""

    seq_len: int = option(64, "tokens a sample")

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ConfigError("seq_len", f"{self.seq_len} is not positive")


@dataclass(frozen=True, kw_only=True)
class Command(Limits):
    """A command for these tests."""

    model: str = required("the model")
    data: tuple[str, ...] = required("files")
    prompt: str = option("", "text")
    rate: float = option(0.5, "a number")
    mode: Literal["fast", "slow"] = option("fast", "one of two")
    packing: bool = option(True, "on by default")
    json: bool = option(False, "off by default")
    seed: int | None = option(None, "may be absent")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A command with a word of its own."""

    text: str = positional("the text")
    json: bool = option(False, "off by default")


NEEDED = ["--model", "m", "--data", "d"]


def settings(*args: str) -> Command:
    data = any(word.startswith(("--data", "data=")) for word in args)  # of several values, so given once
    result = parse(Command, [*(NEEDED[:2] if data else NEEDED), *args], "entrenar test")
    assert result is not None
    return result


def complaint(*args: str, command: type = Command) -> str:
    with pytest.raises(UsageError) as caught:
        parse(command, args, "entrenar test")
    return str(caught.value)


def test_defaults_are_the_fields() -> None:
    assert settings() == Command(model="m", data=("d",))


@pytest.mark.parametrize(
    ("args", "field", "value"),
    [
        (["--seq-len", "3"], "seq_len", 3),
        (["--seq_len=3"], "seq_len", 3),
        (["seq_len=3"], "seq_len", 3),
        (["--rate", "-1e-3"], "rate", -1e-3),
        (["--prompt", ""], "prompt", ""),
        (["--prompt", "a=b"], "prompt", "a=b"),
        (["--prompt", "-x"], "prompt", "-x"),
        (["--prompt=--json"], "prompt", "--json"),
        (["--prompt", "two words\nand a line"], "prompt", "two words\nand a line"),
        (["--mode", "slow"], "mode", "slow"),
        (["--json"], "json", True),
        (["json=true"], "json", True),
        (["--json=false"], "json", False),
        (["--no-packing"], "packing", False),
        (["packing=false"], "packing", False),
        (["--seed", "7"], "seed", 7),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--data", "a", "b", "seq_len=2"], "data", ("a", "b")),
        (["--data", "a=1", "b"], "data", ("a=1", "b")),
        (["data=x"], "data", ("x",)),
    ],
)
def test_each_spelling_reaches_its_field(args: list[str], field: str, value: object) -> None:
    assert getattr(settings(*args), field) == value


def test_file_is_below_flags_and_above_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    tables = '[data]\ndata = ["a", "b"]\n[model]\nmodel = "m"\nseq-len = 7\njson = true\nrate = 1\n'
    file.write_text(f'mode = "slow"\n{tables}')
    result = parse(Command, ["--config", str(file), "rate=2", "--no-json"], "entrenar test")
    assert result == Command(model="m", data=("a", "b"), mode="slow", seq_len=7, rate=2.0, json=False)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--data", "d"], "--model is needed: the model"),
        ([*NEEDED, "--seq-lem", "3"], "unknown flag --seq-lem; did you mean --seq-len?"),
        ([*NEEDED, "json=true", "seqlen=3"], "unknown key seqlen; did you mean seq_len?"),
        ([*NEEDED, "--zzzz"], "unknown flag --zzzz; see --help"),
        ([*NEEDED, "--no-mode"], "unknown flag --no-mode; did you mean --mode?"),
        ([*NEEDED, "--rate"], "--rate needs a value"),
        (["--model", "", "--data", "d"], "--model is empty: the model"),
        (["--model", "m", "--data", "d", ""], "--data is empty: files"),
        ([*NEEDED, "--rate", "x"], "--rate: 'x' is not a number"),
        ([*NEEDED, "--seed", "1.5"], "--seed: '1.5' is not a whole number"),
        ([*NEEDED, "--json=maybe"], "--json: 'maybe' is not true or false"),
        ([*NEEDED, "--json", "x"], "what does 'x' belong to? Settings are --name VALUE or name=VALUE"),
        (
            [*NEEDED, "--mode", "fats"],
            "invalid choice 'fats' for argument '--mode'. Expected one of ('fast', 'slow').",
        ),
        ([*NEEDED, "--seq-len", "0"], "seq_len: 0 is not positive"),
    ],
)
def test_wrong_usage_says_what_and_where(args: list[str], expected: str) -> None:
    assert complaint(*args) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modell = 'm'", "unknown key modell in FILE; did you mean model?"),
        ("model = ", "FILE: is not TOML: Invalid value (at end of document)"),
        ("seq-len = 1\nseq_len = 2", "FILE: key seq_len is given twice"),
        ("rate = ['1', '2']", "--rate: '1 2' is not one value"),
        ("[a]\nconfig = 'other.toml'", "unknown key config in FILE; see --help"),
    ],
)
def test_wrong_file_says_what_and_where(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert complaint(*NEEDED, "--config", str(file)) == expected.replace("FILE", str(file))


def test_a_json_file_says_the_same(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text('{"mode": "slow", "more": {"seq-len": 7, "json": true, "seed": null}}')
    result = parse(Command, [*NEEDED, "--config", str(file)], "entrenar test")
    assert result == Command(model="m", data=("d",), mode="slow", seq_len=7, json=True)
    for text in ("[1, 2]", "{", "[" * 100_000):
        file.write_text(text)
        assert complaint(*NEEDED, "--config", str(file)).startswith(f"{file}: is not a JSON object")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        parse(Command, ["--config", str(tmp_path / "absent.toml")], "entrenar test")


@pytest.mark.parametrize("words", [["hello"], ["a=b"], ["--text", "hello"], ["--json", "hello"]])
def test_positional_needs_no_flag(words: list[str]) -> None:
    result = parse(Place, words, "entrenar test")
    assert result is not None
    assert result.text in ("hello", "a=b")
    assert result.json == ("--json" in words)


def test_positional_is_required_and_single() -> None:
    assert complaint(command=Place) == "TEXT is needed: the text"
    assert complaint("a", "b", command=Place).startswith("what does 'b' belong to?")


@pytest.mark.parametrize("again", [["--data", "b"], ["--data=b"], ["data=b"]])
def test_a_flag_of_several_values_is_given_once(again: list[str]) -> None:
    assert complaint(*NEEDED, *again) == "--data is given twice; give it once, with all its values: --data A B"


def test_help_lists_every_setting_with_its_help_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(Command, ["--model", "m", "--help"], "entrenar test") is None
    text = capsys.readouterr().out
    for name, setting in settings_of(Command).items():
        assert f"--{name.replace('_', '-')}" in text
        assert setting.help in text
    assert "0.5" in text
    assert "A command for these tests." in text


@given(st.text().filter(lambda word: not word.startswith("--")), st.integers(), st.floats(allow_nan=False))
def test_any_value_comes_through_unchanged(prompt: str, seed: int, rate: float) -> None:
    words = read_words(settings_of(Command), ["--prompt", prompt, f"seed={seed}", "--rate", repr(rate)])
    assert words == {"prompt": [prompt], "seed": [str(seed)], "rate": [repr(rate)]}
