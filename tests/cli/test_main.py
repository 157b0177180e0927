"""The program as its user meets it: exit codes, one line for every error, a light help screen."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from entrenar import cli
from entrenar.errors import ConfigError, DataError, FormatError

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, "-m", "entrenar.cli"]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = cli.main(args)
    out, err = capsys.readouterr()
    return code, out, err


def program(*args: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([*PROGRAM, *args], input=stdin, capture_output=True, text=True, env=env, timeout=60)


@pytest.mark.tier1
def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.tier1
def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 2
    assert out.startswith("usage: entrenar COMMAND")


@pytest.mark.tier1
def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import entrenar

    assert run(capsys, "--version") == (0, f"entrenar {entrenar.__version__}\n", "")


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (["finetun"], 2, "entrenar: there is no command 'finetun'; did you mean finetune?"),
        (["xyz"], 2, "entrenar: there is no command 'xyz'; entrenar --help lists them"),
        (["inspect"], 2, "entrenar inspect: PATH is needed: the file or directory"),
        (["inspect", "a", "--jsn"], 2, "entrenar inspect: unknown flag --jsn; did you mean --json?"),
        (["inspect", "no.gguf"], 1, "entrenar inspect: no.gguf: can't be read: No such file or directory"),
        (["inspect", "--config", "no.toml"], 1, "entrenar inspect: no.toml: No such file or directory"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, *args) == (code, "", f"{line}\n")


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("rank", "0 is not a rank"), 2, "rank: 0 is not a rank"),
        (FormatError("m.gguf", "byte 8", "is cut off"), 1, "m.gguf: byte 8: is cut off"),
        (DataError("d.jsonl:3: no\nJSON"), 1, "d.jsonl:3: no JSON"),
        (OSError(28, "No space left on device", "run/x"), 1, "run/x: No space left on device"),
        (MemoryError(), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("x"), 1, "internal error: KeyError: 'x'; ENTRENAR_LOG=debug shows where"),
    ],
)
def test_every_error_has_its_exit_code(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: object) -> int:
        raise error

    monkeypatch.setattr("entrenar.cli.doctor.Command.run", fail)
    assert run(capsys, "doctor") == (code, "", f"entrenar doctor: {line}\n")
    monkeypatch.setenv("ENTRENAR_LOG", "debug")
    assert "Traceback" in run(capsys, "doctor")[2]


@pytest.mark.tier1
def test_unknown_log_level_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENTRENAR_LOG", "loud")
    code, _, err = run(capsys, "doctor")
    assert code == 2
    assert err == "entrenar doctor: ENTRENAR_LOG is 'loud'; it may be debug, info, warning, error\n"


@pytest.mark.tier1
def test_command_modules_answer_to_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        code, out, err = run(capsys, name, "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"usage: entrenar {name}")
        assert "(default:" in out


@pytest.mark.tier2
def test_overview_imports_nothing_heavy() -> None:
    code = "import sys; from entrenar.cli import main; main(['--help']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"tyro", "numpy", "rich"} & set(out.splitlines()[-1].split()) == set()


@pytest.mark.tier2
def test_a_reader_that_leaves_is_no_error() -> None:
    with subprocess.Popen([*PROGRAM, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.tier2
def test_a_terminal_without_unicode_is_no_error(tmp_path: Path) -> None:
    done = program("inspect", str(tmp_path / "漢.gguf"), PYTHONIOENCODING="ascii")
    assert done.returncode == 1
    assert done.stderr.endswith("/?.gguf: can't be read: No such file or directory\n")


@pytest.mark.tier2
@pytest.mark.parametrize(("closed", "code"), [("<&-", 0), (">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0)])
def test_closed_standard_streams_are_as_the_null_device(closed: str, code: int) -> None:
    done = subprocess.run(f"{shlex.join(PROGRAM)} doctor {closed}", shell=True, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, b"")


@pytest.mark.tier1
def test_an_empty_variable_is_an_unset_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ENTRENAR_LOG", "")
    assert run(capsys, "--version")[0] == 0


@pytest.mark.tier2
@pytest.mark.parametrize("isa", ["scalar", "wrong"])
def test_isa_is_forced_or_refused(isa: str) -> None:
    done = program("doctor", "--json", ENTRENAR_ISA=isa)
    if isa == "scalar":
        assert json.loads(done.stdout)["isa"] == "scalar"
    else:
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("entrenar doctor: ENTRENAR_ISA=wrong")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.tier1
def test_doctor_says_what_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from entrenar.cli import doctor

    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "nothing is missing" in out
    names = doctor.needed_packages()
    assert {"numpy", "tokenizers", "tyro"} <= set(names)
    assert "pytest" not in names
    monkeypatch.setattr(doctor, "needed_packages", lambda: [*names, "no-such-package"])
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    assert "no-such-package is not installed: pip install no-such-package" in out


@pytest.mark.tier1
def test_doctor_tells_a_build_that_imitates_amx() -> None:
    from entrenar.cli import doctor

    facts = {"isa": "avx512", "available_isas": ["amx", "avx512"], "software_tiles": False}
    assert doctor.kernels(facts) == "avx512 (this CPU offers amx, avx512)"
    assert "software" in doctor.kernels({**facts, "software_tiles": True})


@pytest.mark.tier1
def test_doctor_without_the_native_core(monkeypatch: pytest.MonkeyPatch) -> None:
    from entrenar.cli import doctor

    monkeypatch.setitem(sys.modules, "entrenar.backend", None)
    monkeypatch.delattr("entrenar.backend", raising=False)
    missing: list[str] = []
    assert doctor.native(missing) == {}
    assert "native core" in missing[0]


@pytest.mark.tier1
def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    from entrenar.cli.output import print_json

    print_json({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": "é"}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": {"d": "é"}}


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (1_185_376, "1.19 MB"), (4_080_000_000, "4.08 GB")],
)
def test_sizes_are_decimal(nbytes: int, text: str) -> None:
    from entrenar.cli.output import size

    assert size(nbytes) == text


@pytest.mark.tier1
def test_quickstart_tells_its_story_where_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tell(out: str, console: Console, seed: int) -> dict[str, object]:
        console.print("the story")
        return {"out": out, "seed": seed}

    monkeypatch.setattr("entrenar.quickstart.story.tell", tell)
    assert run(capsys, "quickstart") == (0, "the story\n", "")
    code, out, err = run(capsys, "quickstart", "--out", "here", "--seed", "3", "--json")
    assert (code, json.loads(out), err) == (0, {"out": "here", "seed": 3}, "the story\n")


@pytest.mark.tier1
def test_an_interrupted_quickstart_says_so_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("entrenar.quickstart.story.tell", lambda *_: {"stopped_by": "SIGTERM"})
    code, out, err = run(capsys, "quickstart")
    assert (code, out, err) == (143, "", "stopped by SIGTERM; entrenar quickstart begins again\n")
