"""Products of linear layers against PyTorch, NumPy's OpenBLAS and this machine's limit.

    python bench/matmul.py [--torch PYTHON] [--isa avx512_bf16 avx512 avx2] [--dtype bf16 f32] [--layers qkv0.5b ...]
                           [--rows 1024 2048] [--threads 2] [--rounds 9] [--json]

PYTHON is an interpreter with torch; OpenBLAS (f32 alone) and it run in processes of their own, held to the level's
instructions, and take turns with ours, so that noise hits all alike. Every side writes into a given array of the
operands' type and is checked against float64 first, on the same numbers. A ratio is theirs to ours, the median over
the rounds, with its quartiles; above 1, ours is faster. The limit is the loop of `entrenar doctor`, which stays in L1;
it takes its turn too, for as long as a product, since on a shared core it changes within seconds: its ratio is our
share of it. Weights are (outputs, inputs) row-major; forward is x·Wᵀ, input is g·W, the gradient of x, weight gᵀ·x.
Data are random, never zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from turns import AT_LEAST, ask, seconds

# name -> inputs, outputs; q, k, v and gate, up are one product each
LAYERS = {
    "qkv0.5b": (896, 1152), "o0.5b": (896, 896), "gateup0.5b": (896, 9728), "down0.5b": (4864, 896),
    "qkv7b": (4096, 12288), "o7b": (4096, 4096), "gateup7b": (4096, 22016), "down7b": (11008, 4096),
}  # fmt: skip
WAYS = ("forward", "input", "weight")
OURS = ("ours", "limit")
# what the other libraries are told of a level
HELD = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
             "OPENBLAS_CORETYPE": "Haswell"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}  # fmt: skip
TOLERANCE = {"f32": 1e-5, "bf16": 1e-2}  # largest error over the largest value; a bf16 result is off by 2^-9


def operands(case):
    """a and b of the product in f32, each exactly a bf16."""
    import numpy as np

    inputs, outputs = LAYERS[case["layer"]]
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(size, np.float32).view(np.uint32) & 0xFFFF0000
               for size in ((case["rows"], inputs), (outputs, inputs), (case["rows"], outputs)))  # fmt: skip
    x, w, g = (v.view(np.float32) for v in (x, w, g))
    return {"forward": (x, w.T), "input": (g, w), "weight": (g.T, x)}[case["way"]]


def ours(a, b, dtype: str):
    import ml_dtypes
    import numpy as np

    from entrenar.backend import cpu

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bf16" else np.float32)
    a, b = a.astype(kind), b.astype(kind)  # keeps the order in memory
    out = np.empty((a.shape[0], b.shape[1]), kind)
    return lambda: seconds(lambda: cpu.product([(a, b)], out)), lambda: out.astype(np.float32)


def openblas(a, b, dtype: str):
    import numpy as np

    out = np.empty((a.shape[0], b.shape[1]), np.float32)
    return lambda: seconds(lambda: np.matmul(a, b, out=out)), lambda: out


def torch(a, b, dtype: str):
    import torch as library

    library.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    kind = library.bfloat16 if dtype == "bf16" else library.float32
    a, b = library.from_numpy(a).to(kind), library.from_numpy(b).to(kind)
    out = library.empty((a.shape[0], b.shape[1]), dtype=kind)
    return lambda: seconds(lambda: library.mm(a, b, out=out)), lambda: out.float().numpy()


def limit(a, b, dtype: str):
    from entrenar.backend import cpu

    flops = 2 * a.size * b.shape[1]
    long = max(AT_LEAST, flops / cpu.peak(dtype, AT_LEAST))
    return lambda: flops / cpu.peak(dtype, long, rounds=1), None


# (seconds of one product, the result of the last)
SIDES = {"ours": ours, "limit": limit, "openblas": openblas, "torch": torch}


def check(side: str, case, a, b, result) -> None:
    import numpy as np

    some = slice(None, None, max(1, a.shape[0] // 16))
    exact = a[some].astype(np.float64) @ b.astype(np.float64)
    error = np.abs(result[some] - exact).max() / np.abs(exact).max()
    if not error < TOLERANCE[case["dtype"]]:
        raise SystemExit(f"{side}: {case} is wrong, relative error {error}")


def serve(side: str) -> None:
    """Answers lines on stdin: a case as JSON makes and checks it, any other runs it and gives its seconds."""
    for line in sys.stdin:
        if line.startswith("{"):
            case = json.loads(line)
            a, b = operands(case)
            measure, result = SIDES[side](a, b, case["dtype"])
            measure()
            if result:
                check(side, case, a, b, result())
            print("ready", flush=True)
        else:
            print(measure(), flush=True)


def start(python: str, side: str, isa: str, threads: int) -> subprocess.Popen[str]:
    count = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ENTRENAR_THREADS"), str(threads))
    env = {**os.environ, **count, **(HELD.get(isa, {}) if side not in OURS else {"ENTRENAR_ISA": isa})}
    command = [python, os.path.abspath(__file__), "--serve", side]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def measure(case, sides, rounds: int):
    """GFLOP/s of every side, and ratios."""
    for process in sides.values():
        ask(process, json.dumps(case))
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, process in sides.items():
            time.sleep(0.2)  # another library's idle threads spin on for a while
            times[side].append(float(ask(process, "run")))
    inputs, outputs = LAYERS[case["layer"]]
    gflop = 2e-9 * case["rows"] * inputs * outputs
    row = {**case, **{side: round(gflop / statistics.median(t), 1) for side, t in times.items()}}
    for side in sides:
        if side != "ours":
            ratios = sorted(b / a for a, b in zip(times["ours"], times[side], strict=True))
            row[f"{side} ratio"] = round(statistics.median(ratios), 3)
            row[f"{side} quartiles"] = [round(ratios[i], 3) for i in (rounds // 4, rounds - 1 - rounds // 4)]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch")
    parser.add_argument("--isa", nargs="+", default=[""])
    parser.add_argument("--dtype", nargs="+", choices=list(TOLERANCE), default=["bf16", "f32"])
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS)[:4])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["forward", "input"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    for isa in options.isa:
        for dtype in options.dtype:
            pythons = dict.fromkeys(OURS, sys.executable)
            if dtype == "f32":
                pythons["openblas"] = sys.executable
            if options.torch:
                pythons["torch"] = options.torch
            sides = {side: start(python, side, isa, options.threads) for side, python in pythons.items()}
            for rows in options.rows:
                for layer in options.layers:
                    for way in options.ways:
                        case = {"isa": isa or "best", "dtype": dtype, "rows": rows, "layer": layer, "way": way}
                        row = measure(case, sides, options.rounds)
                        text = "  ".join(f"{key} {value}" for key, value in row.items())
                        print(json.dumps(row) if options.json else text, flush=True)
            for process in sides.values():
                process.stdin.close()
                process.wait()


if __name__ == "__main__":
    main()
