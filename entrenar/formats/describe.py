"""What a file or directory holds, as plain data: what `entrenar inspect` prints.

`describe` never raises on what it finds: a malformed file is a description whose `error` says why and where.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrenar.errors import CheckpointError, FormatError
from entrenar.formats import checkpoint, gguf_read, safetensors
from entrenar.formats.files import PathType, map_file, read_json

ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG = "adapter_config.json", "adapter_model.safetensors", "config.json"


@dataclass(frozen=True)
class Row:
    """One line of the tensor table; `shape` in numpy's order, `file` the name of the file that holds it."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    file: str


@dataclass
class Description:
    """What is at `path`.

    Attributes:
        kind: gguf, safetensors, hf-directory, adapter, checkpoint, or "" where it is none of these.
        error: why it is malformed, None where it is well formed. problems: what is amiss though it is well
        formed.
        version: of the format, where it has one. metadata: key -> value, long lists and texts shortened to
        words.
        tensors: all of them. total_bytes: size of the files that hold them.
    """

    path: str
    kind: str = ""
    error: FormatError | CheckpointError | None = None
    version: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: list[Row] = field(default_factory=list)
    total_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True where the file is well formed."""
        return self.error is None

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(_elements(row.shape) for row in self.tensors)

    @property
    def types(self) -> dict[str, dict[str, int]]:
        """Per storage type: number of tensors, parameters and bytes, the largest first."""
        tensors, parameters, nbytes = Counter[str](), Counter[str](), Counter[str]()
        for row in self.tensors:
            tensors[row.type] += 1
            parameters[row.type] += _elements(row.shape)
            nbytes[row.type] += row.nbytes
        return {
            name: {"tensors": tensors[name], "parameters": parameters[name], "bytes": size}
            for name, size in nbytes.most_common()
        }

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "path": self.path,
            "kind": self.kind,
            "ok": self.ok,
            "error": None if self.error is None else str(self.error),
            "version": self.version,
            "metadata": self.metadata,
            "parameters": self.parameters,
            "types": self.types,
            "total_bytes": self.total_bytes,
            "problems": self.problems,
            "tensors": [
                {
                    "name": row.name,
                    "shape": list(row.shape),
                    "type": row.type,
                    "bytes": row.nbytes,
                    "file": row.file,
                }
                for row in self.tensors
            ],
        }


def describe(path: PathType) -> Description:
    """Look at a file or directory without loading weights."""
    result = Description(str(path))
    try:
        result.kind = _kind(Path(path))
        _READERS[result.kind](Path(path), result)
    except (FormatError, CheckpointError) as error:
        result.error = error
    return result


def _kind(path: Path) -> str:
    """Decided by contents; by the name only where the contents say nothing."""
    if path.is_dir():
        for name, kind in (
            (checkpoint.MANIFEST, "checkpoint"),
            (ADAPTER_CONFIG, "adapter"),
            (CONFIG, "hf-directory"),
            (safetensors.SINGLE, "hf-directory"),
            (safetensors.INDEX, "hf-directory"),
        ):
            if (path / name).is_file():
                return kind
        raise FormatError(
            path,
            "",
            f"has none of {CONFIG}, {ADAPTER_CONFIG}, {safetensors.SINGLE} and {checkpoint.MANIFEST}",
        )
    head = map_file(path)[:9]
    if head[:4] == b"GGUF" or path.suffix == ".gguf":
        return "gguf"
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    raise FormatError(path, "byte 0", f"begins with {head[:8]!r}: neither a GGUF nor a safetensors file")


def _gguf(path: Path, result: Description) -> None:
    model = gguf_read.read(path)
    result.version = model.version
    result.total_bytes = model.file_bytes
    result.problems = model.problems()
    result.tensors = [
        Row(info.name, info.shape, info.qtype.name, info.nbytes, Path(model.paths[info.part]).name)
        for info in model.tensors.values()
    ]
    for key in model.metadata:
        length = model.metadata.length(key)
        if length is not None and length > 8:
            result.metadata[key] = f"{model.metadata.type_name(key)}, {length} elements"
            continue
        try:
            result.metadata[key] = _shortened(model.metadata[key])
        except FormatError as error:  # not UTF-8; llama.cpp takes any bytes, so the file is well formed
            result.metadata[key] = "(not valid UTF-8)"
            result.problems.append(str(error))


def _safetensors(path: Path, result: Description) -> None:
    weights = safetensors.read(path)
    result.total_bytes = weights.file_bytes
    result.metadata |= {key: _shortened(value) for key, value in weights.metadata.items()}
    result.tensors = [
        Row(info.name, info.shape, info.dtype.lower(), info.nbytes, Path(weights.paths[info.part]).name)
        for info in weights.tensors.values()
    ]


def _directory(path: Path, result: Description) -> None:
    if (path / CONFIG).is_file():
        result.metadata |= {key: _shortened(value) for key, value in read_json(path / CONFIG).items()}
    else:
        result.problems.append(f"{path}: has no {CONFIG}, which says what kind of model it is")
    _safetensors(path, result)


def _adapter(path: Path, result: Description) -> None:
    result.metadata |= {key: _shortened(value) for key, value in read_json(path / ADAPTER_CONFIG).items()}
    _safetensors(path / ADAPTER_WEIGHTS, result)


def _checkpoint(path: Path, result: Description) -> None:
    arrays, state = checkpoint.load(path)
    result.metadata |= {key: _shortened(value) for key, value in state.items()}
    result.total_bytes = arrays.file_bytes
    result.tensors = [
        Row(info.name, info.shape, info.dtype.lower(), info.nbytes, checkpoint.ARRAYS)
        for info in arrays.tensors.values()
    ]


_READERS: dict[str, Callable[[Path, Description], None]] = {
    "gguf": _gguf,
    "safetensors": _safetensors,
    "hf-directory": _directory,
    "adapter": _adapter,
    "checkpoint": _checkpoint,
}


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _shortened(value: Any) -> Any:
    """A value that fits on a line and is JSON."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str) and len(value) > 200:
        return f"{value[:60]!r} … ({len(value)} characters)"
    if isinstance(value, (list, dict)) and len(value) > 8:
        return f"{len(value)} {'elements' if isinstance(value, list) else 'entries'}"
    return value
