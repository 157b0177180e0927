"""Does the machine's measured peak agree with an independent C program of the same definition (peak_check.c)?

    python bench/peak_check.py [--rounds 10] [--tolerance 0.03] [--json]

For every level of this machine, products of f32 and bf16 and both streams of memory, the two in turn; the best of all
rounds of each counts. Exit code 1 where they differ by more than the tolerance. Wants a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("peak_check.c")
PROBE = "import json; from entrenar.backend import cpu; print(json.dumps(cpu.peaks({seconds})))"
# level -> limit -> the loop of peak_check.c of the same definition
LOOPS = {
    "avx2": {"f32": "avx2"},
    "avx512": {"f32": "avx512", "read": "read", "copy": "copy"},
    "avx512_bf16": {"bf16": "avx512_bf16"},
    "amx": {"bf16": "amx"},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a loop in a round")
    parser.add_argument("--tolerance", type=float, default=0.03)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    from entrenar import backend

    threads = backend.get_num_threads()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak_check"
        subprocess.run([os.environ.get("CC", "cc"), "-O3", "-pthread", "-o", program, SOURCE], check=True)
        for isa, loops in LOOPS.items():
            if isa not in backend.available_isas():
                continue
            ours = dict.fromkeys(loops, 0.0)
            theirs = dict.fromkeys(loops, 0.0)
            probe = [sys.executable, "-c", PROBE.format(seconds=args.seconds)]
            for _ in range(args.rounds):
                peaks = json.loads(output(probe, ENTRENAR_ISA=isa, ENTRENAR_THREADS=str(threads)))
                for limit, loop in loops.items():
                    ours[limit] = max(ours[limit], peaks[limit])
                    found = float(output([str(program), loop, str(threads), str(args.seconds)]))
                    theirs[limit] = max(theirs[limit], found)
            for limit in loops:
                ratio = ours[limit] / theirs[limit]
                rows.append({"isa": isa, "limit": limit, "threads": threads, "entrenar": ours[limit],
                             "check": theirs[limit], "ratio": ratio, "agree": abs(ratio - 1) <= args.tolerance})
    if args.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            verdict = "agree" if row["agree"] else f"differ by more than {args.tolerance:.0%}"
            print(f"{row['isa']:12} {row['limit']:5} {row['threads']} threads  entrenar {row['entrenar'] / 1e9:9.1f}  "
                  f"check {row['check'] / 1e9:9.1f}  10⁹/s  ratio {row['ratio']:.3f}  {verdict}")
    return 0 if all(row["agree"] for row in rows) else 1


def output(command: list[str], **environment: str) -> str:
    """What a program printed last."""
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
