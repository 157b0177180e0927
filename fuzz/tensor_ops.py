"""Any operation on tensors of any shape, stride and value runs forward and back, or raises an EntrenarError."""

from __future__ import annotations

import sys

import atheris
import numpy as np

with atheris.instrument_imports(include=["entrenar"]):
    from entrenar import ops
    from entrenar.errors import EntrenarError
    from entrenar.tensor import Tensor

VALUES = np.array([0, -0.0, 1, -1, 1e-40, 3e38, np.inf, -np.inf, np.nan, 0.5, -2, 88], np.float32)


class Args:
    """Draws arguments from the fuzzer's bytes. Sizes are mostly from one pool, so that shapes often fit."""

    def __init__(self, data: atheris.FuzzedDataProvider) -> None:
        self.data = data
        self.pool = [data.ConsumeIntInRange(0, 17) for _ in range(3)]
        self.made: list[Tensor] = []

    def int(self, low: int = -3, high: int = 20) -> int:
        return self.data.ConsumeIntInRange(low, high)

    def array(self, ndim: int | None = None) -> np.ndarray:
        ndim = self.int(0, 4) if ndim is None else ndim
        shape = [self.pool[self.int(0, 2)] for _ in range(ndim)]
        start, step = self.int(0, len(VALUES)), self.int(1, 3)
        base = np.resize(np.roll(VALUES, start), [size * step for size in shape]).astype(np.float32)
        view = base[tuple(np.s_[::step] for _ in shape)]
        return view.transpose() if self.data.ConsumeBool() else view

    def t(self, ndim: int | None = None) -> Tensor:
        self.made.append(Tensor(self.array(ndim), requires_grad=True))
        return self.made[-1]

    def ids(self, ndim: int | None = None) -> np.ndarray:
        array = self.array(ndim)
        return np.resize(np.array([0, 1, self.int(), self.int()]), array.shape).astype(np.int64)

    def axes(self) -> object:
        return self.data.PickValueInList([None, 0, -1, 1, (0, 1), (0, 0), 5])


def lora(a: Args) -> tuple[object, ...]:
    return (a.t(2), a.t(2), 0.5) if a.data.ConsumeBool() else ()


CALLS = {
    **{name: lambda a, name=name: getattr(ops, name)(a.t()) for name in ("neg", "exp", "log", "relu", "gelu", "silu")},
    **{
        name: lambda a, name=name: getattr(ops, name)(a.t(), a.t())
        for name in ("add", "sub", "mul", "div", "pow", "matmul", "swiglu", "rms_norm")
    },
    "sum": lambda a: ops.sum(a.t(), a.axes(), a.data.ConsumeBool()),
    "mean": lambda a: ops.mean(a.t(), a.axes()),
    "softmax": lambda a: ops.softmax(a.t(), a.int(-3, 3)),
    "layer_norm": lambda a: ops.layer_norm(a.t(), a.t(1), a.t(1)),
    "reshape": lambda a: ops.reshape(a.t(), (a.int(), a.int())),
    "transpose": lambda a: ops.transpose(a.t(), a.int(-4, 4), a.int(-4, 4)),
    "slice": lambda a: ops.slice(a.t(), (np.s_[a.int() : a.int()], a.int())),
    "concat": lambda a: ops.concat([a.t(2), a.t(2)], a.int(-3, 3)),
    "linear": lambda a: ops.linear(a.t(), a.t(2), a.t(1) if a.data.ConsumeBool() else None, lora(a) or None),
    "embedding": lambda a: ops.embedding(a.t(2), a.ids()),
    "cross_entropy": lambda a: ops.cross_entropy(a.t(2), a.ids(1), ignore_index=a.int()),
    "dropout": lambda a: ops.dropout(a.t(), a.int(-1, 5) / 4),
    "rope": lambda a: ops.rope(a.t(4), a.array(2), a.array(2), a.data.ConsumeBool()),
    "attention": lambda a: ops.attention(a.t(4), a.t(4), a.t(4), None, a.data.ConsumeBool(), a.int()),
}


def one_input(raw: bytes) -> None:
    args = Args(data := atheris.FuzzedDataProvider(raw))
    try:
        out = CALLS[data.PickValueInList(sorted(CALLS))](args)
        out.backward(Tensor(np.ones(out.shape, np.float32)))
    except EntrenarError:
        return
    for leaf in args.made:
        assert leaf.grad is None or leaf.grad.shape == leaf.shape


if __name__ == "__main__":
    np.seterr(all="ignore")
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
