"""One pyperf benchmark a kernel, at the shapes of a training step of Qwen2.5-0.5B (2 x 512 tokens).

    python bench/kernels.py [-o FILE.json] [--only product ...] [pyperf's flags]

Each result is checked against float64 first, in every process. `python -m pyperf show FILE.json` reads what -o wrote;
`rates` gives each median as GFLOP/s, GB/s and a share of the machine's limits. KERNELS is the table; --only takes
the beginnings of names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pyperf

from entrenar.backend import cpu

TOKENS, HIDDEN, INNER, QKV, HEADS, KV, HEAD, VOCAB, RANK = 1024, 896, 4864, 1152, 14, 2, 64, 151936, 16
EXACT = {"f32": 2e-6, "bf16": 1.2e-2}  # largest error by largest value: f32 sums, and a rounding of the result to bf16
TYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}

Array = np.ndarray[Any, Any]


class Task(NamedTuple):
    """A kernel ready to run: the call, what it gave and should have (float64), and its work."""

    call: Callable[[], object]
    got: Callable[[], Array]
    want: Callable[[], Array]
    flops: float
    nbytes: float


def random(kind: str, *shape: int, scale: float = 1.0, seed: int = 0) -> Array:
    x = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return (x * np.float32(scale)).astype(TYPES[kind])


def wide(x: Array) -> Array:
    return x.astype(np.float64)


def product(kind: str, m: int, k: int, n: int, way: str) -> Task:
    """forward: x·Wᵀ, way back: g·W, weights: gᵀ·x, whose depth is the tokens. W (n, k)."""
    x, w, g = random(kind, m, k), random(kind, n, k, scale=0.02, seed=1), random(kind, m, n, seed=2)
    a, b = {"forward": (x, w.T), "input": (g, w), "weight": (g.T, x)}[way]
    out = np.empty((a.shape[0], b.shape[1]), np.float32 if way == "weight" else TYPES[kind])
    rows = slice(0, None, max(1, a.shape[0] // 16))
    return Task(
        lambda: cpu.product([(a, b)], out),
        lambda: out[rows],
        lambda: wide(a[rows]) @ wide(b),
        2.0 * m * n * k,
        a.nbytes + b.nbytes + out.nbytes,
    )


def attention(kind: str, heads: int, kv: int, head: int, tokens: int, back: bool) -> Task:
    """Causal, one sequence; the reference is of the first 64 queries' outputs, or of dq by differences of the loss."""
    q, g = random(kind, 1, tokens, heads, head), random(kind, 1, tokens, heads, head, seed=3)
    k, v = random(kind, 1, tokens, kv, head, seed=1), random(kind, 1, tokens, kv, head, seed=2)
    scale, pairs = head**-0.5, tokens * (tokens + 1) / 2 * heads
    o, lse = cpu.attention(q, k, v, scale)
    kept: list[Array] = [o]

    def rows(x: Array) -> Array:  # (heads, first 64 tokens, head)
        return np.repeat(wide(x)[0, :64], heads // x.shape[2], axis=1).transpose(1, 0, 2)

    def weights() -> Array:
        scores = rows(q) @ rows(k).transpose(0, 2, 1) * scale
        scores[:, ~np.tri(64, dtype=bool)] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return np.asarray(p / p.sum(-1, keepdims=True))

    def forward_want() -> Array:
        return np.asarray((weights() @ rows(v)).transpose(1, 0, 2))

    def backward_want() -> Array:
        p = weights()
        dp = rows(g) @ rows(v).transpose(0, 2, 1)
        ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
        return np.asarray((ds @ rows(k)).transpose(1, 0, 2))

    def forward() -> None:
        kept[0] = cpu.attention(q, k, v, scale)[0]

    def backward() -> None:
        kept[0] = cpu.attention_backward(g, q, k, v, o, lse, scale)[0]

    traffic = (2 * q.nbytes + k.nbytes + v.nbytes) * (2 if back else 1)
    if back:
        return Task(backward, lambda: kept[0][0, :64], backward_want, 10 * head * pairs, traffic)
    return Task(forward, lambda: kept[0][0, :64], forward_want, 4 * head * pairs, traffic)


def rms_norm(kind: str, back: bool) -> Task:
    x, g, w = random(kind, TOKENS, HIDDEN), random(kind, TOKENS, HIDDEN, seed=1), random("f32", HIDDEN, seed=2)
    kept = list(cpu.rms_norm(x, w, 1e-6))
    rstd = kept[1]

    def forward() -> None:
        kept[0] = cpu.rms_norm(x, w, 1e-6)[0]

    def backward() -> None:
        kept[0] = cpu.rms_norm_backward(g, x, w, rstd, False)[0]

    def want() -> Array:
        scale = 1 / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-6)
        normed = wide(x) * scale
        if not back:
            return np.asarray(normed * wide(w))
        gw = wide(g) * wide(w)
        return np.asarray(scale * (gw - normed * (gw * normed).mean(-1, keepdims=True)))

    return Task(backward if back else forward, lambda: kept[0], want, 0, (3 if back else 2) * x.nbytes)


def swiglu(kind: str, back: bool) -> Task:
    both, g = random(kind, TOKENS, 2 * INNER), random(kind, TOKENS, INNER, seed=1)
    gate, up = both[:, :INNER], both[:, INNER:]
    kept: list[Array] = [g]

    def forward() -> None:
        kept[0] = cpu.swiglu(gate, up)

    def backward() -> None:
        kept[0] = cpu.swiglu_backward(g, gate, up)[0]

    def want() -> Array:
        s = 1 / (1 + np.exp(-wide(gate)))
        return np.asarray(wide(g) * wide(up) * s * (1 + wide(gate) * (1 - s)) if back else wide(gate) * s * wide(up))

    return Task(backward if back else forward, lambda: kept[0], want, 0, (5 if back else 3) * g.nbytes)


