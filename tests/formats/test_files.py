"""Mapping, JSON and atomic writing."""

from __future__ import annotations

import errno
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from formats.disk import Disk, Killed, remembered

from entrenar.errors import FormatError
from entrenar.formats import files

pytestmark = pytest.mark.tier2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' is there twice"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'"a"', "holds a JSON str; an object is expected"),
    ],
)
def test_json_that_is_none(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(FormatError, match=f"x.json: .*{reason}"):
        files.read_json(tmp_path / "x.json")


def test_json_has_a_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_json(tmp_path / "x.json", {"é": [1, None]})
    assert files.read_json(tmp_path / "x.json") == {"é": [1, None]}
    monkeypatch.setattr(files, "MAX_JSON", 5)
    with pytest.raises(FormatError, match="at most 5"):
        files.read_json(tmp_path / "x.json")


def test_views_of_unaligned_bytes_are_read_only_copies() -> None:
    buffer = b"x" + np.array([1.5, -2], "<f4").tobytes()
    values = files.view(buffer, np.dtype("<f4"), 2, 1)
    assert values.tolist() == [1.5, -2]
    assert values.flags.aligned
    assert not values.flags.writeable


def test_pages_that_were_given_back_are_read_again(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "x").write_bytes(data)
    buffer = files.map_file(tmp_path / "x")
    assert buffer[:] == data
    files.forget_pages(buffer, 10, 99_000)
    files.forget_pages(buffer, 10, 20)
    files.forget_pages(data, 0, 100_000)
    assert buffer[:] == data


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8, bool])
def test_bytes_are_in_c_order(dtype: type) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    assert bytes(files.as_bytes(array)) == array.tobytes()
    assert bytes(files.as_bytes(array.T[::-1])) == array.T[::-1].tobytes()
    assert bytes(files.as_bytes(array[:0])) == b""
    assert bytes(files.as_bytes(array[0, 0, 1])) == array[0, 0, 1].tobytes()


def test_a_write_that_the_system_cuts_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = files.os.write
    monkeypatch.setattr(files.os, "write", lambda fd, data: write(fd, data[:7]))
    data = bytes(range(100))
    with files.atomic_file(tmp_path / "x") as file:
        file.write(data)
        assert file.size == 100
    assert (tmp_path / "x").read_bytes() == data


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")  # as the system says it: without a path

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(OSError, match="No space") as caught, files.atomic_file(tmp_path / "x") as file:
        file.write(b"new")
    assert caught.value.filename == str(tmp_path / "x")


@pytest.mark.parametrize("error", [None, errno.EIO, errno.ENOSPC])
def test_an_atomic_file_is_the_old_or_the_new_one_after_any_crash(tmp_path: Path, error: int | None) -> None:
    for stop_at in range(1, 8):
        (tmp_path / "x").write_bytes(b"old")
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, stop_at, error)
            try:
                with files.atomic_file(tmp_path / "x") as file:
                    file.write(b"ne")
                    file.write(b"w")
                returned = True
            except (Killed, OSError):
                returned = False
        assert (tmp_path / "x").read_bytes() in ((b"new",) if returned else (b"old", b"new"))
        if error:
            assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert returned
    for count in range(len(disk.steps) + 1):
        for all_entries in (False, True):
            after = tmp_path / f"after-{error}-{count}-{all_entries}"
            after.mkdir()
            (after / "x").write_bytes(b"old")
            remembered(disk.steps[:count], tmp_path, after, all_entries)
            assert (after / "x").read_bytes() in ((b"new",) if count == len(disk.steps) else (b"old", b"new"))
