"""f32 matrix products against NumPy's OpenBLAS, in one process, with the same number of threads.

    python bench/matmul.py [--isa avx512 avx2] [--sizes 512 1024] [--threads 2] [--json]

Each level runs in a process of its own, because OpenBLAS chooses its kernels when it is loaded: it is held to Haswell's
for AVX2. The product is checked against float64 first; runs are interleaved, so that noise hits both alike; the ratio
is that of the medians (above 1: entrenar is faster). Data are random, never zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

# level -> OpenBLAS's name of the core it should believe in ("" leaves it to find out)
CORETYPE = {"amx": "", "avx512": "", "avx2": "Haswell", "scalar": "Haswell"}


def measure(sizes: list[str], rounds: int) -> list[dict[str, object]]:
    """Time both libraries on every MxKxN of `sizes`."""
    import numpy as np

    from entrenar import backend

    rng = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for size in sizes:
        m, k, n = [int(x) for x in size.split("x")] if "x" in size else [int(size)] * 3
        a = rng.standard_normal((m, k), dtype=np.float32)
        b = rng.standard_normal((k, n), dtype=np.float32)
        exact = a.astype(np.float64) @ b.astype(np.float64)
        ours, theirs = np.empty((m, n), np.float32), np.empty((m, n), np.float32)
        runs = {"entrenar": lambda a=a, b=b, c=ours: backend.cpu.matmul(a, b, out=c),
                "openblas": lambda a=a, b=b, c=theirs: np.matmul(a, b, out=c)}
        for run in runs.values():
            run()
        for c in (ours, theirs):
            error = float(np.abs(c - exact).max() / np.abs(exact).max())
            if not error < 1e-5:
                raise SystemExit(f"wrong product at {size}: relative error {error}")
        inner = max(1, int(2e8 / (m * n * k)))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                time.sleep(0.3)  # the other library's idle threads spin on for up to 200 ms
                run()
                start = time.perf_counter()
                for _ in range(inner):
                    run()
                times[name].append((time.perf_counter() - start) / inner)
        median = {name: statistics.median(t) for name, t in times.items()}
        gflop = 2e-9 * m * n * k
        rows.append({"isa": backend.isa(), "size": size, "threads": backend.get_num_threads(),
                     "entrenar_gflops": round(gflop / median["entrenar"], 1),
                     "openblas_gflops": round(gflop / median["openblas"], 1),
                     "ratio": round(median["openblas"] / median["entrenar"], 3)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", nargs="+", default=["avx512", "avx2"], choices=CORETYPE)
    parser.add_argument("--sizes", nargs="+", default=["512", "1024"], help="N, or MxKxN")
    parser.add_argument("--threads", default="2")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.sizes, args.rounds)))
        return 0
    results = []
    for isa in args.isa:
        env = {**os.environ, "ENTRENAR_ISA": isa, "ENTRENAR_THREADS": args.threads,
               "OPENBLAS_NUM_THREADS": args.threads, "OPENBLAS_CORETYPE": CORETYPE[isa]}
        if not CORETYPE[isa]:
            del env["OPENBLAS_CORETYPE"]
        command = [sys.executable, __file__, "--here", "--rounds", str(args.rounds), "--sizes", *args.sizes]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{isa}: not measured", file=sys.stderr)
            continue
        results += json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    if args.json:
        print(json.dumps(results))
    else:
        for r in results:
            print("{isa:7} {size:>14} {threads} threads  entrenar {entrenar_gflops:7} GFLOP/s  "
                  "OpenBLAS {openblas_gflops:7} GFLOP/s  ratio {ratio}".format(**r))
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