def rope(kind: str) -> Task:
    qkv = random(kind, 2, TOKENS // 2, HEADS + 2 * KV, HEAD)
    q, before = qkv[:, :, :HEADS], wide(qkv[:, :, :HEADS])
    angles = np.arange(TOKENS // 2)[:, None] * 1e6 ** (-np.arange(HEAD // 2) / (HEAD // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    kept: list[Array] = []

    def call() -> None:  # there and back, so that the values stay as they are
        cpu.rope_(q, cos, sin)
        if not kept:
            kept.append(q.copy())
        cpu.rope_(q, cos, sin, inverse=True)

    def want() -> Array:
        c, s = wide(cos)[:, None], wide(sin)[:, None]
        low, high = before[..., : HEAD // 2], before[..., HEAD // 2 :]
        return np.concatenate([low * c - high * s, high * c + low * s], -1)

    return Task(call, lambda: kept[0], want, 0, 4 * q.nbytes)


def embedding(kind: str) -> Task:
    table = random("bf16", VOCAB, HIDDEN)
    ids = np.random.default_rng(1).integers(0, VOCAB, TOKENS)
    kept: list[Array] = []

    def call() -> None:
        kept[:] = [cpu.embedding(table, ids, TYPES[kind])]

    size = np.dtype(TYPES[kind]).itemsize
    return Task(call, lambda: kept[0], lambda: wide(table[ids]), 0, 2.0 * TOKENS * HIDDEN * size)


def cross_entropy(kind: str) -> Task:
    """256 rows, as a step has them; the call works in place, so it runs on what it made itself."""
    logits, labels = random(kind, 256, VOCAB), np.random.default_rng(1).integers(0, VOCAB, 256)
    before, kept = wide(logits), [logits]

    def call() -> None:
        losses = cpu.cross_entropy_gradient_(logits, labels, 1.0)
        if len(kept) == 1:
            kept.append(losses)

    def want() -> Array:
        top = before.max(-1)
        return np.asarray(top + np.log(np.exp(before - top[:, None]).sum(-1)) - before[np.arange(256), labels])

    return Task(call, lambda: kept[1], want, 0, 2.0 * logits.nbytes)


def adamw(count: int) -> Task:
    p, g, m, v = (random("f32", count, seed=i) for i in range(4))
    v = np.abs(v)
    beta1, beta2, lr, eps, decay = 0.9, 0.999, 1e-4, 1e-8, 0.1
    before, kept = (wide(p), wide(m), wide(v)), []

    def call() -> None:
        cpu.adam_step([p], [g], [m], [v], [10], lr, beta1, beta2, eps, decay, True)
        if not kept:
            kept.append(p.copy())

    def want() -> Array:
        w, first, second = before
        first, second = beta1 * first + (1 - beta1) * wide(g), beta2 * second + (1 - beta2) * wide(g) ** 2
        step = first / (1 - beta1**10) / (np.sqrt(second / (1 - beta2**10)) + eps)
        return np.asarray(w * (1 - lr * decay) - lr * step)

    return Task(call, lambda: kept[0], want, 0, 7.0 * p.nbytes)


def table() -> dict[str, tuple[str, Callable[[], Task]]]:
    """name -> (type of its arithmetic, maker)"""
    rows: dict[str, tuple[str, Callable[[], Task]]] = {}
    linears = {"qkv": (HIDDEN, QKV), "o": (HIDDEN, HIDDEN), "gate_up": (HIDDEN, 2 * INNER), "down": (INNER, HIDDEN)}
    for kind in ("f32", "bf16"):
        for name, (k, n) in linears.items():
            for way in ("forward", "input"):
                rows[f"product-{name}-{way}-{kind}"] = kind, lambda k=k, n=n, w=way, t=kind: product(t, TOKENS, k, n, w)
        rows[f"product-down-weight-{kind}"] = kind, lambda t=kind: product(t, TOKENS, INNER, HIDDEN, "weight")
        rows[f"product-lora-{kind}"] = kind, lambda t=kind: product(t, TOKENS, HIDDEN, RANK, "forward")
        for length in (512, 2048):
            for back in (False, True):
                name = f"attention{'-backward' if back else ''}-{length}-{kind}"
                rows[name] = kind, lambda t=kind, s=length, b=back: attention(t, HEADS, KV, HEAD, s, b)
        for back in (False, True):
            end = f"{'-backward' if back else ''}-{kind}"
            rows[f"rms_norm{end}"] = kind, lambda t=kind, b=back: rms_norm(t, b)
            rows[f"swiglu{end}"] = kind, lambda t=kind, b=back: swiglu(t, b)
        rows[f"rope-{kind}"] = kind, lambda t=kind: rope(t)
        rows[f"embedding-{kind}"] = kind, lambda t=kind: embedding(t)
        rows[f"cross_entropy_gradient-{kind}"] = kind, lambda t=kind: cross_entropy(t)
    rows["adamw-f32"] = "f32", lambda: adamw(1 << 22)
    return rows


KERNELS = table()


def check(name: str, kind: str, task: Task) -> None:
    """Runs the task once and compares."""
    task.call()
    got, want = wide(task.got()), task.want()
    error = np.abs(got - want).max() / np.abs(want).max()
    if not error <= EXACT[kind] * (4 if "backward" in name else 1):
        raise SystemExit(f"{name}: the largest error is {error:.2e} of the largest value")


def seconds_of(loops: int, name: str) -> float:
    """What pyperf calls in the process of one benchmark: checked once, then timed."""
    kind, make = KERNELS[name]
    if name not in ready:
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
