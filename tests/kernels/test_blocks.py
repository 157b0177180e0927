"""Large blocks of memory (csrc/blocks.c) under load, on threads, and while the system refuses some of its calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CC", "cc")
    assert shutil.which(compiler), "the core was built by a C compiler, so there is one"
    path = tmp_path_factory.mktemp("blocks") / "blocks"
    command = [compiler, "-std=gnu11", "-O1", "-g", "-I", CSRC, "-o", path, HERE / "blocks.c", "-pthread"]
    subprocess.run(command, check=True)
    return path


@pytest.mark.parametrize(
    ("threads", "turns", "mremap", "mmap"),
    [(1, 4000, 0, 0), (4, 1000, 0, 0), (1, 3000, 5, 0), (4, 700, 3, 0), (1, 2000, 0, 5), (4, 700, 3, 7)],
)
def test_blocks_keep_what_is_in_them(program: Path, threads: int, turns: int, mremap: int, mmap: int) -> None:
    command = [str(program), *map(str, (threads, turns, mremap, mmap))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={})
    assert done.returncode == 0, done.stdout
    used, kept, resident, refused = map(int, done.stdout.split())
    assert used == 0
    assert kept > 50  # megabytes, so that there was something to move
    assert resident < 20
    assert (refused > 10) == bool(mremap or mmap)
