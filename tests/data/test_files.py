"""Reading: every format by its keys, and a clear word with file and line for everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entrenar import data
from entrenar.errors import ConfigError, DataError

pytestmark = pytest.mark.tier1

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [USER, ASSISTANT], "id": 7},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "input": "", "output": "A"},
        {"question": "Q", "answer": "A"},
    ],
    ids=lambda line: "+".join(line),
)
def test_formats_that_are_conversations(tmp_path: Path, line: object) -> None:
    source = data.read(write(tmp_path / "d.jsonl", line))
    assert [dict(m) for m in source.records[0].messages] == [USER, ASSISTANT]
    assert source.records[0].where == f"{tmp_path / 'd.jsonl'}:1"
    assert not source.plain


def test_alpaca_input_follows_the_instruction(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"instruction": "Add", "input": "1 2", "output": "3"})
    assert data.read(path).records[0].messages[0]["content"] == "Add\n\n1 2"


def test_prompt_and_text(tmp_path: Path) -> None:
    pair = data.read(write(tmp_path / "p.jsonl", {"prompt": "a", "completion": "b"})).records[0]
    assert (pair.prompt, pair.text) == ("a", "b")
    text = data.read(write(tmp_path / "t.jsonl", {"text": "x"})).records[0]
    assert (text.prompt, text.text) == (None, "x")


def test_tools_and_calls(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    record = data.read(write(tmp_path / "t.jsonl", {"messages": [USER, call], "tools": [{"name": "f"}]})).records[0]
    assert record.tools == ({"name": "f"},)
    assert record.messages[1]["tool_calls"] == call["tool_calls"]


def test_json_array_and_blank_lines_and_bom(tmp_path: Path) -> None:
    array = tmp_path / "d.json"
    array.write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    assert [r.where for r in data.read(array).records] == [f"{array}[0]", f"{array}[1]"]
    lines = tmp_path / "d.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b"}')
    assert [r.where for r in data.read(lines).records] == [f"{lines}:1", f"{lines}:3"]


@pytest.mark.parametrize("name", ["valid.jsonl", "validation.jsonl", "val.json", "dev.txt"])
def test_splits_of_a_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('[{"text": "v"}]' if name.endswith("json") else '{"text": "v"}')
    assert data.find(tmp_path, "valid") == tmp_path / name
    assert data.find(tmp_path, "train") is None
    assert data.read(tmp_path, "valid").files == (tmp_path / name,)
    with pytest.raises(DataError, match=r"no train split; looked for train\.jsonl"):
        data.read(tmp_path)
    with pytest.raises(ConfigError, match="split"):
        data.read(tmp_path, "all")


def test_two_files_for_one_split(tmp_path: Path) -> None:
    write(tmp_path / "valid.jsonl", {"text": "a"})
    write(tmp_path / "val.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=r"valid\.jsonl and val\.jsonl"):
        data.read(tmp_path, "valid")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "a"}\n{"text": \n', r":2: no JSON: .* column"),
        (b'{"text": "a"}\n[1]\n', r":2: must be a JSON object, is a list"),
        (b'{"text": 3}\n', r":1: 'text' must be a string, is a number"),
        (b'{"text": null}\n', r":1: 'text' must be a string, is null"),
        (b'{"text": "\\ud800"}\n', r":1: 'text' holds half of a surrogate pair"),
        (b'{"txt": "a"}\n', r":1: keys are 'txt'; expected messages, .*text"),
        (b"{}\n", r":1: keys are none"),
        (
            b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n',
            r":2: a prompt/completion record, but .*:1 is text",
        ),
        (b'{"text": "\xff"}\n', r":1: byte 10 is not UTF-8$"),
        (b'{"text": "a\n', r":1: no JSON: Unterminated string starting at column 10$"),
        (b"[" * 100_000 + b"\n", r":1: no JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", r":1: no JSON that can be read"),
        (b" \n\n", r"is empty"),
        (b'{"messages": []}\n', r":1: 'messages' is an empty list"),
        (b'{"messages": {"role": "user"}}\n', r":1: 'messages' must be a list of messages, is an object"),
        (b'{"messages": [{"content": "a"}]}\n', r":1: message 0: 'role' must be a string, is null"),
        (b'{"messages": [{"role": "user", "content": 1}]}\n', r":1: message 0: 'content' must be a string"),
        (b'{"conversations": [{"from": "alien", "value": "a"}]}\n', r":1: turn 0: 'from' is 'alien'"),
        (b'{"instruction": "a", "input": [], "output": "b"}\n', r":1: 'input' must be a string, is a list"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason) as error:
        data.read(path)
    assert str(path) in str(error.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        data.read(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="no data files"):
        data.read([])
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"\.parquet files are not read"):
        data.read(tmp_path / "d.parquet")
    (tmp_path / "d.txt").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(DataError, match=r"byte 8 \(line 2\) is not UTF-8"):
        data.read(tmp_path / "d.txt")
    (tmp_path / "d.json").write_text('{"text": "a"}')
    with pytest.raises(DataError, match="must be a JSON array"):
        data.read(tmp_path / "d.json")
    (tmp_path / "ok.txt").write_text("text")
    with pytest.raises(DataError, match="mix plain text with JSON"):
        data.read([tmp_path / "ok.txt", write(tmp_path / "d.jsonl", {"text": "a"})])


def test_plain_text_and_hold_out(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("0123456789")
    source = data.read(tmp_path)
    assert source.plain
    head, tail = data.hold_out(source, 0.2)
    assert (head.records[0].text, tail.records[0].text) == ("01234567", "89")
    lines = data.read(write(tmp_path / "d.jsonl", *({"text": str(i)} for i in range(10))))
    head, tail = data.hold_out(lines, 0.25)
    assert [r.text for r in tail.records] == ["8", "9"]
    assert len(head.records) == 8
    with pytest.raises(DataError, match="too little"):
        data.hold_out(data.read(write(tmp_path / "one.jsonl", {"text": "a"})), 0.1)
    with pytest.raises(ConfigError, match="fraction"):
        data.hold_out(lines, 1.0)


def test_hashes(tmp_path: Path) -> None:
    path = tmp_path / "abc.txt"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, example 1
    assert data.read(path).hashes() == {str(path): digest}
