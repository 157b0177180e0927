"""Fuzz the kernels: any operation on arrays of any shape, layout, type and value, forward and back, through the native
boundary and through the tape, gives a result or one of the declared errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import _common
import atheris
import ml_dtypes
import numpy as np

with atheris.instrument_imports(include=["entrenar"]):
    from entrenar import Tensor, _native, ops
    from entrenar.backend import available_isas, cpu, set_num_threads
    from entrenar.errors import EntrenarError

POOL = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32)
POOL[:: 1 << 9] = np.resize(np.array([0, -0.0, 1e-40, 3e38, -3e38, np.inf, -np.inf, np.nan], np.float32), 1 << 7)
UNARY = ["neg", "exp", "log", "relu", "gelu", "gelu_tanh", "silu"]
BINARY = ["add", "sub", "mul", "div", "pow"]
SIZES = {"b": (1, 0, 2, 3), "g": (1, 2, 3, 0), "h": (1, 2, 5, 0), "k": (0, 1, 3, 16, 65, 257, 300),
         "m": (0, 1, 2, 3, 4, 5, 8, 15, 17, 33, 66), "s": (0, 1, 3, 60, 600)}  # fmt: skip
TYPES = [np.float32, np.float32, np.float16, ml_dtypes.bfloat16, np.float64, ">f4", np.uint8]
LAYOUTS: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda x: x,
    lambda x: x.T.copy().T,
    lambda x: x[tuple(np.s_[::-1] for _ in x.shape)],
    lambda x: np.repeat(x, 2, -1)[..., ::2] if x.ndim else x,
    lambda x: np.broadcast_to(x[:1], x.shape) if x.ndim else x,
    lambda x: np.frombuffer(b"x" + x.tobytes(), x.dtype, x.size, 1).reshape(x.shape),
    lambda x: x.swapaxes(0, -1) if x.ndim else x,
]


class Draw(dict[str, int]):
    """Arguments from fuzzed bytes. A letter is a size, the same wherever it comes up in a call: shapes mostly fit."""

    def __init__(self, raw: bytes) -> None:
        self.data = atheris.FuzzedDataProvider(raw)

    def int(self, low: int, high: int) -> int:
        return self.data.ConsumeIntInRange(low, high)

    def pick(self, values: Any) -> Any:
        return values[self.int(0, len(values) - 1)]

    def rarely(self) -> bool:
        return self.int(0, 15) == 15

    def __missing__(self, letter: str) -> int:
        size = self.pick(SIZES.get(letter, SIZES["m"]))
        if letter == "s":
            size += self["t"]
        elif letter == "h":
            size *= self["g"]
        elif letter == "w":
            size = 2 * self["k"]
        elif letter == "q":
            size = (self["h"] + 2 * self["g"]) * self["d"]
        elif letter == "r":
            size = min(size, self["d"] // 2)
        self[letter] = size
        return size

    def shape(self, letters: str) -> tuple[int, ...]:
        if self.rarely():
            ndim = self.int(0, 9)
            return tuple(self.int(0, 5 if ndim < 5 else 2) for _ in range(ndim))
        return tuple(self[letter] for letter in letters)

    def __call__(self, letters: str, types: Any = (np.float32,)) -> np.ndarray:
        shape, start = self.shape(letters), self.int(0, 999)
        x = np.resize(POOL[start : start + max(1, min(math.prod(shape), 1 << 15))], shape)
        return self.pick(LAYOUTS)(x.astype(self.pick(TYPES if self.rarely() else types), order="C"))

    def half(self, letters: str) -> np.ndarray:
        return self(letters, TYPES[1:4])

    def own(self, letters: str) -> np.ndarray:  # to be written to
        return self(letters) if self.rarely() else np.resize(POOL, self.shape(letters))

    def codes(self, letters: str) -> np.ndarray:  # to be written to
        return self.own(letters).astype(np.uint8 if not self.rarely() else np.int8)

    def ids(self, letters: str, size: int) -> np.ndarray:
        some = [self.int(-1, size) if self.rarely() else self.int(0, max(size - 1, 0)) for _ in range(5)]
        ids = np.resize(np.array(some, np.int32 if self.rarely() else np.int64), self.shape(letters))
        return ids[..., ::-1] if self.rarely() and ids.ndim else ids

    def bool(self) -> bool:
        return self.data.ConsumeBool()

    def tensor(self, letters: str) -> Tensor:
        return Tensor(self(letters), requires_grad=not self.rarely())

    def flowing(self, letters: str) -> Tensor:
        return ops.cast(self.tensor(letters), self.pick(["f32", "bf16"]))

    def parts(self, letter: str) -> list[ops.Part]:
        whole = self.half(f"n{letter}")
        weights = [whole] if self.bool() or not whole.ndim else [whole[:2], whole[2:]]
        a, b, bias = self.tensor(f"x{letter}"), self("nx"), self("n")
        return [
            ops.Part(
                Tensor(w), Tensor(bias[: w.shape[0]]) if self.bool() and bias.ndim and w.ndim else None,
                ops.Lora(a, Tensor(b[: w.shape[0]], True), 0.5) if self.bool() and b.ndim and w.ndim else None,
            )
            for w in weights
        ]  # fmt: skip

    def residual(self, letters: str) -> Tensor | None:
        return self.flowing(f"{letters}n") if self.bool() else None

    def raw(self, block: int) -> np.ndarray:
        return np.frombuffer(self.data.ConsumeBytes(self.int(0, 3) * block + self.int(0, 1) * self.int(0, 9)), np.uint8)

    def mask(self) -> tuple[bool, int, np.ndarray | None]:
        starts = self.ids("bt", self.pick((1, 2, 9))) if self.bool() else None
        return self.bool(), self.int(0, 1) * self.int(-1, 40), starts

    def axes(self) -> tuple[int, ...] | None:
        return None if self.bool() else tuple(self.int(-4, 3) for _ in range(self.int(0, 3)))


def backward_of_attention(d: Draw) -> Any:
    q, k, v, o = d("btgd"), d("bsgd"), d("bsgd"), d("btgd")
    return cpu.attention_backward(d("btgd"), q, k, v, o, d("bgt"), d.pick([0.5, 1e-30, 1e30]), *d.mask())


CALLS: list[Callable[[Draw], Any]] = [
    lambda d: cpu.matmul(d("mk"), d.half("kn")),
    lambda d: cpu.matmul(d("bkm"), d.half("nk"), True, True),
    lambda d: cpu.matmul(d("bmk"), d.half("bkn"), out=d.own("bmn"), accumulate=d.bool()),
    lambda d: cpu.matmul(d("bxmk"), d.half("xnk"), trans_b=True),
    lambda d: cpu.copy(d("bmn")),
    lambda d: cpu.unary(d.pick(UNARY), d("bmn")),
    lambda d: cpu.unary_backward(d.pick(UNARY), d("mn"), d("mn")),
    lambda d: cpu.binary(d.pick(BINARY), d("bmn"), d(d.pick(["bmn", "n", "mn", "", "bm"]))),
    lambda d: cpu.add_(d.own("mn"), d("mn")),
    lambda d: cpu.scale_(d.own("mn"), 0.5),
    lambda d: cpu.sum(d("bmnx"), d.axes(), d.bool()),
    lambda d: cpu.all_finite(d("mk")),
    lambda d: cpu.convert(d.half("mn"), d.pick(TYPES[1:4])),
    lambda d: cpu.dequantize("q4_0", d.raw(18), d.pick(TYPES[1:4])),
    lambda d: cpu.dequantize("q8_0", d.raw(34), d.pick(TYPES[1:4])),
    lambda d: cpu.dequantize("q4_k", d.raw(144), d.pick(TYPES[1:4])),
    lambda d: cpu.dequantize("q6_k", d.raw(210), d.pick(TYPES[1:4])),
    lambda d: cpu.rms_norm_backward(d("mk"), d("mk"), d("k"), d("m"), d.bool()),
    lambda d: cpu.layer_norm_backward(d("mk"), d("mk"), d("k"), d("m"), d("m")),
    lambda d: cpu.rope(d("btgd"), d(d.pick(["tr", "btr"])), d("tr"), d.bool(), d.bool()),
    backward_of_attention,
    lambda d: cpu.embedding(d.half("vk"), d.ids("bt", d["v"])),
    lambda d: cpu.embedding_backward(d("btk"), d.ids("bt", d["v"]), d["v"]),
    lambda d: cpu.embedding_backward(d("btk"), d.ids("bt", d["v"]), d["v"], d.own("vk")),
    lambda d: cpu.cross_entropy_backward(d("m"), d("mv"), d.ids("m", d["v"]), d("m"), d.int(-2, 3)),
    lambda d: cpu.adam_step(
        [d.own("mn"), d.own("k")], [d("mn"), d("k")], [d.own("mn"), d.own("k")], [d.own("mn"), d.own("k")], [2, 3],
        0.1, 0.9, 0.9, 1e-8, 0.1, d.bool(), 0.5,
    ),
    lambda d: cpu.adam_step(
        [d.own("mn")], [d("mn")], [d.codes("mn")], [d.codes("mn")], [2], 0.1, 0.9, 0.9, 1e-8, 0.1, d.bool(), 0.5,
        [d.own("t")], [d.own("t")],
    ),
    lambda d: cpu.sgd_step([d.own("mn")], [d("mn")], [d.own("mn")] if d.bool() else None, 0.1, 0.5, 0.1, d.bool()),
    lambda d: cpu.sgd_step(
        [d.own("mn").astype(d.pick(TYPES[1:4]))], [d("mn")], None, 0.1, 0.0, 0.1, False, 1.0, [(d.int(0, 9), 2**64 - 1)]
    ),
    lambda d: cpu.square_sums([d("mn"), d("k")]),
    lambda d: getattr(ops, d.pick(["neg", "exp", "log", "relu", "gelu", "silu"]))(d.tensor("bmn")),
    lambda d: getattr(ops, d.pick(BINARY))(d.tensor("bmn"), d.tensor(d.pick(["bmn", "n", "mn", ""]))),
    lambda d: getattr(ops, d.pick(["sum", "mean"]))(d.tensor("bmn"), d.axes(), d.bool()),
    lambda d: ops.softmax(d.tensor("bmn"), d.int(-4, 3)),
    lambda d: ops.swiglu(d.tensor("mk"), d.tensor("mk")),
    lambda d: ops.reshape(d.tensor("bmn"), d.int(-2, 9), d.int(-2, 9)),
    lambda d: ops.transpose(d.tensor("bmn"), *(d.axes() or ())),
    lambda d: d.tensor("bmn")[d.int(-3, 3) : d.int(-3, 3) : d.int(-2, 2), d.int(-3, 3)],
    lambda d: ops.concat([d.tensor("bm"), d.tensor("xm")], d.int(-2, 1)),
    lambda d: ops.matmul(d.tensor("bmk"), d.tensor(d.pick(["kn", "bkn", "k"]))),
    lambda d: ops.linear(d.tensor("bmk"), Tensor(d.half("nk")), d.tensor("n"), (d.tensor("xk"), d.tensor("nx"), 0.5)),
    lambda d: ops.rms_norm(d.tensor("bmk"), d.tensor("k")),
    lambda d: ops.layer_norm(d.tensor("bmk"), d.tensor("k"), d.tensor("k")),
    lambda d: ops.rope(d.tensor("btgd"), d("tr"), d("tr"), d.bool()),
    lambda d: ops.attention(d.tensor("btgd"), d.tensor("bsgd"), d.tensor("bsgd"), None, *d.mask()),
    lambda d: ops.attention(d.tensor("bthd"), d.tensor("bsgd"), d.tensor("bsgd"), None, *d.mask()),
    lambda d: ops.embedding(d.tensor("vk"), d.ids("bt", d["v"])),
    lambda d: ops.cross_entropy(d.tensor("mv"), d.ids("m", d["v"]), d.int(-2, 3)),
    lambda d: ops.dropout(d.tensor("mk"), d.int(0, 5) / 5),
    lambda d: ops.cast(d.flowing("bmn"), d.pick(["f32", "bf16", "f64"])),
    lambda d: ops.projection(d.flowing("bmk"), d.parts("k"), None, False, d.residual("bm"), d.int(0, 5) / 5),
    lambda d: ops.projection(d.flowing("bmk"), d.parts("k"), (d.tensor("k"), 1e-6)),
    lambda d: ops.projection(d.flowing("bmw"), d.parts("k"), gated=True),
    lambda d: ops.rope_attention(d.flowing("btq"), d["h"], d["g"], d("tr"), d("tr"), 0.5, *d.mask()[1:]),
    lambda d: ops.linear_cross_entropy(d.flowing("mk"), d.parts("k")[0], d.ids("m", d["v"]), d.int(-2, 3)),
]


def one_input(raw: bytes) -> None:
    d = Draw(raw)
    _native._set_isa(d.pick(available_isas()))
    set_num_threads(d.int(1, 3))
    _native._fail_allocation(d.int(1, 6) if d.rarely() else 0)
    try:
        out = d.pick(CALLS)(d)
        if isinstance(out, Tensor) and out.requires_grad:
            out.backward(np.resize(POOL, out.shape))
    except (EntrenarError, MemoryError):
        pass


if __name__ == "__main__":
    np.seterr(all="ignore")
    _common.run(one_input, _common.noise)
