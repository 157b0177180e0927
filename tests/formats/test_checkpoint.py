"""Checkpoints: what was saved comes back, damage is named, and no crash at any system call loses the last one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from formats.disk import Disk, Killed, remembered

from entrenar.errors import CheckpointError, ConfigError
from entrenar.formats import checkpoint, files, safetensors

pytestmark = pytest.mark.tier2

ARRAYS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "m": np.array([1.5, np.nan], ml_dtypes.bfloat16),
    "rng": np.array([2**64 - 1], np.uint64),
    "empty": np.zeros((0, 3), np.int64),
}
Saver = Callable[[Path, dict[str, Any], dict[str, Any]], Any]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    state = {"step": 3, "loss": 0.1, "none": None, "big": 2**127, "é": [1, "a", {"b": True}]}
    checkpoint.save(tmp_path / "deep/run/step-3", ARRAYS, state)
    arrays, loaded = checkpoint.load(tmp_path / "deep/run/step-3")
    assert loaded == state
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()
    assert sorted(p.name for p in (tmp_path / "deep/run").iterdir()) == ["step-3"]


def test_the_newest_is_the_one_saved_last_whatever_its_name(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None
    for step in (9, 10, 2):
        checkpoint.save(tmp_path / f"step-{step}", ARRAYS, {"step": step})
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-2", "step-10", "step-9"]
    checkpoint.save(tmp_path / "step-9", ARRAYS, {"step": 99})
    assert checkpoint.latest(tmp_path) == tmp_path / "step-9"
    assert checkpoint.load(tmp_path / "step-9")[1] == {"step": 99}
    shutil.move(tmp_path / "step-9", tmp_path / "renamed")
    assert checkpoint.latest(tmp_path) == tmp_path / "renamed"


def test_a_directory_that_is_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", ARRAYS, {})
    shutil.copytree(tmp_path / "a", tmp_path / "b.writing-1")
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "a"]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in range(5):
        checkpoint.save(tmp_path / f"{step}", ARRAYS, {})
    (tmp_path / "notes").mkdir()
    assert [p.name for p in checkpoint.prune(tmp_path, 2)] == ["2", "1", "0"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4", "notes"]
    assert checkpoint.prune(tmp_path, 2) == []
    assert [p.name for p in checkpoint.prune(tmp_path, 1)] == ["3"]
    with pytest.raises(ConfigError, match="keep: is 0; at least 1"):
        checkpoint.prune(tmp_path, 0)


@pytest.mark.parametrize("state", [{"a": {1, 2}}, {"a": b"x"}, {(1, 2): 3}])
def test_a_state_that_is_no_json(tmp_path: Path, state: Any) -> None:
    with pytest.raises(CheckpointError, match="can't be written as JSON"):
        checkpoint.save(tmp_path / "c", ARRAYS, state)
    assert list(tmp_path.iterdir()) == []


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no directory": (shutil.rmtree, "manifest.json: can't be read"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "is no complete checkpoint"),
    "manifest cut": (lambda p: os.truncate(p / "manifest.json", 30), "manifest.json: is not valid JSON"),
    "manifest is a list": (lambda p: (p / "manifest.json").write_text("[]"), "an object is expected"),
    "another format": (lambda p: edit(p, lambda m: m.update(format="x")), "is not the manifest of a checkpoint"),
    "another version": (lambda p: edit(p, lambda m: m.update(version=2)), "is not the manifest of a checkpoint"),
    "no files": (lambda p: edit(p, lambda m: m.pop("files")), "its files or its sequence number are missing"),
    "a path": (lambda p: edit(p, lambda m: m["files"].update({"../x": {}})), "its files or its sequence"),
    "a line of text": (
        lambda p: edit(p, lambda m: m["files"].update({"state.json": "x"})),
        "its files or its sequence",
    ),
    "no sequence": (lambda p: edit(p, lambda m: m.update(sequence="1")), "its files or its sequence"),
    "no arrays": (lambda p: (p / "arrays.safetensors").unlink(), "arrays.safetensors: can't be read"),
    "arrays cut": (lambda p: os.truncate(p / "arrays.safetensors", 50), "arrays.safetensors: has 50 bytes"),
    "state grown": (lambda p: (p / "state.json").write_text("{}" + " " * 99), "state.json: has 101 bytes"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_an_older_one_is_found(tmp_path: Path, name: str) -> None:
    damage, reason = DAMAGES[name]
    checkpoint.save(tmp_path / "old", ARRAYS, {})
    checkpoint.save(tmp_path / "new", ARRAYS, {"a": 1})
    damage(tmp_path / "new")
    with pytest.raises(CheckpointError, match=reason):
        checkpoint.load(tmp_path / "new")
    assert checkpoint.latest(tmp_path) == tmp_path / "old"


@pytest.mark.parametrize("file", ["arrays.safetensors", "state.json"])
def test_every_flipped_byte_is_found(tmp_path: Path, file: str) -> None:
    checkpoint.save(tmp_path / "c", ARRAYS, {"step": 1})
    original = (tmp_path / "c" / file).read_bytes()
    for at in range(0, len(original), 7):
        damaged = bytearray(original)
        damaged[at] ^= 1
        (tmp_path / "c" / file).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{file}: is damaged: its SHA-256"):
            checkpoint.load(tmp_path / "c")


def test_whole_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    """A faulty writer's checkpoint: the hashes are right, the contents are not."""
    checkpoint.save(tmp_path / "c", ARRAYS, {})
    (tmp_path / "c/state.json").write_bytes(b"[1]")
    line = checkpoint._write(tmp_path / "c/state.json", [b"[1]"])
    edit(tmp_path / "c", lambda m: m["files"].update({"state.json": line}))
    with pytest.raises(CheckpointError, match=r"state\.json: holds a JSON list"):
        checkpoint.load(tmp_path / "c")


