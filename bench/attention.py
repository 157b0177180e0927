"""Causal attention, forward and backward, against PyTorch's scaled_dot_product_attention.

    python bench/attention.py --torch PYTHON [--isa avx512_bf16 avx2] [--dtype bf16 f32] [--shapes qwen2.5-0.5b ...]
                              [--lengths 512 2048] [--batch 1] [--threads 2] [--rounds 9] [--json]

PYTHON is an interpreter with torch; it runs in a process of its own (for level avx2 held to AVX2 as well) and takes
turns with ours, so that noise hits both alike. Both results are checked against float64 first, on the same numbers. The
ratio is theirs to ours, the median over the rounds, with its quartiles; above 1, ours is faster. Layout (B, T, H, D) in
memory on both sides; data are random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from turns import ask, seconds

# name -> query heads, key heads, head size
SHAPES = {"qwen2.5-0.5b": (14, 2, 64), "llama2-7b": (32, 32, 128)}
HELD = {"avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}}
TOLERANCE = {"f32": 1e-5, "bf16": 5e-2}  # largest error over the largest value; PyTorch's dk in bf16 is off by 0.024


def data(shape: str, batch: int, length: int):
    """q, k, v, g in f32, each exactly a bf16."""
    import numpy as np

    heads, kv_heads, d = SHAPES[shape]
    rng = np.random.default_rng(0)
    sizes = [(batch, length, h, d) for h in (heads, kv_heads, kv_heads, heads)]
    drawn = [rng.standard_normal(size, np.float32) for size in sizes]
    return [(x.view(np.uint32) & 0xFFFF0000).view(np.float32) for x in drawn]


def ours(dtype: str, inputs):
    import ml_dtypes

    from entrenar.backend import cpu

    q, k, v, g = inputs if dtype == "f32" else [x.astype(ml_dtypes.bfloat16) for x in inputs]
    scale = q.shape[-1] ** -0.5

    def forward():
        return cpu.attention(q, k, v, scale)

    o, lse = forward()

    def backward():
        return cpu.attention_backward(g, q, k, v, o, lse, scale)

    return forward, backward, lambda: [o.astype("f4"), *(x.astype("f4") for x in backward())]


def theirs(dtype: str, inputs):
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attention

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    q, k, v, g = (torch.from_numpy(x).to(kind).transpose(1, 2) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    grouped = q.shape[1] != k.shape[1]

    def forward():
        return attention(q, k, v, is_causal=True, enable_gqa=grouped)

    o = forward()

    def backward():
        return torch.autograd.grad(o, (q, k, v), g, retain_graph=True)

    return forward, backward, lambda: [x.detach().float().transpose(1, 2).numpy() for x in (o, *backward())]


def check(results, inputs, dtype: str, who: str) -> None:
    """The first sequence and key head against float64."""
    import numpy as np

    q, k, v, g = (x[0].astype(np.float64) for x in inputs)
    length, group = len(q), q.shape[1] // k.shape[1]
    scores = np.einsum("thd,sd->hts", q[:, :group], k[:, 0]) * q.shape[-1] ** -0.5
    scores[:, ~np.tri(length, dtype=bool)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = np.einsum("hts,sd->thd", p, v[:, 0])
    dp = np.einsum("thd,sd->hts", g[:, :group], v[:, 0])
    ds = p * (dp - (o * g[:, :group]).sum(-1).T[..., None]) * q.shape[-1] ** -0.5
    exact = (o, np.einsum("hts,sd->thd", ds, k[:, 0]), np.einsum("hts,thd->sd", ds, q[:, :group])[:, None],
             np.einsum("hts,thd->sd", p, g[:, :group])[:, None])
    for name, x, y in zip(("o", "dq", "dk", "dv"), results, exact, strict=True):
        error = np.abs(x[0][:, : y.shape[1]] - y).max() / np.abs(y).max()
        if not error < TOLERANCE[dtype]:
            raise SystemExit(f"{who}: {name} is wrong, relative error {error}")


def serve(side: str) -> None:
    """Answers lines on stdin: a case as JSON makes and checks it, a direction runs it and gives its seconds."""
    runs: dict[str, object] = {}
    for line in sys.stdin:
        if line.startswith("{"):
            case = json.loads(line)
            inputs = data(case["shape"], case["batch"], case["length"])
            make = ours if side == "ours" else theirs
            runs["forward"], runs["backward"], results = make(case["dtype"], inputs)
            check(results(), inputs, case["dtype"], side)
            print("ready", flush=True)
            continue
        print(seconds(runs[line.strip()]), flush=True)


def start(python: str, side: str, threads: int, env: dict[str, str]) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "ENTRENAR_THREADS": str(threads), **env}
    command = [python, os.path.abspath(__file__), "--serve", side]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch; without it, ours alone is timed")
    parser.add_argument("--isa", nargs="+", default=[""])
    parser.add_argument("--dtype", nargs="+", default=["bf16", "f32"])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    for isa in options.isa:
        sides = {"ours": start(sys.executable, "ours", options.threads, {"ENTRENAR_ISA": isa})}
        if options.torch:
            sides["theirs"] = start(options.torch, "theirs", options.threads, HELD.get(isa, {}))
        for shape in options.shapes:
            for length in options.lengths:
                for dtype in options.dtype:
                    case = json.dumps({"shape": shape, "batch": options.batch, "length": length, "dtype": dtype})
                    for process in sides.values():
                        ask(process, case)
                    report(options, isa, shape, length, dtype, sides)
        for process in sides.values():
            process.stdin.close()
            process.wait()


def report(options, isa: str, shape: str, length: int, dtype: str, sides) -> None:
    heads, _, d = SHAPES[shape]
    for direction, products in (("forward", 2), ("backward", 5)):
        times = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, process in sides.items():
                time.sleep(0.2)  # the other library's idle threads spin on for a while
                times[side].append(float(ask(process, direction)))
        median = statistics.median(times["ours"])
        gflops = products * options.batch * length * (length + 1) * heads * d / median / 1e9
        row = {"isa": isa or "best", "shape": shape, "batch": options.batch, "length": length, "dtype": dtype,
               "direction": direction, "threads": options.threads, "ms": round(median * 1e3, 2),
               "gflops": round(gflops)}
        if "theirs" in times:
            ratios = sorted(b / a for a, b in zip(times["ours"], times["theirs"], strict=True))
            row |= {"torch_ms": round(statistics.median(times["theirs"]) * 1e3, 2),
                    "ratio": round(statistics.median(ratios), 2),
                    "quartiles": [round(x, 2) for x in (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4])]}
        if options.json:
            print(json.dumps(row), flush=True)
        else:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
