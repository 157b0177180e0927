"""``entrenar inspect``: the verdict of llama.cpp on its own hostile files, and what a reader is shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from entrenar.cli import main
from entrenar.cli.inspect import printable
from entrenar.formats import gguf_write


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    metadata = {"general.architecture": "llama", "general.name": "a\x1b[31mb\nc"}
    weights = np.arange(12, dtype=np.float32).reshape(3, 4)
    gguf_write.write(path, metadata, [("w", weights), ("h", weights.astype(np.float16))])
    return path


@pytest.mark.tier1
def test_table_names_every_tensor(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{small}: gguf version 3, well formed"
    assert lines[1].startswith("24 parameters in 2 tensors, ")
    rows = [line.split() for line in lines]
    assert ["w", "3x4", "f32", "48", "bytes"] in rows
    assert ["h", "3x4", "f16", "24", "bytes"] in rows


@pytest.mark.tier1
def test_names_cannot_drive_the_terminal(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(small)])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"a\x1b[31mb\nc" in out


@pytest.mark.tier1
def test_json_is_one_object(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["parameters"] == 24
    assert [t["name"] for t in found["tensors"]] == ["w", "h"]


@pytest.mark.tier1
def test_cut_file_is_refused_with_place_and_reason(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write_bytes(small.read_bytes()[:40])
    assert main(["inspect", str(small)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"entrenar inspect: {small}: byte ")
    assert len(err.splitlines()) == 1
    assert main(["inspect", str(small), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.tier2
def test_verdicts_of_llama_cpp(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = json.loads((shared_data / "gguf/verdicts.json").read_text())
    files = sorted((shared_data / "gguf").glob("*.gguf"))
    assert len(files) >= 26
    ours = {file.name: main(["inspect", str(file)]) == 0 for file in files}
    assert ours == {file.name: verdicts[file.name]["accept"] for file in files}
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.tier1
@pytest.mark.parametrize(("text", "shown"), [("é 漢", "é 漢"), ("\u202ex", r"\u202ex"), ("\r\t", r"\r\t")])
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
