"""Files of training data: where a split lies, and its records.

JSON Lines (.jsonl, .ndjson) and JSON arrays (.json) hold samples; any other file is plain text, one document.
A directory holds train, valid (or validation, val, dev, eval) and test files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from entrenar.data.records import Record, record
from entrenar.errors import ConfigError, DataError

AnyPath = str | PathLike[str]
SPLITS = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}
LINES, ARRAY, PLAIN = (".jsonl", ".ndjson"), (".json",), (".txt", ".text", ".md")
REFUSED = (
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".gz",
    ".zst",
    ".zip",
    ".xz",
    ".bz2",
    ".gguf",
    ".safetensors",
    ".bin",
)


@dataclass(frozen=True, slots=True)
class Source:
    """The records of one split.

    Attributes:
        files: where they came from. plain: whether they are whole documents of plain text, to be cut into
        windows.
    """

    records: tuple[Record, ...]
    files: tuple[Path, ...]
    plain: bool

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file, for the record of a run."""
        return {str(path): sha256(path) for path in self.files}


def find(path: AnyPath, split: str) -> Path | None:
    """The file of `split` in a directory, or None. Raises DataError where two files claim to be it."""
    names = [stem + suffix for stem in SPLITS[split] for suffix in (*LINES, *ARRAY, *PLAIN)]
    found = [Path(path) / name for name in names if (Path(path) / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{path}: both {found[0].name} and {found[1].name} could be the {split} split; keep one")
    return found[0] if found else None


def read(paths: AnyPath | Iterable[AnyPath], split: str = "train") -> Source:
    """The records of `split`: from a directory its file of that name; files are read as they are.

    Raises DataError naming file and line: a file that is missing, empty, no UTF-8 or no JSON, a wrong type,
    and kinds of record that differ.
    """
    if split not in SPLITS:
        raise ConfigError("split", f"is {split!r}; one of {', '.join(SPLITS)}")
    given = [paths] if isinstance(paths, str | PathLike) else list(paths)
    files = tuple(_file(Path(path), split) for path in given)
    if not files:
        raise DataError("no data files were given")
    plain = {path.suffix.lower() not in (*LINES, *ARRAY) for path in files}
    if len(plain) == 2:
        raise DataError(f"{files[0]} and others mix plain text with JSON; give them in separate runs")
    return Source(_one_kind(r for path in files for r in _records(path)), files, plain.pop())


def hold_out(source: Source, fraction: float) -> tuple[Source, Source]:
    """The source without its last part, and that part: of plain text the last characters, else the last
    records.

    Raises DataError where either would be empty.
    """
    if not 0 < fraction < 1:
        raise ConfigError("fraction", f"is {fraction}; must lie between 0 and 1")
    if source.plain:
        cuts = [(r, int(len(r.text) * (1 - fraction))) for r in source.records]
        head = tuple(replace(r, text=r.text[:cut]) for r, cut in cuts if cut > 0)
        tail = tuple(replace(r, text=r.text[cut:]) for r, cut in cuts if cut < len(r.text))
    else:
        cut = len(source.records) - round(len(source.records) * fraction)
        head, tail = source.records[:cut], source.records[cut:]
    if not head or not tail:
        raise DataError(f"{source.files[0]}: too little to hold out {fraction:.0%} of it; 0 holds out nothing")
    return replace(source, records=head), replace(source, records=tail)


def sha256(path: AnyPath) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file(path: Path, split: str) -> Path:
    if path.is_dir():
        found = find(path, split)
        if found is None:
            wanted = ", ".join(f"{stem}.jsonl" for stem in SPLITS[split])
            raise DataError(f"{path}: no {split} split; looked for {wanted} (or .json, .txt)")
        return found
    if not path.is_file():
        raise DataError(f"{path}: {'is no regular file' if path.exists() else 'no such file or directory'}")
    if path.suffix.lower() in REFUSED:
        raise DataError(f"{path}: {path.suffix} files are not read; convert it to JSON Lines or plain text")
    return path


def _one_kind(records: Iterable[Record]) -> tuple[Record, ...]:
    kept = tuple(records)
    first = kept[0]
    other = next((r for r in kept if r.kind != first.kind), None)
    if other is not None:
        raise DataError(
            f"{other.where}: a {other.kind} record, but {first.where} is {first.kind}; one run takes one kind"
        )
    return kept


def _records(path: Path) -> Iterator[Record]:
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from e
    if not data.strip():
        raise DataError(f"{path}: is empty")
    suffix = path.suffix.lower()
    if suffix in LINES:
        for number, line in enumerate(data.split(b"\n"), 1):
            if line.strip():
                where = f"{path}:{number}"
                yield record(where, _json(where, line))
    elif suffix in ARRAY:
        items = _json(str(path), data)
        if not isinstance(items, list) or not items:
            raise DataError(f"{path}: must be a JSON array with a sample in it; one sample a line is .jsonl")
        for number, item in enumerate(items):
            yield record(f"{path}[{number}]", item)
    else:
        yield Record(str(path), "plain text", _utf8(str(path), data))


def _utf8(where: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        place = f"byte {e.start} (line {line})" if line > 1 else f"byte {e.start}"
        raise DataError(f"{where}: {place} is not UTF-8") from None


def _json(where: str, data: bytes) -> object:
    text = _utf8(where, data)
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(f"{where}: no JSON: {e.msg.removesuffix(' at')} at column {e.colno}") from None
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, nesting without end
        raise DataError(f"{where}: no JSON that can be read: {e}") from None
