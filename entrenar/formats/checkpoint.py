"""Training checkpoints: a directory that is there whole or not at all.

A checkpoint holds `arrays.safetensors` (every array), `state.json` (everything else) and `manifest.json`,
written last, with the size and SHA-256 of the others. It is written beside its target and renamed into place,
each file and directory fsynced, so that after a kill or a power loss at any point the newest committed
checkpoint is still there. Loading trusts the manifest, never a directory's name, and nothing is ever
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from entrenar.errors import CheckpointError, ConfigError, FormatError
from entrenar.formats import safetensors
from entrenar.formats.files import (
    Array,
    LazyArray,
    PathType,
    durable_file,
    map_file,
    read_json,
    sync_directory,
)

ARRAYS, STATE, MANIFEST = "arrays.safetensors", "state.json", "manifest.json"
_FORMAT, _VERSION = "entrenar checkpoint", 1
_WRITING, _REPLACED = ".writing-", ".replaced-"  # in names of directories


def save(path: PathType, arrays: Mapping[str, Array | LazyArray], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint at `path`, replacing one that is there. One process at a time saves in a directory.

    When this returns the checkpoint survives a power loss; if it raises or the process dies, what was
    committed before is still what `latest` finds. Raises CheckpointError for a `state` that is no JSON,
    OSError as the disk gives it.
    """
    target = Path(path).absolute()
    try:
        text = json.dumps(state, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{target}: the state can't be written as JSON: {error}") from error
    root = target.parent
    if not root.is_dir():
        root.mkdir(parents=True)
        sync_directory(root.parent)
    _sweep(root)
    temporary = root / f"{target.name}{_WRITING}{os.getpid()}"
    os.mkdir(temporary)
    try:
        files = {
            ARRAYS: _write(temporary / ARRAYS, chain([safetensors.header(arrays)], safetensors.chunks(arrays))),
            STATE: _write(temporary / STATE, [text]),
        }
        sequence = max((manifest["sequence"] for _, manifest in _committed(root)), default=0) + 1
        manifest = {"format": _FORMAT, "version": _VERSION, "sequence": sequence, "files": files}
        _write(temporary / MANIFEST, [json.dumps(manifest, indent=1).encode()])
        sync_directory(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        # Under its new name the old one still counts as a checkpoint, until the new one is in place.
        os.rename(target, root / f"{target.name}{_REPLACED}{os.getpid()}")
    os.rename(temporary, target)
    sync_directory(root)
    _sweep(root)
    return target


def load(path: PathType) -> tuple[safetensors.SafeTensors, dict[str, Any]]:
    """The arrays (read-only views of the mapped file: copy what is to be changed) and the state.

    Every byte is compared with the manifest first. Raises CheckpointError that names the file that is
    missing, damaged or cut short.
    """
    target = Path(path)
    for name, expected in _manifest(target)["files"].items():
        try:
            buffer = map_file(target / name)
        except FormatError as error:
            raise CheckpointError(f"{error.path}: {error.reason}") from error
        if len(buffer) != expected["size"]:
            raise CheckpointError(f"{target / name}: has {len(buffer)} bytes; its manifest says {expected['size']}")
        if hashlib.sha256(buffer).hexdigest() != expected["sha256"]:
            raise CheckpointError(f"{target / name}: is damaged: its SHA-256 is not that of the manifest")
    try:
        return safetensors.read(target / ARRAYS), read_json(target / STATE)
    except FormatError as error:  # written like this: a checkpoint of a faulty or another program
        raise CheckpointError(str(error)) from error


def latest(root: PathType) -> Path | None:
    """The checkpoint committed last under `root`, None where there is none. Its contents are verified by
    `load`."""
    found = checkpoints(root)
    return found[0] if found else None


def checkpoints(root: PathType) -> list[Path]:
    """Committed checkpoints under `root`, the newest first."""
    ordered = sorted(_committed(Path(root)), key=lambda pair: pair[1]["sequence"], reverse=True)
    return [path for path, _ in ordered]


def prune(root: PathType, keep: int) -> list[Path]:
    """Delete all but the newest `keep` (at least 1) checkpoints; returns those deleted. Call it after a
    save."""
    if keep < 1:
        raise ConfigError("keep", f"is {keep}; at least 1 checkpoint must stay")
    old = checkpoints(root)[keep:]
    for path in old:
        _remove(path)
    return old


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and fsync one file; returns its line of the manifest."""
    digest = hashlib.sha256()
    with durable_file(path) as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
    return {"size": file.size, "sha256": digest.hexdigest()}


def _manifest(path: Path) -> dict[str, Any]:
    """The checked manifest of a checkpoint. Raises CheckpointError."""
    where = path / MANIFEST
    try:
        manifest = read_json(where)
    except FormatError as error:
        raise CheckpointError(f"{where}: {error.reason}; {path} is no complete checkpoint") from error
    if manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
        raise CheckpointError(f"{where}: is not the manifest of a checkpoint of version {_VERSION}")
    files, sequence = manifest.get("files"), manifest.get("sequence")
    well_formed = (
        isinstance(sequence, int)
        and isinstance(files, dict)
        and files.keys() == {ARRAYS, STATE}
        and all(isinstance(line, dict) and line.keys() == {"size", "sha256"} for line in files.values())
    )
    if not well_formed:
        raise CheckpointError(f"{where}: is damaged: its files or its sequence number are missing")
    return manifest


def _committed(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Checkpoints under `root` whose manifest is whole and whose files have the sizes it says."""
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        if _WRITING in path.name or not (path / MANIFEST).is_file():
            continue
        try:
            manifest = _manifest(path)
            sizes = {name: (path / name).stat().st_size for name in manifest["files"]}
        except (CheckpointError, OSError):
            continue  # incomplete, so never committed; loading it by name says what is wrong
        if all(line["size"] == sizes[name] for name, line in manifest["files"].items()):
            yield path, manifest


def _sweep(root: Path) -> None:
    """Remove what interrupted saves left; a checkpoint that was being replaced only if its successor is there."""
    committed = {path.name for path, _ in _committed(root)}
    for path in sorted(root.iterdir()):
        name, replaced, _ = path.name.partition(_REPLACED)
        if _WRITING in path.name or (replaced and name in committed):
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a checkpoint; without its manifest, which goes first, it is none."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)
