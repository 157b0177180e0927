"""Mutation tests with mutmut, of the modules named in pyproject.toml. Run by `make mutants`; takes long.

Works on a copy in build/mutants that holds the native module, because an editable installation would bring the
unchanged sources. Prints the mutants that no test noticed and exits with 1 where fewer than `TARGET` were.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "build/mutants"
TARGET = 0.90  # share of mutants that a test must notice

SITECUSTOMIZE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
"""


def main() -> int:
    from entrenar import _native

    shutil.rmtree(STAGE, ignore_errors=True)
    for name in ("entrenar", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, STAGE / name)  # type: ignore[operator]
    shutil.copy(_native.__file__, STAGE / "entrenar")
    (STAGE / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = {**os.environ, "PYTHONPATH": str(STAGE)}
    mutmut = [sys.executable, "-m", "mutmut"]
    subprocess.run([*mutmut, "run", *sys.argv[1:]], cwd=STAGE, env=environment, check=False)
    listed = subprocess.run([*mutmut, "results"], cwd=STAGE, env=environment, capture_output=True, text=True)
    print("".join(line for line in listed.stdout.splitlines(True) if not line.endswith("not checked\n")))
    subprocess.run([*mutmut, "export-cicd-stats"], cwd=STAGE, env=environment, check=True)
    counts = json.loads((STAGE / "mutants/mutmut-cicd-stats.json").read_text())
    noticed = counts["killed"] + counts.get("timeout", 0) + counts.get("segfault", 0)
    share = noticed / max(1, noticed + counts["survived"] + counts.get("no_tests", 0))
    print(f"{noticed} mutants noticed, {counts['survived']} not: {share:.1%} (at least {TARGET:.0%} are asked for)")
    return 0 if share >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
