"""Layers: norms, softmax, SwiGLU, rotary and token embedding, the loss, dropout."""

from __future__ import annotations

from functools import partial

import numpy as np
from kernel_task import (
    HEAD,
    HEADS,
    HIDDEN,
    INNER,
    KV,
    TOKENS,
    TYPES,
    VOCAB,
    Array,
    Results,
    Table,
    Task,
    of_first,
    philox,
    random,
    wide,
)

from entrenar.backend import cpu


def rms_norm(kind: str, back: bool) -> Task:
    x, g, w = random(kind, TOKENS, HIDDEN), random(kind, TOKENS, HIDDEN, seed=1), random("f32", HIDDEN, seed=2)
    rstd = cpu.rms_norm(x, w, 1e-6)[1]

    def want() -> Results:
        scale = 1 / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-6)
        normed = wide(x) * scale
        if not back:
            return normed * wide(w), scale[:, 0]
        gw = wide(g) * wide(w)
        return scale * (gw - normed * (gw * normed).mean(-1, keepdims=True)), (wide(g) * normed).sum(0)

    if back:
        return of_first(lambda: cpu.rms_norm_backward(g, x, w, rstd), want, 3 * x.nbytes)
    return of_first(lambda: cpu.rms_norm(x, w, 1e-6), want, 2 * x.nbytes)


def layer_norm(back: bool) -> Task:
    x, g, w, b = (random("f32", *shape, seed=i) for i, shape in enumerate([(TOKENS, HIDDEN)] * 2 + [(HIDDEN,)] * 2))
    _, mean, rstd = cpu.layer_norm(x, w, b, 1e-5)

    def want() -> Results:
        centre, scale = wide(x).mean(-1, keepdims=True), 1 / np.sqrt(wide(x).var(-1, keepdims=True) + 1e-5)
        normed = (wide(x) - centre) * scale
        if not back:
            return normed * wide(w) + wide(b), centre[:, 0], scale[:, 0]
        gw = wide(g) * wide(w)
        dx = scale * (gw - gw.mean(-1, keepdims=True) - normed * (gw * normed).mean(-1, keepdims=True))
        return dx, (wide(g) * normed).sum(0), wide(g).sum(0)

    if back:
        return of_first(lambda: cpu.layer_norm_backward(g, x, w, mean, rstd), want, 3 * x.nbytes)
    return of_first(lambda: cpu.layer_norm(x, w, b, 1e-5), want, 2 * x.nbytes)


def softmax(back: bool) -> Task:
    """As many rows as 14 heads of 512 tokens have."""
    x, g = random("f32", HEADS * 512, 512), random("f32", HEADS * 512, 512, seed=1)
    y = cpu.softmax(x)

    def want() -> Results:
        p = np.exp(wide(x))
        p /= p.sum(-1, keepdims=True)
        return (p * (wide(g) - (p * g).sum(-1, keepdims=True)),) if back else (p,)

    if back:
        return of_first(lambda: cpu.softmax_backward(y, g), want, 3 * x.nbytes)
    return of_first(lambda: cpu.softmax(x), want, 2 * x.nbytes)


