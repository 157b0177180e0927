"""Who may import whom: each row of the house imports only from rows above it, and from itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "entrenar"

ROWS = (
    ("errors",),
    ("_native", "_cuda", "observe.events"),
    ("backend", "random"),
    ("quant",),
    ("tensor", "formats", "tokenizer"),
    ("ops",),
    ("nn", "optim", "data", "observe"),  # a run in a directory keeps its own metrics; displays attach in the CLI
    ("generate",),
    ("models",),
    ("train",),
    ("quickstart",),
    ("cli",),
)
RANK = {room: rank for rank, rooms in enumerate(ROWS) for room in rooms}
NATIVE_USERS = {"backend"}
FORBIDDEN = {
    "torch", "transformers", "peft", "bitsandbytes", "llama_cpp", "xllamacpp", "gguf", "sentencepiece",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(dotted: str) -> str | None:
    """`entrenar.nn.lora` -> "nn"; None for the package itself and for names that no row has."""
    parts = dotted.split(".")[1:]
    longest = ".".join(parts[:2])
    return longest if longest in RANK else parts[0] if parts and parts[0] in RANK else None


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of all that is imported, in functions too, but not for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        else:
            yield from imports(node, module, is_package)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    room = room_of(module)
    found = []
    for line, name in imports(ast.parse(source), module, is_package):
        if name.split(".")[0] in FORBIDDEN:
            found.append(f"{module}:{line} imports {name}, which is never a dependency")
        if room is None or not name.startswith("entrenar."):
            continue
        target = room_of(name)
        if target in ("_native", "_cuda") and room not in NATIVE_USERS:
            found.append(f"{module}:{line} imports {name}; only backend does")
        elif target is not None and target.split(".")[0] != room.split(".")[0] and RANK[target] >= RANK[room]:
            found.append(f"{module}:{line} imports {name}, which is not in a row above {room}")
    return found


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.tier1
@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_file_imports_only_from_rows_above(path: Path) -> None:
    assert violations(path.read_text(), module_name(path), path.name == "__init__.py") == []


@pytest.mark.tier1
def test_every_module_has_a_row() -> None:
    modules = {module_name(path) for path in FILES} - {"entrenar"}
    assert {module for module in modules if not room_of(module)} == set()


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("entrenar.tensor", "from entrenar.ops import matmul"),
        ("entrenar.tensor", "def f():\n    from entrenar import models"),
        ("entrenar.nn.lora", "from ..optim import adam"),
        ("entrenar.ops.norm", "from entrenar import _native"),
        ("entrenar.quant.qtypes", "import entrenar.tensor"),
        ("entrenar.formats.gguf_read", "if fast:\n    from entrenar.nn import linear"),
        ("entrenar.models.load", "import torch"),
        ("entrenar.observe.events", "import entrenar.backend"),
        ("entrenar.cli.chat", "from transformers import AutoModel"),
    ],
)
def test_the_check_sees_a_wrong_import(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("entrenar.nn.lora", "from ..tensor import Tensor\nfrom . import module"),
        ("entrenar.tensor", "if TYPE_CHECKING:\n    from entrenar.ops import matmul"),
        ("entrenar.train.loop", "from entrenar.observe.events import emit\nfrom entrenar import errors"),
        ("entrenar.backend", "from entrenar import _native"),
    ],
)
def test_the_check_lets_a_right_import_pass(module: str, source: str) -> None:
    assert violations(source, module) == []
