"""Compare every operation, forward and backward, with PyTorch in float64. Development only.

Run ``python tests/oracles/gradients_torch.py`` where both entrenar and torch are installed. Prints the worst
max |error| / max |value| of results and gradients for each operation; exit code 1 above 1e-5 or without a case.
Then a decoder's layer with its loss in bfloat16, ours beside PyTorch's autocast, both against float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from entrenar import ops
from entrenar.tensor import OPS, Tensor, manual_seed

LIMIT = 1e-5
rng = np.random.default_rng(1)
Case = tuple[str, list[np.ndarray], Callable[..., Tensor], Callable[..., torch.Tensor]]


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return rng.uniform(0.5, 3, size=shape).astype(np.float32)


def rotate(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """As transformers does: x cos + rotate_half(x) sin; for adjacent pairs as Llama's original complex product."""
    if interleaved:
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    both = torch.cat([angles, angles], -1)[:, None]
    a, b = x.chunk(2, -1)
    return x * both.cos() + torch.cat([-b, a], -1) * both.sin()


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int = 0, starts: np.ndarray | None = None
) -> torch.Tensor:
    t, s = q.shape[1], k.shape[1]
    position, key = torch.arange(s - t, s)[:, None], torch.arange(s)[None]
    mask = key <= position
    if window:
        mask = mask & (key > position - window)
    if starts is not None:
        mask = mask[None] & (key[None] >= torch.tensor(starts)[..., None])
        mask = mask[:, None]
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def cases() -> Iterator[Case]:
    for name in ("add", "sub", "mul", "div", "pow"):
        for sa, sb in (((17, 33), (17, 33)), ((5, 1, 33), (7, 1)), ((), (3, 19))):
            yield name, [positive(*sa), positive(*sb)], getattr(ops, name), getattr(torch, name)
    yield "neg", [normal(17, 33)], ops.neg, torch.neg
    yield "exp", [normal(17, 33)], ops.exp, torch.exp
    yield "log", [positive(17, 33)], ops.log, torch.log
    for axis in ((0,), (1, 2), (0, 1, 2)):
        yield "sum", [normal(9, 17, 33)], lambda x, a=axis: x.sum(a), lambda x, a=axis: x.sum(a)
        yield "mean", [normal(9, 17, 33)], lambda x, a=axis: x.mean(a), lambda x, a=axis: x.mean(a)
    yield "relu", [normal(17, 33)], ops.relu, F.relu
    for kind in ("none", "tanh"):
        yield "gelu", [3 * normal(17, 33)], lambda x, k=kind: ops.gelu(x, k), lambda x, k=kind: F.gelu(x, approximate=k)
    yield "silu", [3 * normal(17, 33)], ops.silu, F.silu
    yield "swiglu", [normal(17, 33), normal(17, 33)], ops.swiglu, lambda a, b: F.silu(a) * b
    for axis in (-1, 0):
        yield "softmax", [4 * normal(17, 333)], lambda x, a=axis: ops.softmax(x, a), lambda x, a=axis: x.softmax(a)
    products = ((67, 129), (129, 35)), ((3, 17, 33), (3, 33, 9)), ((2, 1, 17, 33), (5, 33, 9)), ((3, 5, 65), (65, 7))
    for sa, sb in products:
        yield "matmul", [normal(*sa), normal(*sb)], ops.matmul, torch.matmul
    yield "linear", [normal(3, 17, 65), normal(35, 65), normal(35)], ops.linear, F.linear
    yield (
        "linear", [normal(3, 17, 65), normal(35, 65), normal(35), normal(8, 65), normal(35, 8)],
        lambda x, w, c, a, b: ops.linear(x, w, c, (a, b, 2.0)),
        lambda x, w, c, a, b: F.linear(x, w, c) + 2 * F.linear(F.linear(x, a), b),
    )  # fmt: skip
    yield (
        "layer_norm", [normal(17, 65), normal(65), normal(65)], ops.layer_norm,
        lambda x, w, b: F.layer_norm(x, (65,), w, b),
    )  # fmt: skip
    yield "rms_norm", [normal(17, 65), normal(65)], ops.rms_norm, lambda x, w: F.rms_norm(x, (65,), w, 1e-6)
    angles = rng.uniform(0, 6, size=(11, 4))
    cos, sin = np.cos(angles), np.sin(angles)
    for interleaved in (False, True):
        yield (
            "rope", [normal(2, 11, 3, 8)], lambda x, i=interleaved: ops.rope(x, cos, sin, i),
            lambda x, i=interleaved: rotate(x, torch.tensor(angles), i),
        )  # fmt: skip
    starts = np.array([[0] * 9 + [9] * 12, [0] * 3 + [3] * 18])
    for t, s, heads, kv, options in (
        (21, 21, 4, 4, {}), (21, 21, 6, 2, {}), (5, 21, 4, 1, {}), (21, 21, 4, 2, {"window": 6}),
        (21, 21, 4, 2, {"starts": starts}),
    ):  # fmt: skip
        yield (
            "attention", [normal(2, t, heads, 24), normal(2, s, kv, 24), normal(2, s, kv, 24)],
            lambda q, k, v, o=options: ops.attention(q, k, v, **o), lambda q, k, v, o=options: attend(q, k, v, **o),
        )  # fmt: skip
    yield (
        "rope_attention", [normal(2, 11, 8 * 8)],
        lambda x: ops.rope_attention(x, 4, 2, cos, sin, 8**-0.5), lambda x: rope_attend(x, 4, 2, angles),
    )  # fmt: skip
    yield "cast", [normal(3, 5)], lambda x: ops.cast(x, "f32"), lambda x: x
    for name, (operands, mine, reference) in projections().items():
        yield name.split()[0], operands, mine, reference
    ids = rng.integers(0, 50, size=(3, 17))
    yield "embedding", [normal(50, 33)], lambda w: ops.embedding(w, ids), lambda w: F.embedding(torch.tensor(ids), w)
    labels = rng.integers(0, 333, size=17)
    labels[::3] = -100
    yield (
        "cross_entropy", [4 * normal(17, 333)], lambda x: ops.cross_entropy(x, labels),
        lambda x: F.cross_entropy(x, torch.tensor(labels)),
    )  # fmt: skip
    yield (
        "linear_cross_entropy", [normal(17, 9), normal(333, 9), normal(4, 9), normal(333, 4)],
        lambda x, w, a, b: ops.linear_cross_entropy(x, ops.Part(w, None, ops.Lora(a, b, 0.5)), labels),
        lambda x, w, a, b: F.cross_entropy(F.linear(x, w + 0.5 * b @ a), torch.tensor(labels)),
    )  # fmt: skip
    yield "dropout", [normal(17, 33)], drop, lambda x: x * torch.tensor(drop(Tensor(np.ones((17, 33)))).numpy())
    yield "reshape", [normal(6, 35)], lambda x: x.reshape(7, -1), lambda x: x.reshape(7, -1)
    yield "transpose", [normal(3, 5, 7)], lambda x: x.transpose(2, 0, 1), lambda x: x.permute(2, 0, 1)
    yield "slice", [normal(9, 17)], lambda x: x[1:8:3, ..., 5], lambda x: x[1:8:3, ..., 5]
    yield "concat", [normal(3, 5), normal(3, 2)], lambda *xs: ops.concat(xs, 1), lambda *xs: torch.cat(xs, 1)


