"""What `entrenar inspect` shows of files and directories, well formed and not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from formats.gguf_bytes import gguf, small, text

from entrenar.formats import checkpoint, safetensors
from entrenar.formats.describe import describe

pytestmark = pytest.mark.tier2

TENSORS = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float16)}


def as_json(path: Path) -> dict[str, object]:
    """The description, through JSON that is valid (no NaN)."""
    result: dict[str, object] = json.loads(json.dumps(describe(path).as_dict(), allow_nan=False))
    return result


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(small())
    found = as_json(tmp_path / "x.gguf")
    assert found["kind"] == "gguf"
    assert found["ok"] is True
    assert found["error"] is None
    assert found["version"] == 3
    assert found["parameters"] == 38
    assert found["total_bytes"] == len(small())
    assert found["types"] == {
        "q8_0": {"tensors": 1, "parameters": 32, "bytes": 34},
        "f32": {"tensors": 1, "parameters": 6, "bytes": 24},
    }
    assert found["tensors"][0] == {"name": "a.weight", "shape": [2, 3], "type": "f32", "bytes": 24, "file": "x.gguf"}
    assert found["metadata"]["words"] == ["a", "", "bc"]
    assert found["problems"] == []


def test_values_are_shortened_to_a_line(tmp_path: Path) -> None:
    pairs = [
        ("ids", 9, struct.pack("<IQ9i", 5, 9, *range(9))),
        ("template", 8, text("x" * 1000)),
        ("nan", 6, struct.pack("<f", float("nan"))),
        ("bytes", 8, text(b"\xff")),
    ]
    (tmp_path / "x").write_bytes(gguf(pairs, [("t", (1,), 0, 0)]))
    found = describe(tmp_path / "x")
    assert found.ok
    assert found.metadata["ids"] == "array of i32, 9 elements"
    assert found.metadata["template"].endswith("… (1000 characters)")
    assert found.metadata["nan"] == "nan"
    assert found.metadata["bytes"] == "(not valid UTF-8)"
    assert len(found.problems) == 2
    assert "the data of its 1 tensors is not in the file" in found.problems[0]
    assert "key 'bytes'" in found.problems[1]


def test_directories_and_safetensors(tmp_path: Path) -> None:
    safetensors.write_directory(tmp_path, TENSORS, shard_size=10)
    assert describe(tmp_path).kind == "hf-directory"
    assert "has no config.json" in describe(tmp_path).problems[0]
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": [1, 2]}')
    found = describe(tmp_path)
    assert found.ok
    assert found.problems == []
    assert found.metadata == {"model_type": "llama", "eos_token_id": [1, 2], "format": "pt"}
    assert found.parameters == 10
    assert [row.file for row in found.tensors] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    single = describe(tmp_path / found.tensors[0].file)
    assert single.kind == "safetensors"
    assert [row.name for row in single.tensors] == ["a"]


def test_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "target_modules": ["q", "k", "v", 4, 5, 6, 7, 8, 9]}')
    assert describe(tmp_path).kind == "adapter"
    assert "adapter_model.safetensors: can't be read" in str(describe(tmp_path).error)
    safetensors.write(tmp_path / "adapter_model.safetensors", TENSORS)
    found = describe(tmp_path)
    assert found.ok
    assert found.metadata["r"] == 8
    assert found.metadata["target_modules"] == "9 elements"
    assert found.types["f16"]["parameters"] == 4


def test_a_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", TENSORS, {"step": 7})
    found = describe(tmp_path / "c")
    assert found.kind == "checkpoint"
    assert found.metadata == {"step": 7}
    assert found.parameters == 10
    (tmp_path / "c/state.json").write_text("{}")
    damaged = describe(tmp_path / "c")
    assert not damaged.ok
    assert "state.json: has 2 bytes" in str(damaged.error)


@pytest.mark.parametrize(
    ("name", "contents", "reason"),
    [
        ("x.gguf", b"GGML....", "begins with b'GGML'"),
        ("x", b"GGUF\1\0\0\0", "version 1"),
        ("x.safetensors", b"", "the file has 0 bytes"),
        ("x", b"\x02\0\0\0\0\0\0\0{x", "is expected"),
        ("x.txt", b"hello, world", "neither a GGUF nor a safetensors file"),
        ("x", b"", "neither a GGUF nor a safetensors file"),
    ],
)
def test_what_is_malformed_is_said_not_raised(tmp_path: Path, name: str, contents: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(contents)
    found = as_json(tmp_path / name)
    assert found["ok"] is False
    assert reason in str(found["error"])


def test_what_is_not_there(tmp_path: Path) -> None:
    assert "can't be read: No such file" in str(describe(tmp_path / "x").error)
    assert "has none of config.json" in str(describe(tmp_path).error)


def test_real_files(shared_data: Path) -> None:
    verdicts = json.loads((shared_data / "gguf/verdicts.json").read_text())
    for name, verdict in verdicts.items():
        assert as_json(shared_data / "gguf" / name)["ok"] is verdict["accept"], name
    model = describe(shared_data / "models/stories260K-q4_0.gguf")
    assert model.parameters == 260_032
    assert set(model.types) == {"f32", "q4_0"}
