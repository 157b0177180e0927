"""Attention: causal over one sequence, with a window, and over several sequences in one row."""

from __future__ import annotations

from functools import partial

import numpy as np
from kernel_task import HEAD, HEADS, KV, Array, Results, Table, Task, of_first, random, wide

from entrenar.backend import cpu


def attention(kind: str, tokens: int, back: bool, window: int = 0, parts: int = 1) -> Task:
    """The reference is of the last head of keys and values and of all the queries that share it."""
    q, g = random(kind, 1, tokens, HEADS, HEAD), random(kind, 1, tokens, HEADS, HEAD, seed=3)
    k, v = random(kind, 1, tokens, KV, HEAD, seed=1), random(kind, 1, tokens, KV, HEAD, seed=2)
    scale, share = HEAD**-0.5, HEADS // KV
    at = np.arange(tokens)
    first = at // (tokens // parts) * (tokens // parts)
    seen = (at <= at[:, None]) & (at >= first[:, None]) & (at > at[:, None] - (window or tokens))
    mask = {"window": window, "starts": first[None] if parts > 1 else None}
    o, lse = cpu.attention(q, k, v, scale, **mask)

    def last(x: Array) -> list[Array]:  # (tokens, HEAD) of each
        return [wide(x[0, :, i]) for i in range(x.shape[2] - (share if x.shape[2] == HEADS else 1), x.shape[2])]

    def want() -> Results:
        (keys,), (values,) = last(k), last(v)
        outs, sums, dq, dk, dv = [], [], [], np.zeros_like(keys), np.zeros_like(values)
        for query, grad in zip(last(q), last(g), strict=True):
            scores = np.where(seen, query @ keys.T * scale, -np.inf)
            sums.append(np.log(np.exp(scores).sum(-1)))
            p = np.exp(scores - sums[-1][:, None])
            outs.append(p @ values)
            if back:
                dp = grad @ values.T
                ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
                dq.append(ds @ keys)
                dk += ds.T @ query
                dv += p.T @ grad
        return (np.stack(dq), dk, dv) if back else (np.stack(outs), np.stack(sums))

    def forward(made: tuple[Array, Array]) -> Results:
        return np.stack(last(made[0])), made[1][0, -share:]

    def backward(made: tuple[Array, Array, Array]) -> Results:
        return np.stack(last(made[0])), *last(made[1]), *last(made[2])

    traffic, pairs = (2 * q.nbytes + k.nbytes + v.nbytes) * (2 if back else 1), seen.sum() * HEADS
    if back:
        return of_first(lambda: cpu.attention_backward(g, q, k, v, o, lse, scale, **mask), want, traffic,
                        10.0 * HEAD * pairs, backward)  # fmt: skip
    return of_first(lambda: cpu.attention(q, k, v, scale, **mask), want, traffic, 4.0 * HEAD * pairs, forward)


def table() -> Table:
    rows: Table = {}
    for kind in ("f32", "bf16"):
        for back in (False, True):
            name, make = f"attention{'-backward' if back else ''}", partial(attention, kind, back=back)
            for tokens in (512, 2048):
                rows[f"{name}-{tokens}-{kind}"] = kind, partial(make, tokens)
            rows[f"{name}-window-2048-{kind}"] = kind, partial(make, 2048, window=256)
            rows[f"{name}-packed-2048-{kind}"] = kind, partial(make, 2048, parts=4)
    return rows
