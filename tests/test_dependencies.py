"""The dependency check itself, on planted faults."""

from __future__ import annotations

import email
from pathlib import Path

import pytest
from deny_check import ALLOWED, direct_dependencies, import_problems, licence_of, permissive, tree_problems

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.tier1
def test_no_source_file_imports_an_oracle() -> None:
    assert list(import_problems(ROOT / "entrenar")) == []


@pytest.mark.tier1
def test_planted_faults_are_found(tmp_path: Path) -> None:
    (tmp_path / "entrenar").mkdir()
    (tmp_path / "entrenar/bad.py").write_text("import numpy\n\ndef f():\n    from torch import nn\n")
    assert list(import_problems(tmp_path / "entrenar")) == [
        "entrenar/bad.py imports torch, which is never a run-time dependency"
    ]
    assert list(tree_problems(["pytest"])) == [
        "entrenar depends on pytest, which is not on the allow-list in tests/deny_check.py"
    ]


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("about", "licence", "fine"),
    [
        ("License-Expression: MIT", "MIT", True),
        ("License-Expression: BSD-3-Clause AND 0BSD AND Zlib", "BSD-3-Clause AND 0BSD AND Zlib", True),
        ("License-Expression: MIT AND GPL-3.0-only", "MIT AND GPL-3.0-only", False),
        ("License-Expression: GPL-3.0-only OR MIT", "GPL-3.0-only OR MIT", True),
        ("Classifier: License :: OSI Approved :: BSD License", "BSD-3-Clause", True),
        ("Classifier: License :: Other/Proprietary License", "Other/Proprietary License", False),
        ("License: PSF-2.0", "PSF-2.0", True),
        ("Name: nothing", "", False),
    ],
)
def test_licence_is_read_from_every_place(about: str, licence: str, fine: bool) -> None:
    assert licence_of(email.message_from_string(about)) == licence  # type: ignore[arg-type]
    assert permissive(licence) is fine


@pytest.mark.tier1
def test_every_direct_dependency_has_its_reason_in_the_docs() -> None:
    page = (ROOT / "docs/decisions/dependencies.md").read_text()
    assert [name for name in direct_dependencies() if f"**{name}" not in page] == []
    assert all(name.lower().replace("_", "-") in ALLOWED for name in direct_dependencies())
