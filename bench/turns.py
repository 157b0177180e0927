"""Taking turns: two programs, each a process that answers lines, timed one after the other."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

AT_LEAST = 0.05  # seconds that a run is repeated for


def ask(process: subprocess.Popen[str], line: str) -> str:
    """What a process answers to a line."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"a process ended at {line}")
    return answer


def seconds(run: Callable[[], object]) -> float:
    """Of one run, by as many as fill AT_LEAST, after one that doesn't count."""
    run()
    runs, start = 0, time.perf_counter()
    while runs == 0 or time.perf_counter() - start < AT_LEAST:
        run()
        runs += 1
    return (time.perf_counter() - start) / runs
