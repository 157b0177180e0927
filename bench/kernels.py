"""One pyperf benchmark a kernel, at the shapes of a training step of Qwen2.5-0.5B (2 x 512 tokens).

    python bench/kernels.py [-o FILE.json] [--only product ...] [pyperf's flags]

Each result is checked against float64 first, in every process. `python -m pyperf show FILE.json` reads what -o wrote;
`rates` gives each median as GFLOP/s, GB/s and a share of the machine's limits. KERNELS is the table, of the modules
kernel_*.py; --only takes the beginnings of names.
"""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

import kernel_attention
import kernel_elementwise
import kernel_layers
import kernel_optimizers
import kernel_products
import kernel_stored
import numpy as np
import pyperf
from kernel_task import EXACT, Task, wide

GROUPS = (kernel_products, kernel_stored, kernel_attention, kernel_layers, kernel_elementwise, kernel_optimizers)
KERNELS = {name: row for group in GROUPS for name, row in group.table().items()}


def check(name: str, kind: str, task: Task) -> None:
    """Runs the task once and compares each of its results."""
    task.call()
    got, want = task.got(), task.want()
    usual = EXACT[kind] * (4 if "backward" in name else 1)
    for ours, theirs, bound in zip(got, want, task.bounds or [usual] * len(want), strict=True):
        if ours.shape != theirs.shape:
            raise SystemExit(f"{name}: the shape is {ours.shape} instead of {theirs.shape}")
        error = np.abs(wide(ours) - theirs).max() / np.abs(theirs).max()
        if not error <= bound:
            raise SystemExit(f"{name}: the largest error is {error:.2e} of the largest value")


def seconds_of(loops: int, name: str) -> float:
    """What pyperf calls in the process of one benchmark: checked once, then timed."""
    kind, make = KERNELS[name]
    if name not in ready:
        ready.clear()
        ready[name] = make()
        check(name, kind, ready[name])
    call = ready[name].call
    start = perf_counter()
    for _ in range(loops):
        call()
    return perf_counter() - start


ready: dict[str, Task] = {}


def rates(name: str, seconds: float, peaks: dict[str, float]) -> dict[str, float]:
    """What a time means: 10⁹ FLOP/s and bytes/s, and the share of the nearer of the machine's limits."""
    kind, make = KERNELS[name]
    task = make()
    least = max(task.flops / peaks[kind], task.nbytes / max(peaks["read"], peaks["copy"]))
    return {"seconds": seconds, "gflops": task.flops / seconds / 1e9, "gb_per_s": task.nbytes / seconds / 1e9,
            "share": least / seconds}  # fmt: skip


def main() -> None:
    runner = pyperf.Runner(processes=2, values=5, warmups=1, min_time=0.03, add_cmdline_args=pass_on)
    runner.argparser.set_defaults(inherit_environ=["ENTRENAR_ISA", "ENTRENAR_THREADS"])
    runner.argparser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="beginnings of names")
    chosen = tuple(runner.parse_args().only)
    for name in KERNELS:
        if name.startswith(chosen):
            runner.bench_time_func(name, seconds_of, name)


def pass_on(command: list[str], args: Any) -> None:
    """Workers see the same benchmarks."""
    if args.only != [""]:
        command += ["--only", *args.only]


if __name__ == "__main__":
    sys.exit(main())
