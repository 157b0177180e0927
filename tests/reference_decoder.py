"""A Llama decoder in plain float64 NumPy, written from the papers, sharing no code with the package."""

from __future__ import annotations

import numpy as np


def rms_norm(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def rotate(x, positions, theta, rotary):
    """Split-half rotary embedding of x (T, H, D) over its first `rotary` elements."""
    half = rotary // 2
    angle = positions[:, None] * theta ** (-np.arange(half) * 2.0 / rotary)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def logits(weights, config, ids):
    """Logits (T, vocab) of one sequence. `weights` maps Hugging Face names to arrays; `config` is a plain dict."""
    w = {k: np.asarray(v, np.float64) for k, v in weights.items()}
    heads, kv, hd = config["heads"], config["kv_heads"], config["head_dim"]
    eps, n = config["eps"], len(ids)
    x = w["model.embed_tokens.weight"][ids]
    pos = np.arange(n, dtype=np.float64)
    hidden = np.tril(np.ones((n, n), bool))
    if config.get("window"):
        hidden &= ~np.tril(np.ones((n, n), bool), -config["window"])
    for i in range(config["layers"]):
        p = f"model.layers.{i}."

        def lin(name, v, p=p):
            y = v @ w[p + name + ".weight"].T
            if p + name + ".bias" in w:
                y = y + w[p + name + ".bias"]
            a, b = w.get(p + name + ".lora_A.weight"), w.get(p + name + ".lora_B.weight")
            return y if a is None else y + config["lora_scale"] * (v @ a.T @ b.T)

        h = rms_norm(x, w[p + "input_layernorm.weight"], eps)
        if p + "self_attn.qkv_proj.weight" in w:
            q, k, v = np.split(lin("self_attn.qkv_proj", h), [heads * hd, (heads + kv) * hd], axis=-1)
        else:
            q, k, v = (lin(f"self_attn.{m}_proj", h) for m in "qkv")
        q = rotate(q.reshape(n, heads, hd), pos, config["theta"], hd)
        k = rotate(k.reshape(n, kv, hd), pos, config["theta"], hd)
        v = v.reshape(n, kv, hd)
        out = np.empty((n, heads, hd))
        for head in range(heads):
            g = head // (heads // kv)
            s = np.where(hidden, q[:, head] @ k[:, g].T / np.sqrt(hd), -np.inf)
            e = np.exp(s - s.max(-1, keepdims=True))
            out[:, head] = e / e.sum(-1, keepdims=True) @ v[:, g]
        x = x + lin("self_attn.o_proj", out.reshape(n, -1))
        h = rms_norm(x, w[p + "post_attention_layernorm.weight"], eps)
        if p + "mlp.gate_up_proj.weight" in w:
            gate, up = np.split(lin("mlp.gate_up_proj", h), 2, axis=-1)
        else:
            gate, up = lin("mlp.gate_proj", h), lin("mlp.up_proj", h)
        x = x + lin("mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    x = rms_norm(x, w["model.norm.weight"], eps)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def loss(weights, config, ids, labels):
    """Mean next-token cross-entropy over labels that are not -100; ids and labels (B, T)."""
    total = count = 0
    for row, marks in zip(ids, labels, strict=True):
        z = logits(weights, config, row)[:-1]
        top = z.max(-1, keepdims=True)
        logp = z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))
        for t, label in enumerate(marks[1:]):
            if label != -100:
                total -= logp[t, label]
                count += 1
    return total / count
