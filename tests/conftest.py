"""Fixtures shared by all tests, and the rule: a test skips only for a reason listed in tests/skips.toml."""

from __future__ import annotations

import gc
import os
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SKIPS = tomllib.loads((ROOT / "tests/skips.toml").read_text())["skip"]
ALLOWED = [re.compile(row["reason"]) for row in SKIPS]

# No deadline: a busy machine is no fault. In CI the same examples come every time.
settings.register_profile("full", deadline=None, derandomize="CI" in os.environ)
settings.register_profile("quick", settings.get_profile("full"), max_examples=15)
settings.load_profile("full")

gc.disable()  # until all tests are collected: thousands of small objects that live to the end

skipped: Counter[str] = Counter()


def find_shared_data() -> Path | None:
    """The folder ../shared/data beside the repository, or beside the main checkout of a linked worktree."""
    places = [ROOT.parent]
    marker = ROOT / ".git"
    if marker.is_file():  # a linked worktree: "gitdir: MAIN/.git/worktrees/NAME"
        places.append(Path(marker.read_text().removeprefix("gitdir:").strip()).parents[3])
    found = (place / "shared/data" for place in places)
    return next((folder for folder in found if folder.is_dir()), None)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real models and texts; see its SOURCES.md."""
    folder = find_shared_data()
    if folder is None:
        pytest.skip("../shared/data is absent")
    return folder


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def allowed(reason: str) -> bool:
    return any(pattern.fullmatch(reason) for pattern in ALLOWED)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        skipped[reason_of(report)] += 1


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.skipped:
        skipped[reason_of(report)] += 1


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and not all(map(allowed, skipped)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not skipped:
        return
    terminalreporter.section("skips")
    for reason, count in skipped.most_common():
        verdict = "" if allowed(reason) else "   <- NOT LISTED in tests/skips.toml: this fails the run"
        terminalreporter.line(f"{count:5} skipped: {reason}{verdict}")