def swiglu(kind: str, back: bool) -> Task:
    both, g = random(kind, TOKENS, 2 * INNER), random(kind, TOKENS, INNER, seed=1)
    gate, up = both[:, :INNER], both[:, INNER:]

    def want() -> Results:
        s = 1 / (1 + np.exp(-wide(gate)))
        if not back:
            return (wide(gate) * s * wide(up),)
        return wide(g) * wide(up) * s * (1 + wide(gate) * (1 - s)), wide(g) * wide(gate) * s

    if back:
        return of_first(lambda: cpu.swiglu_backward(g, gate, up), want, 5 * g.nbytes)
    return of_first(lambda: cpu.swiglu(gate, up), want, 3 * g.nbytes)


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
        if len(kept) == 1:
            kept.append(q.copy())

    def want() -> Results:
        c, s = wide(cos)[:, None], wide(sin)[:, None]
        low, high = before[..., : HEAD // 2], before[..., HEAD // 2 :]
        return np.concatenate([low * c - high * s, high * c + low * s], -1), before

    return Task(call, lambda: kept, want, 0, 4 * q.nbytes)


def embedding(kind: str) -> Task:
    table, ids = random("bf16", VOCAB, HIDDEN), np.random.default_rng(1).integers(0, VOCAB, TOKENS)
    size = np.dtype(TYPES[kind]).itemsize
    return of_first(lambda: cpu.embedding(table, ids, TYPES[kind]), lambda: (wide(table[ids]),),
                    2.0 * TOKENS * HIDDEN * size)  # fmt: skip


def embedding_backward(kind: str) -> Task:
    """Ids repeat as words do; rows of no id are 0."""
    g, ids = random(kind, TOKENS, HIDDEN), (np.random.default_rng(1).random(TOKENS) ** 4 * VOCAB).astype(np.int64)

    def results(table: Array) -> Results:
        return table[ids], np.array([np.count_nonzero(table.any(1))])

    def want() -> Results:
        kinds, place = np.unique(ids, return_inverse=True)
        sums = np.zeros((len(kinds), HIDDEN))
        np.add.at(sums, place, wide(g))
        return sums[place], np.array([len(kinds)])

    return of_first(lambda: cpu.embedding_backward(g, ids, VOCAB), want, g.nbytes + 4.0 * VOCAB * HIDDEN,
                    results=results, bounds=(2e-6, 0))  # fmt: skip


def cross_entropy(kind: str, way: str) -> Task:
    """256 rows, as a step has them. way: the loss, its gradient, or (both) the two in one pass, in place."""
    logits, labels = random(kind, 256, VOCAB), np.random.default_rng(1).integers(0, VOCAB, 256)
    before, at = wide(logits), (np.arange(256), labels)
    g, lse = random("f32", 256, seed=2), cpu.cross_entropy(logits, labels)[1]

    def apart(gradient: Array) -> tuple[Array, Array]:
        """The labels' own, and the rest, which is far smaller."""
        rest = gradient.copy()
        rest[at] = 0
        return gradient[at], rest

    def want() -> Results:
        total = np.log(np.exp(before).sum(-1))
        losses = total - before[at]
        if way == "loss":
            return losses, total
        p = np.exp(before - total[:, None])
        p[at] -= 1
        return (losses, *apart(p)) if way == "both" else apart(p * wide(g)[:, None])

    if way == "loss":
        return of_first(lambda: cpu.cross_entropy(logits, labels), want, logits.nbytes)
    if way == "backward":
        return of_first(lambda: cpu.cross_entropy_backward(g, logits, labels, lse), want, 2.0 * logits.nbytes,
                        results=apart)  # fmt: skip
    return of_first(lambda: cpu.cross_entropy_gradient_(logits, labels, 1.0), want, 2.0 * logits.nbytes,
                    results=lambda losses: (losses, *apart(logits)))  # fmt: skip


def dropout(kind: str) -> Task:
    x, p, seed, offset = random(kind, TOKENS, HIDDEN), 0.1, 1 << 40 | 5, (1 << 32) - 7

    def want() -> Results:
        words = philox(seed, np.arange(x.size // 4) + offset).reshape(x.shape)
        return (np.where(words < p * 2**32, 0, wide(x) / (1 - p)),)

    return of_first(lambda: cpu.dropout(x, p, seed, offset), want, 2 * x.nbytes)


def table() -> Table:
    rows: Table = {}
    for back in (False, True):
        end = "-backward" if back else ""
        for kind in ("f32", "bf16"):
            rows[f"rms_norm{end}-{kind}"] = kind, partial(rms_norm, kind, back)
            rows[f"swiglu{end}-{kind}"] = kind, partial(swiglu, kind, back)
        rows[f"layer_norm{end}-f32"] = "f32", partial(layer_norm, back)
        rows[f"softmax{end}-f32"] = "f32", partial(softmax, back)
    for kind in ("f32", "bf16"):
        rows[f"rope-{kind}"] = kind, partial(rope, kind)
        rows[f"embedding-{kind}"] = kind, partial(embedding, kind)
        rows[f"embedding-backward-{kind}"] = kind, partial(embedding_backward, kind)
        for name, way in (("", "loss"), ("-backward", "backward"), ("_gradient", "both")):
            rows[f"cross_entropy{name}-{kind}"] = kind, partial(cross_entropy, kind, way)
        rows[f"dropout-{kind}"] = kind, partial(dropout, kind)
    return rows
