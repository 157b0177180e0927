"""Is the run-time dependency tree what was agreed? Run by `make deny-check`.

Fails where the package depends, directly or through others, on something that is not in `ALLOWED`, where a
licence is not on the list, or where a source file imports a package that must never be a run-time dependency.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

# package -> what it brings along; docs/decisions/dependencies.md has the reasons
ALLOWED: Mapping[str, tuple[str, ...]] = {
    "numpy": (),
    "ml-dtypes": (),
    "jinja2": ("markupsafe",),
    "rich": ("markdown-it-py", "mdurl", "pygments"),
    "tyro": ("docstring-parser", "typeguard", "typing-extensions"),
    # Its hub client comes for downloads of its own, which entrenar never asks for; the client's network stack
    # changed between releases, so both are here.
    "tokenizers": (
        *("huggingface-hub", "filelock", "fsspec", "hf-xet", "packaging", "pyyaml", "tqdm", "typer"),
        *("typer-slim", "click", "shellingham", "anyio", "certifi", "h11", "httpcore", "httpcore2"),
        *("httpx", "httpx2", "idna", "sniffio", "truststore", "requests", "urllib3", "charset-normalizer"),
    ),
}
NAMES = frozenset(ALLOWED) | {name for below in ALLOWED.values() for name in below}
LICENCES = frozenset(
    {"MIT", "0BSD", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "PSF-2.0", "Zlib", "CC0-1.0", "ISC"}
    | {"MPL-2.0"}
)
# what older packages call their licence in a classifier
CLASSIFIERS = {
    "MIT License": "MIT",
    "BSD License": "BSD-3-Clause",
    "Apache Software License": "Apache-2.0",
    "ISC License (ISCL)": "ISC",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
FORBIDDEN = "torch|transformers|peft|bitsandbytes|llama_cpp|xllamacpp|gguf|sentencepiece"


def main() -> int:
    found = sorted({*tree_problems(direct_dependencies()), *import_problems(ROOT / "entrenar")})
    for problem in found:
        print(f"deny-check: {problem}", file=sys.stderr)
    if not found:
        print(f"deny-check: {', '.join(direct_dependencies())} and all below them are as agreed")
    return 1 if found else 0


def direct_dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line).name for line in project["dependencies"]]


def tree_problems(names: list[str]) -> Iterator[str]:
    """What is wrong with these distributions or with any that they bring, for this Python."""
    todo, seen = [(name, "entrenar") for name in names], set()
    while todo:
        written, parent = todo.pop()
        name = re.sub(r"[-_.]+", "-", written).lower()
        if name in seen:
            continue
        seen.add(name)
        if name not in NAMES:
            yield f"{parent} depends on {name}, which is not on the allow-list in tests/deny_check.py"
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            yield f"{name}, which {parent} needs, is not installed"
            continue
        licence = licence_of(distribution.metadata)
        if not permissive(licence):
            yield f"{name}: its licence is {licence or 'not stated'}, which is not on the list"
        requirements = map(Requirement, distribution.requires or ())
        todo += [(r.name, name) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def licence_of(about: metadata.PackageMetadata) -> str:
    """SPDX expression that a package states, in whichever field; "" where it states none."""
    expression = about.get("License-Expression")
    if expression:
        return str(expression)
    classifiers = about.get_all("Classifier") or []
    stated = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")]
    return " AND ".join(CLASSIFIERS.get(name, name) for name in stated) or about.get("License") or ""


def permissive(expression: str) -> bool:
    """Whether every part of an SPDX expression, or of one of its alternatives, is on the list."""
    alternatives = expression.strip("()").split(" OR ")
    return any(all(part.strip(" ()") in LICENCES for part in one.split(" AND ")) for one in alternatives)


def import_problems(package: Path) -> Iterator[str]:
    pattern = re.compile(rf"^\s*(?:import|from)\s+({FORBIDDEN})\b", re.MULTILINE)
    for path in sorted(package.rglob("*.py")):
        for match in pattern.finditer(path.read_text(encoding="utf-8")):
            where = path.relative_to(package.parent)
            yield f"{where} imports {match[1]}, which is never a run-time dependency"


if __name__ == "__main__":
    sys.exit(main())