def rope_attend(x: torch.Tensor, heads: int, kv: int, angles: np.ndarray) -> torch.Tensor:
    split = x.unflatten(-1, (heads + 2 * kv, -1)).split([heads, kv, kv], 2)
    turn = torch.tensor(angles)
    q, k = (rotate(part, turn, False).to(x.dtype) for part in split[:2])
    return attend(q, k, split[2]).flatten(2)


def projections() -> dict[str, tuple[list[np.ndarray], Callable[..., Tensor], Callable[..., torch.Tensor]]]:
    """The four of a decoder's layer: x (17, 20), inner size 24, adapters of rank 4."""

    def parts(*tensors: Any) -> list[ops.Part]:
        return [ops.Part(w, c, ops.Lora(a, b, 0.5)) for w, c, a, b in zip(*[iter(tensors)] * 4, strict=True)]

    def linears(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        by_part = zip(*[iter(tensors)] * 4, strict=True)
        return torch.cat([F.linear(x, w + 0.5 * b @ a, c) for w, c, a, b in by_part], -1)

    def weights(d: int, *outs: int) -> list[np.ndarray]:
        return [m for out in outs for m in (normal(out, d), normal(out), normal(4, d), normal(out, 4))]

    return {
        "projection of a norm": (
            [normal(17, 20), normal(20), *weights(20, 20, 10, 10)],
            lambda x, n, *ws: ops.projection(x, parts(*ws), norm=(n, 1e-6)),
            lambda x, n, *ws: linears(F.rms_norm(x, (20,), n, 1e-6), *ws),
        ),
        "projection and residual": (
            [normal(17, 20), normal(17, 20), *weights(20, 20)],
            lambda x, r, *ws: ops.projection(x, parts(*ws), residual=r),
            lambda x, r, *ws: r + linears(x, *ws),
        ),
        "projection of a gate": (
            [normal(17, 48), normal(17, 20), *weights(24, 20)],
            lambda x, r, *ws: ops.projection(x, parts(*ws), gated=True, residual=r),
            lambda x, r, *ws: r + linears(F.silu(x[:, :24]) * x[:, 24:], *ws),
        ),
    }


def drop(x: Tensor) -> Tensor:
    manual_seed(11)
    return ops.dropout(x, 0.25)


def error(actual: Any, expected: torch.Tensor) -> float:
    wide = expected.detach().numpy()
    return float(np.abs(np.asarray(actual, np.float64) - wide).max() / max(np.abs(wide).max(), 1e-30))


def worst_error(case: Case) -> float:
    _, arrays, ours, theirs = case
    xs = [Tensor(a, requires_grad=True) for a in arrays]
    ts = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]
    y, expected = ours(*xs), theirs(*ts)
    g = normal(*y.shape)
    y.backward(g)
    expected.backward(torch.tensor(g, dtype=torch.float64).reshape(expected.shape))
    pairs = [(y.numpy(), expected), *((x.grad.numpy(), t.grad) for x, t in zip(xs, ts, strict=True))]
    return max(error(a, e) for a, e in pairs)


