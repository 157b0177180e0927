"""Where a command's result goes, decided before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from entrenar.errors import UsageError
from entrenar.formats.gguf_read import SHARD
from entrenar.models.save import is_gguf


def free_place(out: str, force: bool, *kept: str | None) -> Path:
    """The path to write to, refused where something would be lost without the user's word.

    Args:
        kept: what the result is made from and must outlive it, `force` or not.

    Raises:
        UsageError: it can't be written there, or must not be.
    """
    path = Path(out)
    gguf = is_gguf(path)
    if gguf and path.is_dir():
        raise UsageError(f"{path} is a directory, and a name ending in .gguf is a file's; choose another name")
    if not gguf and path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, and a directory is to be written; choose another name")
    if SHARD.fullmatch(path.name):
        raise UsageError(f"{path}: that is the name of a part of a model, and one file is written; choose another name")
    for other in kept:
        if other is not None and path.exists() and Path(other).exists() and path.samefile(other):
            raise UsageError(f"{path} would take the place of {other}, which it is made from; choose another name")
    if path.exists() and (gguf or any(path.iterdir())) and not force:
        raise UsageError(f"{path} exists; --force replaces it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: the directory {path.absolute().parent} does not exist")
    return path
