"""All that is stored: the machine's limits, kernels, whole steps and, where a peer is given, ratios to PyTorch's stack.

    python bench/run.py [--peer PEER_PYTHON] [--out FILE] [--sections kernels steps peers footprint] [--quick]

Writes one JSON file, by default bench/results/CPU-LEVEL-THREADS.json: what was measured, when, with which version. A
section that isn't run keeps what the file has, if CPU, level, threads and version are the same. Wants a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MACHINE = ("cpu", "isa", "threads", "version")


def machine() -> dict[str, Any]:
    import entrenar
    from entrenar import backend

    return {"cpu": backend.cpu_info()["model"], "isa": backend.isa(), "threads": backend.get_num_threads(),
            "version": entrenar.__version__, "date": date.today().isoformat()}  # fmt: skip


def kernels(quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """The machine's limits, the best of two readings; name -> median seconds, rates and the fastest run's seconds."""
    import pyperf
    from kernels import rates  # bench/kernels.py: this script's folder is on the path

    from entrenar.backend import cpu

    before = cpu.peaks()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.json"
        command = [sys.executable, str(HERE / "kernels.py"), "-o", str(path), "--quiet"]
        subprocess.run([*command, "--processes", "1" if quick else "5", "--values", "3"], check=True)
        suite = pyperf.BenchmarkSuite.load(str(path))
    peaks = {key: max(rate, before[key]) for key, rate in cpu.peaks().items()}
    return peaks, {b.get_name(): {**rates(b.get_name(), b.median(), peaks), "fastest": min(b.get_values())}
                   for b in suite.get_benchmarks()}  # fmt: skip


def script(name: str, *flags: str) -> dict[str, Any]:
    """What a script of this folder prints with --json."""
    command = [sys.executable, str(HERE / name), *flags, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="a Python with torch, transformers and peft, for peers and footprint")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sections", nargs="+", default=["kernels", "steps", "peers", "footprint"])
    parser.add_argument("--cases", nargs="+", default=[], help="of bench/peers.py; by default two of them")
    parser.add_argument("--rounds", default="3", help="of the peers")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: to see that all of it runs")
    args = parser.parse_args()
    about = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", about["cpu"].lower()).strip("-") or "cpu"
    out = args.out or HERE / "results" / f"{slug}-{about['isa']}-{about['threads']}t.json"
    stored = json.loads(out.read_text()) if out.exists() else {}
    same = stored and all(stored["machine"][key] == about[key] for key in MACHINE)
    result: dict[str, Any] = {**(stored if same else {}), "machine": about}
    if "kernels" in args.sections:
        result["peaks"], result["kernels"] = kernels(args.quick)
    if "steps" in args.sections:
        found = script("step.py", "--steps", "2" if args.quick else "8")
        result["steps"] = {name: {**row, "kernels": row["kernels"][:12]} for name, row in found.items()}
    if "peers" in args.sections and args.peer:
        found = script("peers.py", *args.cases, "--python", args.peer, "--rounds", "1" if args.quick else args.rounds)
        result["peers"] = {**result.get("peers", {}), **found}
    if "footprint" in args.sections and args.peer:
        result["footprint"] = script("peers/footprint.py", "--peer", args.peer)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"stored in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