# ---- a layer and its loss in bfloat16


def layer_in_bf16() -> dict[str, tuple[float, float]]:
    """What -> (our error, PyTorch's), of a layer's gradients by max |error| / max |value| against float64.

    Both have bfloat16 values flow between operations and float32 parameters; PyTorch's is autocast.
    """
    d, heads, kv, inner, vocab, batch, tokens = 64, 4, 2, 160, 333, 2, 33
    sizes = {"q": (d, d), "k": (d // 2, d), "v": (d // 2, d), "o": (d, d), "gate": (inner, d), "up": (inner, d),
             "down": (d, inner)}  # fmt: skip
    values = {"x": normal(batch, tokens, d), "norm": 1 + normal(d) / 8, "norm2": 1 + normal(d) / 8}
    values |= {name: normal(*shape) / np.float32(np.sqrt(shape[1])) for name, shape in sizes.items()}
    values |= {f"{name}.a": normal(8, n) / np.float32(np.sqrt(n)) for name, (_, n) in sizes.items()}
    values |= {f"{name}.b": normal(m, 8) / 4 for name, (m, _) in sizes.items()}
    values["head"] = normal(vocab, d) / 8
    angles = rng.uniform(0, 6, size=(tokens, d // heads // 2))
    labels = rng.integers(0, vocab, size=batch * tokens)

    def ours() -> dict[str, np.ndarray]:
        t = {name: Tensor(value, requires_grad=True) for name, value in values.items()}
        part = {name: ops.Part(t[name], None, ops.Lora(t[f"{name}.a"], t[f"{name}.b"], 0.5)) for name in sizes}
        x = ops.cast(t["x"], "bf16")
        qkv = ops.projection(x, [part["q"], part["k"], part["v"]], norm=(t["norm"], 1e-6))
        o = ops.rope_attention(qkv, heads, kv, np.cos(angles), np.sin(angles), (d // heads) ** -0.5)
        x = ops.projection(o, [part["o"]], residual=x)
        both = ops.projection(x, [part["gate"], part["up"]], norm=(t["norm2"], 1e-6))
        x = ops.projection(both, [part["down"]], gated=True, residual=x)
        ops.linear_cross_entropy(x.reshape(batch * tokens, d), ops.Part(t["head"]), labels).backward()
        return {name: tensor.grad.numpy() for name, tensor in t.items()}

    def theirs(dtype: torch.dtype) -> dict[str, np.ndarray]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        t = {name: torch.tensor(value, dtype=wide, requires_grad=True) for name, value in values.items()}

        def linear(name: str, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, t[name]) + 0.5 * F.linear(F.linear(x, t[f"{name}.a"]), t[f"{name}.b"])

        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            x = t["x"].to(dtype)
            h = F.rms_norm(x, (d,), t["norm"].to(dtype), 1e-6)
            qkv = torch.cat([linear(name, h) for name in "qkv"], -1)
            x = x + linear("o", rope_attend(qkv, heads, kv, angles))
            h = F.rms_norm(x, (d,), t["norm2"].to(dtype), 1e-6)
            x = x + linear("down", F.silu(linear("gate", h)) * linear("up", h))
            logits = F.linear(x.flatten(0, 1), t["head"])
        F.cross_entropy(logits.to(wide), torch.tensor(labels)).backward()
        return {name: tensor.grad.numpy() for name, tensor in t.items()}

    exact, pairs = theirs(torch.float64), (ours(), theirs(torch.bfloat16))
    return {
        name: tuple(float(np.abs(grads[name] - value).max() / np.abs(value).max()) for grads in pairs)
        for name, value in exact.items()
    }


def main() -> int:
    worst: dict[str, float] = {}
    for case in cases():
        worst[case[0]] = max(worst.get(case[0], 0.0), worst_error(case))
    for name, value in sorted(worst.items()):
        print(f"{name:20} {value:.1e}{'' if value <= LIMIT else '   above the limit'}")
    missing = sorted(set(OPS) - set(worst))
    for name in missing:
        print(f"{name:20} has no case")
    print(f"{len(worst)} operations, worst {max(worst.values()):.1e}, limit {LIMIT:.0e}")
    print("\na layer in bfloat16: gradient of, our error, PyTorch's")
    rows = layer_in_bf16()
    for name, (mine, theirs) in rows.items():
        print(f"{name:14} {mine:.1e} {theirs:.1e}")
    mine, theirs = (float(np.median(column)) for column in zip(*rows.values(), strict=True))
    print(f"{'median':14} {mine:.1e} {theirs:.1e}")
    return int(bool(missing) or max(worst.values()) > LIMIT or mine > 1.5 * theirs)


if __name__ == "__main__":
    sys.exit(main())