# --- crashes ------------------------------------------------------------------------------------------


def version(root: Path) -> int:
    """The state that `latest` finds under `root`, every byte verified; 0 where there is none."""
    newest = checkpoint.latest(root)
    return 0 if newest is None else checkpoint.load(newest)[1]["version"]


class Lost(Exception):
    """A crash after which neither the old nor the new checkpoint is whole, or a committed one is gone."""


def check(root: Path, allowed: tuple[int, ...], when: str) -> None:
    try:
        found: Any = version(root)
    except CheckpointError as error:
        found = error
    if found not in allowed:
        raise Lost(f"{when}: found {found}")


def survives(save: Saver, folder: Path, target: str) -> None:
    """Save version 2 over a directory that holds version 1, in `target`, stopping at every system call.

    Raises Lost unless version 1 or 2 is found afterwards, 2 if `save` returned, and saving again then works.
    """
    before, root = folder / "before", folder / "root"
    checkpoint.save(before / "a", ARRAYS, {"version": 1})

    def attempt(stop_at: int, error: int | None) -> tuple[bool, Disk]:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, stop_at, error)
            try:
                save(root / target, ARRAYS, {"version": 2})
            except (Killed, OSError):
                return False, disk
            return True, disk

    returned, disk = attempt(0, None)
    assert returned
    assert version(root) == 2
    total = len(disk.steps)
    assert total > 10
    for error in (None, errno.EIO, errno.ENOSPC):
        for stop_at in range(1, total + 1):
            returned, _ = attempt(stop_at, error)
            check(root, (2,) if returned else (1, 2), f"call {stop_at}, error {error}")
            checkpoint.save(root / "next", ARRAYS, {"version": 3})
            check(root, (3,), f"saving after call {stop_at}, error {error}")
            assert not [p for p in root.iterdir() if ".writing-" in p.name]
    for count in range(total + 1):
        for all_entries in (False, True):
            shutil.rmtree(folder / "after", ignore_errors=True)
            shutil.copytree(before, folder / "after")
            remembered(disk.steps[:count], root, folder / "after", all_entries)
            check(folder / "after", (2,) if count == total else (1, 2), f"power loss after call {count}")


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is simulated, so waiting for the real one shows nothing."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("target", ["a", "b"], ids=["replacing", "adding"])
def test_the_last_checkpoint_survives_every_crash(tmp_path: Path, target: str) -> None:
    survives(checkpoint.save, tmp_path, target)


def forgets_to_sync_files(path: Path, arrays: Any, state: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.Writer, "sync", lambda self: None)
        checkpoint.save(path, arrays, state)


def forgets_to_sync_directories(path: Path, arrays: Any, state: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "sync_directory", lambda path: None)
        checkpoint.save(path, arrays, state)


def removes_the_old_one_first(path: Path, arrays: Any, state: Any) -> None:
    shutil.rmtree(path, ignore_errors=True)
    checkpoint.save(path, arrays, state)


def writes_in_place(path: Path, arrays: Any, state: Any) -> None:
    path.mkdir(exist_ok=True)
    text = json.dumps(state).encode()
    lines = {
        checkpoint.ARRAYS: checkpoint._write(
            path / checkpoint.ARRAYS, [safetensors.header(arrays), *safetensors.chunks(arrays)]
        ),
        checkpoint.STATE: checkpoint._write(path / checkpoint.STATE, [text]),
    }
    manifest = {"format": "entrenar checkpoint", "version": 1, "sequence": 9, "files": lines}
    checkpoint._write(path / checkpoint.MANIFEST, [json.dumps(manifest).encode()])
    files.sync_directory(path)
    files.sync_directory(path.parent)


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize(
    ("save", "when"),
    [
        (forgets_to_sync_files, "power loss"),
        (forgets_to_sync_directories, "power loss"),
        (removes_the_old_one_first, "call"),
        (writes_in_place, "call"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_harness_catches_bad_savers(tmp_path: Path, save: Saver, when: str) -> None:
    with pytest.raises(Lost, match=f"^{when}"):
        survives(save, tmp_path, "a")
