"""The pages keep their word: links lead somewhere, code compiles, commands and flags exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from entrenar.cli import COMMANDS
from entrenar.cli.settings import CONFIG, read_file, read_words, settings_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("csrc/*.md"), *ROOT.glob("bench/**/*.md")])
CONFIGS = sorted(ROOT.glob("docs/**/configs/*.toml"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(*languages: str) -> list[tuple[str, str]]:
    """Page and text of every fenced block in one of these languages."""
    found = ((page, *match.groups()) for page in PAGES for match in BLOCK.finditer(page.read_text()))
    return [(page.relative_to(ROOT).as_posix(), text) for page, language, text in found if language in languages]


def shell_lines() -> list[tuple[str, str]]:
    """Page and text of every command of a shell block, continued lines joined."""
    lines = []
    for page, text in blocks("bash", "console", "sh"):
        for line in text.replace("\\\n", " ").splitlines():
            lines.append((page, line.removeprefix("$ ").strip()))
    return lines


@pytest.mark.tier1
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text())
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    assert [t for t in targets if not (page.parent / t.partition("#")[0]).exists()] == []


@pytest.mark.tier1
@pytest.mark.parametrize(("page", "text"), blocks("python"))
def test_python_compiles_and_names_are_public(page: str, text: str) -> None:
    import entrenar

    compile(text, page, "exec")
    assert set(re.findall(r"\ben\.(\w+)", text)) <= set(entrenar.__all__)


@pytest.mark.tier1
@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_toml_is_toml(page: str, text: str) -> None:
    assert tomllib.loads(text)


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("page", "line"), [(page, line) for page, line in shell_lines() if line.startswith("entrenar ")]
)
def test_commands_and_flags_exist(page: str, line: str) -> None:
    if line.startswith("entrenar finetune:"):  # what the program printed
        return
    name, *args = shlex.split(line, comments=True)[1:]
    known = settings_of(import_module(COMMANDS[name][0]).Command)
    words = read_words(known, args)
    needed = {s.name for s in known.values() if s.required}
    assert needed <= set(words) or CONFIG.name in words


@pytest.mark.tier1
@pytest.mark.parametrize(("page", "line"), [(p, line) for p, line in shell_lines() if line.startswith("make ")])
def test_make_verbs_exist(page: str, line: str) -> None:
    verbs = re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split()[1] in verbs


@pytest.mark.tier1
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_example_configs_are_settings_of_train(path: Path) -> None:
    from entrenar.cli.train import Command
    from entrenar.models.spec import ModelConfig

    words = read_file(settings_of(Command), path)
    assert float(words["learning_rate"][0]) < 1e-3
    sizes = {"124m": 123_685_632, "7b": 6_738_415_616, "13b": 13_015_864_320, "70b": 68_976_648_192}
    assert ModelConfig(**tomllib.loads(path.read_text())["model"]).num_parameters() == sizes[path.stem]


@pytest.mark.tier1
def test_every_public_command_is_in_the_tutorial_or_readme() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/tutorial.md").read_text()
    assert [name for name in COMMANDS if f"entrenar {name}" not in text and f"make {name}" not in text] == []
