"""``entrenar inspect``: what a file or directory holds, in words and tables; exit code 1 where malformed."""

from __future__ import annotations

from dataclasses import dataclass

from entrenar.cli.output import note, print_json, size
from entrenar.cli.settings import option, positional
from entrenar.formats.describe import Description, describe


@dataclass(frozen=True, kw_only=True)
class Command:
    """Say what a file (GGUF, safetensors) or directory (model, adapter, checkpoint) holds, in words.

    Exit code 0 where it is well formed, 1 where not; then the last line says why and where.
    """

    path: str = positional("the file or directory")
    tensors: bool = option(True, "list every tensor")
    json: bool = option(False, "print one JSON object instead of text")

    def run(self) -> int:
        found = describe(self.path)
        if self.json:
            print_json(found.as_dict())
        elif found.ok:
            show(found, self.tensors)
        if found.error is not None:
            note(f"entrenar inspect: {found.error}")
        return 0 if found.ok else 1


def show(found: Description, tensors: bool) -> None:
    """The description as text on stdout. Names come from the file, so control characters are made visible."""
    version = f" version {found.version}" if found.version is not None else ""
    print(f"{printable(found.path)}: {found.kind}{version}, well formed")
    count = len(found.tensors)
    print(f"{found.parameters:,} parameters in {count:,} tensors, {size(found.total_bytes)} on disk")
    if found.types:
        _table([("type", "parameters", "tensors", "size"), *map(_type_row, found.types.items())])
    if found.metadata:
        print("\nmetadata")
        _table([(key, str(value)) for key, value in found.metadata.items()])
    if tensors and found.tensors:
        print("\ntensors (shape: rows first, as in NumPy)")
        _table([(r.name, "x".join(map(str, r.shape)), r.type, size(r.nbytes)) for r in found.tensors])
    for problem in found.problems:
        print(f"\nbut: {printable(problem)}")


def _type_row(item: tuple[str, dict[str, int]]) -> tuple[str, ...]:
    name, kind = item
    return name, f"{kind['parameters']:,}", f"{kind['tensors']:,}", size(kind["bytes"])


def _table(rows: list[tuple[str, ...]]) -> None:
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """`text` with everything that could move a terminal's cursor escaped, on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
