"""Whole training steps, each in a process of its own (`entrenar bench step`).

    python bench/step.py [NAME ...] [--steps 8] [--json]

WORK names them all and says what runs. ENTRENAR_ISA and ENTRENAR_THREADS hold it to a level or a
number of threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

QWEN = ("--preset", "qwen2.5-0.5b", "--batch-size", "2", "--seq-len", "512", "--rank", "16")
LLAMA = ("--preset", "llama-124m", "--batch-size", "2", "--seq-len", "512", "--full")

# name -> (what it is, flags of `entrenar bench step`, environment)
WORK: dict[str, tuple[str, tuple[str, ...], dict[str, str]]] = {
    "lora-0.5b": ("LoRA, rank 16 on all linear layers, Qwen2.5-0.5B, 2 x 512 tokens", QWEN, {}),
    "lora-0.5b-1.3gb": ("the same in 1.3 GiB", (*QWEN, "--memory-budget", "1.3GiB"), {}),
    "lora-0.5b-1t": ("the same on one thread", QWEN, {"ENTRENAR_THREADS": "1"}),
    "lora-0.5b-avx2": ("the same with AVX2", (*QWEN, "--dtype", "bf16"), {"ENTRENAR_ISA": "avx2"}),
    "full-124m": ("all weights, Llama of 124M, 2 x 512 tokens", LLAMA, {}),
    "full-124m-8bit": ("the same, moments of a byte", (*LLAMA, "--optimizer", "adamw_8bit"), {}),
}


def measure(name: str, steps: int, flags: Sequence[str] = ()) -> dict[str, Any]:
    """What `entrenar bench step --json` says of a work."""
    _, own, environment = WORK[name]
    command = [sys.executable, "-m", "entrenar.cli", "bench", "step", *own, *flags, "--steps", str(steps), "--json"]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}")
    return dict(json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(WORK))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object, by name")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in WORK]
    if unknown:
        parser.error(f"no work {unknown[0]}; it is one of {', '.join(WORK)}")
    results = {}
    for name in args.names or WORK:
        results[name] = found = measure(name, args.steps)
        low, high = found["tokens_per_second_range"]
        line = (
            f"{name:15} {found['isa']}, {found['threads']} threads: {found['tokens_per_second']:8.1f} tokens/s "
            f"({low:.1f} to {high:.1f}), {found['tflops']:.3f} TFLOP/s, {found['share_of_peak']:.1%} of peak, "
            f"{found['peak_rss_gb']:.2f} GiB"
        )
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
