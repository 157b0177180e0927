"""One table: for every operation, calls of it with small odd-sized operands and the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import reference as ref

from entrenar import ops
from entrenar.tensor import Tensor, manual_seed

Array = np.ndarray


@dataclass(frozen=True)
class Sample:
    """`call` on Tensors of `operands` computes what `reference` computes on float64 arrays of them."""

    op: str
    what: str
    operands: tuple[Array, ...]
    call: Callable[..., Tensor]
    reference: Callable[..., Array]
    flow: tuple[int, ...]  # operands that may be bfloat16

    def __str__(self) -> str:
        return f"{self.op}-{self.what}" if self.what else self.op


SAMPLES: list[Sample] = []
FLOW = {
    **dict.fromkeys(("affine", "cast", "dropout", "gated", "linear", "projection"), (0,)),
    "linear_cross_entropy": (0,),
    **dict.fromkeys(("reshape", "rms_norm", "rope", "rope_attention", "slice", "transpose"), (0,)),
    **dict.fromkeys(("add", "swiglu"), (0, 1)),
    **dict.fromkeys(("attention", "concat"), (0, 1, 2)),
}  # of the operations that serve bfloat16
_rng = np.random.default_rng(20)


def normal(*shape: int) -> Array:
    return _rng.normal(size=shape).astype(np.float32)


def positive(*shape: int) -> Array:
    return _rng.uniform(0.5, 3, size=shape).astype(np.float32)


def away_from_zero(*shape: int) -> Array:
    """Where a kink at 0 or a division would spoil the differences."""
    return positive(*shape) * _rng.choice([-1, 1], size=shape).astype(np.float32)


def sample(
    op: str, *operands: Array, reference: Callable[..., Any], call: Callable[..., Tensor] | None = None,
    what: str = "", flow: tuple[int, ...] | None = None,
) -> None:
    flow = FLOW.get(op, ()) if flow is None else flow
    SAMPLES.append(Sample(op, what, operands, call or getattr(ops, op), reference, flow))


# ---- arithmetic
BROADCASTS = {
    "same": ((3, 5), (3, 5)),
    "row": ((2, 3, 5), (5,)),
    "column": ((3, 1), (3, 7)),
    "outer": ((4, 1, 3), (5, 1)),
    "scalar": ((), (2, 3)),
}
for kind, (sa, sb) in BROADCASTS.items():
    sample("add", normal(*sa), normal(*sb), reference=np.add, what=kind)
    sample("sub", normal(*sa), normal(*sb), reference=np.subtract, what=kind)
    sample("mul", normal(*sa), normal(*sb), reference=np.multiply, what=kind)
    sample("div", normal(*sa), away_from_zero(*sb), reference=np.divide, what=kind)
    sample("pow", positive(*sa), normal(*sb), reference=np.power, what=kind)
for exponent in (0.0, 0.5, 1.0, 2.0, 3.0, -1.0):
    sample(
        "pow", positive(3, 5), call=lambda x, e=exponent: x.pow(e), reference=lambda x, e=exponent: x**e,
        what=f"exponent{exponent}",
    )
sample("pow", away_from_zero(3, 5), call=lambda x: x**2, reference=lambda x: x**2, what="negative base")
sample("neg", normal(3, 5), reference=np.negative)
sample("exp", normal(3, 5), reference=np.exp)
sample("log", positive(3, 5), reference=np.log)
for axis, keep in ((None, False), (0, False), (-1, True), ((0, 2), False), ((1, -1), True), ((), False)):
    for name in ("sum", "mean"):
        sample(
            name, normal(3, 5, 2), what=f"{axis}",
            call=lambda x, n=name, a=axis, k=keep: getattr(x, n)(a, k),
            reference=lambda x, n=name, a=axis, k=keep: getattr(np, n)(x, a, keepdims=k),
        )
sample("sum", normal(), reference=np.sum, what="0-d")

# ---- shape
sample("reshape", normal(2, 3, 4), call=lambda x: x.reshape(6, -1), reference=lambda x: x.reshape(6, 4))
sample("reshape", normal(1), call=lambda x: x.reshape(()), reference=lambda x: x.reshape(()), what="0-d")
sample(
    "transpose", normal(2, 3, 4),
    call=lambda x: x.transpose(1, 2, 0), reference=lambda x: x.transpose(1, 2, 0),
)
sample("transpose", normal(2, 3, 4), call=lambda x: x.T, reference=lambda x: x.T, what="T")
SLICES: dict[str, Any] = {
    "integer": 1,
    "negative integer": (slice(None), -1),
    "negative step": np.s_[::-2, 4:0:-3],
    "ellipsis": np.s_[..., 1],
    "new axis": np.s_[None, 1:, ..., None],
    "element": (1, 2, 0),
    "nothing": np.s_[5:],
}
for kind, key in SLICES.items():
    sample("slice", normal(3, 5, 2), call=lambda x, k=key: x[k], reference=lambda x, k=key: x[k], what=kind)
for axis in (0, -1):
    shapes = [(2, 3), (4, 3), (1, 3)] if axis == 0 else [(2, 3), (2, 1), (2, 4)]
    sample(
        "concat", *(normal(*s) for s in shapes), what=f"{axis}",
        call=lambda *xs, a=axis: ops.concat(list(xs), a), reference=lambda *xs, a=axis: np.concatenate(xs, a),
    )

# ---- activations
sample("relu", away_from_zero(3, 7), reference=ref.relu)
sample("gelu", normal(3, 7), reference=ref.gelu)
sample("gelu", normal(3, 7), call=lambda x: ops.gelu(x, "tanh"), reference=ref.gelu_tanh, what="tanh")
sample("silu", normal(3, 7), reference=ref.silu)
sample("gated", normal(2, 3, 14), reference=lambda x: ref.silu(x[..., :7]) * x[..., 7:])
sample("swiglu", normal(2, 3, 7), normal(2, 3, 7), reference=lambda gate, up: ref.silu(gate) * up)
for axis in (-1, 0, 1):
    sample(
        "softmax", 3 * normal(3, 4, 7), what=f"{axis}",
        call=lambda x, a=axis: ops.softmax(x, axis=a), reference=lambda x, a=axis: ref.softmax(x, a),
    )

# ---- products
PRODUCTS = {
    "matrices": ((3, 5), (5, 7)),
    "flat": ((2, 3, 5), (5, 7)),
    "batch": ((2, 3, 5), (2, 5, 7)),
    "two batches": ((2, 1, 3, 5), (3, 5, 2)),
    "b larger": ((3, 5), (4, 5, 2)),
    "vectors": ((5,), (5,)),
    "row": ((5,), (2, 5, 3)),
    "row flat": ((5,), (5, 3)),
    "column": ((2, 3, 5), (5,)),
}
for kind, (sa, sb) in PRODUCTS.items():
    sample("matmul", normal(*sa), normal(*sb), reference=np.matmul, what=kind)
sample("linear", normal(2, 3, 5), normal(7, 5), reference=ref.linear)
sample("linear", normal(5), normal(7, 5), normal(7), reference=ref.linear, what="bias")
sample(
    "linear", normal(2, 3, 5), normal(7, 5), normal(7), normal(2, 5), normal(7, 2), what="lora",
    call=lambda x, w, c, a, b: ops.linear(x, w, c, lora=(a, b, 0.5)),
    reference=lambda x, w, c, a, b: ref.linear(x, w, c) + 0.5 * ref.linear(ref.linear(x, a), b),
)
sample(
    "linear", normal(4, 5), normal(7, 5), normal(2, 5), normal(7, 2), normal(4, 5), what="lora input",
    call=lambda x, w, a, b, xl: ops.linear(x, w, lora=(a, b, 2.0, xl)),
    reference=lambda x, w, a, b, xl: ref.linear(x, w) + 2 * ref.linear(ref.linear(xl, a), b), flow=(0, 4),
)

# ---- norms
sample("rms_norm", normal(2, 3, 7), normal(7), reference=lambda x, w: ref.rms_norm(x, w, 1e-6))
sample(
    "rms_norm", 0.01 * normal(3, 33), normal(33), what="eps",
    call=lambda x, w: ops.rms_norm(x, w, eps=1e-3), reference=lambda x, w: ref.rms_norm(x, w, 1e-3),
)
sample(
    "layer_norm", normal(2, 3, 7), normal(7), normal(7),
    reference=lambda x, w, b: ref.layer_norm(x, w, b, 1e-5),
)

# ---- columns
sample("affine", normal(2, 3, 7), away_from_zero(7), reference=np.multiply)
sample("affine", normal(5, 3), np.array([0.5, 0, 2], np.float32), reference=np.multiply, what="zero")
sample("affine", normal(2, 3, 7), normal(7), normal(7), reference=lambda x, s, b: x * s + b, what="shift")

# ---- attention
ANGLES = np.linspace(0.1, 5, 2 * 5 * 3).reshape(2, 5, 3)
for interleaved in (False, True):
    for kind, angles in (("whole", ANGLES[0]), ("by sequence", ANGLES), ("part", ANGLES[..., :2])):
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        sample(
            "rope", normal(2, 5, 3, 6), what=f"{kind}, {'adjacent' if interleaved else 'halves'}",
            call=lambda x, c=cos, s=sin, i=interleaved: ops.rope(x, c, s, i),
            reference=lambda x, c=cos, s=sin, i=interleaved: ref.rope(x, c, s, i),
        )
ATTENTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "causal": ((2, 5, 2, 4), (2, 5, 2, 4), {}),
    "grouped": ((1, 5, 6, 3), (1, 5, 2, 3), {}),
    "cache": ((2, 2, 2, 4), (2, 7, 1, 4), {}),
    "not causal": ((1, 3, 2, 5), (1, 6, 2, 5), {"causal": False}),
    "window": ((1, 7, 2, 4), (1, 7, 1, 4), {"window": 3}),
    "packed": ((2, 5, 2, 4), (2, 5, 1, 4), {"starts": np.array([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]])}),
    "scale": ((1, 3, 1, 4), (1, 3, 1, 4), {"scale": 0.3}),
}
for kind, (sq, skv, options) in ATTENTIONS.items():
    sample(
        "attention", normal(*sq), normal(*skv), normal(*skv), what=kind,
        call=lambda q, k, v, o=options: ops.attention(q, k, v, **o),
        reference=lambda q, k, v, o={"scale": sq[-1] ** -0.5, **options}: ref.attention(q, k, v, **o),
    )

# ---- tables, dropout, loss
IDS = np.array([[4, 0, 4], [1, 1, 4]])
sample("embedding", normal(6, 5), call=lambda w: ops.embedding(w, IDS), reference=lambda w: w[IDS])


def _dropout(x: Tensor) -> Tensor:
    manual_seed(7)
    return ops.dropout(x, 0.25)


def _dropout_reference(x: Array) -> Array:
    kept = _dropout(Tensor(np.ones(x.shape))).numpy() != 0  # which values stay does not depend on them
    return np.where(kept, x / 0.75, 0)


sample("dropout", normal(5, 13), call=_dropout, reference=_dropout_reference)
sample("dropout", normal(5), call=lambda x: ops.dropout(x, 0.5, False), reference=lambda x: x, what="off")

LABELS = np.array([[3, 0, -100], [-100, 6, 6]])
for ignore, denominator in ((-100, None), (-100, 2.5), (6, None)):
    labels = np.where(LABELS == -100, ignore, LABELS)
    sample(
        "cross_entropy", 3 * normal(2, 3, 7), what=f"{ignore} {denominator}",
        call=lambda x, y=labels, i=ignore, d=denominator: ops.cross_entropy(x, y, i, d),
        reference=lambda x, y=labels, i=ignore, d=denominator: ref.cross_entropy(x, y, i, d),
    )

# ---- fused operations
sample("cast", normal(3, 5), call=lambda x: ops.cast(x, "f32"), reference=lambda x: x)

Operands = tuple[Array, ...]


@dataclass(frozen=True)
class Layer:
    """What a sample of `projection` has around its parts: sizes are of weights (out, 5) with their biases and ranks."""

    outs: tuple[int, ...] = (7,)
    biases: tuple[bool, ...] = (False,)
    ranks: tuple[int, ...] = (0,)
    norm: bool = False
    gated: bool = False
    residual: bool = False
    dropout: float = 0.0

    def operands(self) -> Operands:
        d = 5
        xs = [normal(2, 3, 2 * d if self.gated else d)]
        for out, bias, rank in zip(self.outs, self.biases, self.ranks, strict=True):
            xs += [normal(out, d)] + [normal(out)] * bias + [normal(rank, d), normal(out, rank)] * (rank > 0)
        return (*xs, *[normal(d)] * self.norm, *[normal(2, 3, sum(self.outs))] * self.residual)

    def _parts(self, xs: list[Any]) -> list[tuple[Any, Any, Any]]:
        """Takes (weight, bias or None, (a, b, scale) or None) of each part off xs; scales are 0.5, 1.5, 2.5."""
        return [
            (xs.pop(0), xs.pop(0) if bias else None, (xs.pop(0), xs.pop(0), i + 0.5) if rank else None)
            for i, (bias, rank) in enumerate(zip(self.biases, self.ranks, strict=True))
        ]

    def call(self, x: Tensor, *others: Tensor) -> Tensor:
        manual_seed(7)
        xs = list(others)
        parts = [ops.Part(w, c, lora and ops.Lora(*lora)) for w, c, lora in self._parts(xs)]
        norm = (xs.pop(0), 1e-3) if self.norm else None
        return ops.projection(x, parts, norm, self.gated, xs.pop() if self.residual else None, self.dropout)

    def reference(self, x: Array, *others: Array) -> Array:
        manual_seed(7)
        xs = list(others)
        parts = self._parts(xs)
        h = ref.rms_norm(x, xs.pop(0), 1e-3) if self.norm else ref.silu(x[..., :5]) * x[..., 5:] if self.gated else x
        outs = []
        for w, c, lora in parts:
            outs.append(ref.linear(h, w, c))
            if lora:
                mask = ops.dropout(Tensor(np.ones(h.shape)), self.dropout).numpy() if self.dropout else 1
                outs[-1] = outs[-1] + lora[2] * ref.linear(ref.linear(h * mask, lora[0]), lora[1])
        return np.concatenate(outs, -1) + (xs.pop() if self.residual else 0)


LAYERS = {
    "one": Layer(),
    "qkv": Layer((7, 3, 3), (True, False, True), (2, 3, 1), norm=True),
    "one adapter": Layer((7, 3, 3), (False,) * 3, (0, 2, 0), norm=True),
    "output": Layer((5,), (False,), (2,), residual=True),
    "gate and up": Layer((6, 6), (False,) * 2, (2, 2), norm=True),
    "down": Layer((5,), (True,), (2,), gated=True, residual=True),
    "dropout": Layer((7, 4, 3), (False,) * 3, (2, 0, 3), norm=True, dropout=0.4),
    "gated dropout": Layer((7,), (False,), (2,), gated=True, dropout=0.4),
}
for kind, layer in LAYERS.items():
    operands = layer.operands()
    flow = (0, len(operands) - 1) if layer.residual else (0,)
    sample("projection", *operands, call=layer.call, reference=layer.reference, what=kind, flow=flow)


def rope_attention_reference(
    qkv: Array, heads: int, kv_heads: int, cos: Array, sin: Array, scale: float, **options: Any
) -> Array:
    batch, tokens, _ = qkv.shape
    x = qkv.reshape(batch, tokens, heads + 2 * kv_heads, -1)
    q, k, v = np.split(x, [heads, heads + kv_heads], 2)
    o = ref.attention(ref.rope(q, cos, sin, False), ref.rope(k, cos, sin, False), v, scale, **options)
    return o.reshape(batch, tokens, -1)


TABLE = [f(ANGLES).astype(np.float32) for f in (np.cos, np.sin)]
for kind, batch, heads, kv_heads, table, options in (
    ("one head", 2, 1, 1, TABLE, {}),
    ("grouped", 1, 4, 2, [t[0] for t in TABLE], {}),
    ("window", 1, 2, 1, [t[0] for t in TABLE], {"window": 2}),
    ("part packed", 2, 1, 1, [t[0, :, :2] for t in TABLE], {"starts": np.array([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]])}),
):
    sample(
        "rope_attention", normal(batch, 5, (heads + 2 * kv_heads) * 6), what=kind,
        call=lambda x, a=(heads, kv_heads, *table, 0.4), o=options: ops.rope_attention(x, *a, **o),
        reference=lambda x, a=(heads, kv_heads, *table, 0.4), o=options: rope_attention_reference(x, *a, **o),
    )

for kind, ignore, denominator, shapes in (
    ("weight", -100, None, [(9, 5)]),
    ("masked", 6, 2.5, [(9, 5)]),
    ("all", -100, 2.5, [(9, 5), (9,), (2, 5), (9, 2)]),
):
    labels = np.where(LABELS == -100, ignore, LABELS)
    sample(
        "linear_cross_entropy", normal(2, 3, 5), *(normal(*s) for s in shapes), what=kind,
        call=lambda x, w, c=None, a=None, b=None, y=labels, i=ignore, d=denominator: ops.linear_cross_entropy(
            x, ops.Part(w, c, None if a is None else ops.Lora(a, b, 1.5)), y, i, d
        ),
        reference=lambda x, w, c=None, a=None, b=None, y=labels, i=ignore, d=denominator: ref.cross_entropy(
            ref.linear(x, w, c) + (0 if a is None else 1.5 * ref.linear(ref.linear(x, a), b)), y, i, d
        ),
    )
