"""Optimizer steps against float64 references written from the papers' formulas, and exact state round trips."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.errors import CheckpointError, ConfigError, DTypeError, ShapeError
from entrenar.optim import SGD, Adam, AdamW, AdamW8bit, Optimizer, clip_grad_norm, clip_scale, grad_norm
from entrenar.tensor import Tensor, default_rng, manual_seed

pytestmark = pytest.mark.tier1

MAKERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=0.1),
    "momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.05),
    "nesterov": lambda params: SGD(params, lr=0.1, momentum=0.8, nesterov=True),
    "adam": lambda params: Adam(params, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "adamw": lambda params: AdamW(params, lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.2),
}


def reference(name: str, p: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
    """The parameter after one step a gradient, in float64."""
    p = p.astype(np.float64)
    m, v, buf = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    for t, g32 in enumerate(grads, 1):
        g = g32.astype(np.float64)
        if name == "sgd":
            p = p - 0.1 * g
        elif name == "momentum":
            buf = 0.9 * buf + g + 0.05 * p
            p = p - 0.1 * buf
        elif name == "nesterov":
            buf = 0.8 * buf + g
            p = p - 0.1 * (g + 0.8 * buf)
        else:
            decoupled = name == "adamw"
            lr, b1, b2, eps, decay = (0.01, 0.9, 0.99, 1e-6, 0.2) if decoupled else (0.01, 0.8, 0.95, 1e-8, 0.1)
            if decoupled:
                p = p * (1 - lr * decay)
            else:
                g = g + decay * p
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def bits(state: dict) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in state["arrays"].items()}


def give(tensor: Tensor, grad: np.ndarray | None) -> None:
    tensor.grad = None if grad is None else Tensor(grad)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 33), min_size=0, max_size=2), seed=st.integers(0, 2**32 - 1))
def test_steps_equal_the_formula(name: str, shape: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    start = rng.standard_normal(shape).astype(np.float32)
    grads = [(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3)).astype(np.float32) for _ in range(5)]
    tensor = Tensor(start.copy(), requires_grad=True)
    optimizer = MAKERS[name]([tensor])
    for grad in grads:
        give(tensor, grad)
        optimizer.step()
    want = reference(name, start, grads)
    moved = np.abs(want - start).max()  # far out and back, a parameter keeps the rounding of where it was
    np.testing.assert_allclose(tensor.data, want, rtol=2e-5, atol=2e-6 * max(1, moved))


@pytest.mark.parametrize("name", MAKERS)
def test_state_puts_the_run_back_bit_for_bit(name: str) -> None:
    rng = np.random.default_rng(3)
    grads = [[rng.standard_normal(shape).astype(np.float32) for shape in ((5, 3), (7,))] for _ in range(6)]

    def run(from_step: int, values: list[np.ndarray], state: dict | None) -> tuple[list[bytes], dict, list]:
        tensors = [Tensor(value.copy(), requires_grad=True) for value in values]
        optimizer = MAKERS[name](zip(("a", "b"), tensors, strict=True))
        if state is not None:
            optimizer.load_state_dict(state)
        middle: tuple[dict, list] = ({}, [])
        for i, step in enumerate(grads[from_step:], from_step):
            if i == 3:
                middle = optimizer.state_dict(), [t.data.copy() for t in tensors]
            for tensor, grad in zip(tensors, step, strict=True):
                give(tensor, grad)
            optimizer.step()
        return [t.data.tobytes() for t in tensors], *middle

    first = [rng.standard_normal((5, 3)).astype(np.float32), rng.standard_normal(7).astype(np.float32)]
    whole, state, values = run(0, first, None)
    resumed, _, _ = run(3, values, state)
    assert resumed == whole


def test_parameters_are_tensors() -> None:
    with pytest.raises(DTypeError, match="parameter 0 is of type ndarray, not a Tensor"):
        SGD([np.zeros(3, np.float32)], lr=0.1)


def test_a_parameter_without_gradient_keeps_its_own_clock() -> None:
    late, always = Tensor(np.ones(3), requires_grad=True), Tensor(np.ones(3), requires_grad=True)
    optimizer = AdamW([("late", late), ("always", always)], lr=0.1, weight_decay=0.0)
    for step in range(4):
        give(always, np.ones(3, np.float32))
        give(late, np.ones(3, np.float32) if step == 3 else None)
        optimizer.step()
    assert optimizer.steps == {"late": 1, "always": 4}
    # Adam's first step moves by lr whatever the size of the gradient: only a clock of its own gives that.
    np.testing.assert_allclose(late.data, 0.9, rtol=1e-6)


def test_step_takes_another_rate_and_leaves_the_default() -> None:
    tensor = Tensor(np.zeros(2), requires_grad=True)
    optimizer = SGD([tensor], lr=1.0)
    give(tensor, np.ones(2, np.float32))
    optimizer.step(lr=0.25)
    np.testing.assert_array_equal(tensor.data, -0.25)
    optimizer.step()
    np.testing.assert_array_equal(tensor.data, -1.25)
    optimizer.zero_grad()
    assert tensor.grad is None


def test_state_dict_is_a_copy_unless_told_otherwise() -> None:
    tensor = Tensor(np.zeros(2), requires_grad=True)
    optimizer = Adam([tensor])
    give(tensor, np.ones(2, np.float32))
    optimizer.step()
    kept, live = optimizer.state_dict(), optimizer.state_dict(copy=False)
    optimizer.step()
    assert not np.array_equal(kept["arrays"]["0:m"], live["arrays"]["0:m"])
    assert live["arrays"]["0:m"] is optimizer.state["0"]["m"]


def test_a_step_makes_the_old_graph_unusable() -> None:
    tensor = Tensor(np.zeros(2), requires_grad=True)
    before = tensor.version
    give(tensor, np.ones(2, np.float32))
    SGD([tensor]).step()
    assert tensor.version > before


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda p: SGD(p, lr=-0.1), "lr"),
        (lambda p: SGD(p, lr=math.inf), "lr"),
        (lambda p: SGD(p, lr="1"), "lr"),
        (lambda p: SGD(p, momentum=1.0), "momentum"),
        (lambda p: SGD(p, nesterov=True), "nesterov"),
        (lambda p: SGD(p, weight_decay=-1), "weight_decay"),
        (lambda p: Adam(p, betas=(1.0, 0.9)), "betas[0]"),
        (lambda p: Adam(p, betas=(0.9, -0.1)), "betas[1]"),
        (lambda p: Adam(p, eps=-1e-8), "eps"),
        (lambda p: AdamW(p, eps=math.nan), "eps"),
        (lambda p: AdamW(p, weight_decay=math.inf), "weight_decay"),
        (lambda p: AdamW([]), "params"),
        (lambda p: AdamW(p + p), "params"),
        (lambda p: AdamW([("a", p[0]), ("a", Tensor(np.ones(1)))]), "params"),
        (lambda p: AdamW([Tensor(np.ones((4, 4), np.float32).T[1:])]), "params"),
    ],
)
def test_absurd_hyper_parameters(make: Callable[[list[Tensor]], Optimizer], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make([Tensor(np.ones(2), requires_grad=True)])
    assert caught.value.field == field


def test_only_f32_parameters() -> None:
    with pytest.raises(DTypeError, match="float16"):
        AdamW([("w", Tensor(np.ones(2, np.float16)))])


def test_a_gradient_of_another_shape_is_refused() -> None:
    tensor = Tensor(np.ones(2), requires_grad=True)
    give(tensor, np.ones(3, np.float32))
    with pytest.raises(ShapeError, match=r"\(3,\).*\(2,\)"):
        SGD([tensor]).step()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s.update(kind="SGD"),
        lambda s: s["steps"].update(other=1),
        lambda s: s["arrays"].update({"w:q": np.zeros(2, np.float32)}),
        lambda s: s["arrays"].update({"w:m": np.zeros(3, np.float32)}),
        lambda s: s["arrays"].update({"w:m": np.zeros(2, np.float64)}),
        lambda s: s["arrays"].pop("w:m"),
        lambda s: s["steps"].update(w=-1),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(spoil: Callable[[dict], None]) -> None:
    tensor = Tensor(np.zeros(2), requires_grad=True)
    optimizer = Adam([("w", tensor)])
    give(tensor, np.ones(2, np.float32))
    optimizer.step()
    state, before = optimizer.state_dict(), optimizer.state_dict()
    spoil(state)
    with pytest.raises(CheckpointError):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["steps"] == before["steps"]
    assert bits(after) == bits(before)


@pytest.mark.parametrize("name", MAKERS)
def test_a_scaled_step_is_the_step_of_clipped_gradients(name: str) -> None:
    def run(fused: bool) -> list[bytes]:
        rng = np.random.default_rng(1)
        tensors = [Tensor(rng.standard_normal(shape), requires_grad=True) for shape in ((33, 5), (7,), (1, 70))]
        optimizer = MAKERS[name](tensors)
        for _ in range(3):
            for tensor in tensors:
                give(tensor, rng.standard_normal(tensor.shape).astype(np.float32))
            if fused:
                optimizer.step(scale=clip_scale(grad_norm(tensors), 0.7))
            else:
                clip_grad_norm(tensors, 0.7)
                optimizer.step()
        return [tensor.data.tobytes() for tensor in tensors]

    assert run(True) == run(False)


# ---- moments of a byte ----


def test_moments_of_a_byte_take_two_bytes_a_parameter_and_small_ones_stay() -> None:
    rng = np.random.default_rng(2)
    starts = {"large": rng.standard_normal((130, 64)), "small": rng.standard_normal(4095)}

    def run(kind: type[AdamW]) -> tuple[dict[str, Tensor], AdamW]:
        tensors = {name: Tensor(start, requires_grad=True) for name, start in starts.items()}
        optimizer = kind(tensors.items(), lr=0.01)
        for step in range(3):
            for tensor in tensors.values():
                give(tensor, np.random.default_rng(step).standard_normal(tensor.shape).astype(np.float32))
            optimizer.step()
        return tensors, optimizer

    (exact, _), (ours, optimizer) = run(AdamW), run(AdamW8bit)
    assert ours["small"].data.tobytes() == exact["small"].data.tobytes()
    assert 0 < np.abs(ours["large"].data - exact["large"].data).max() < 0.02
    assert {slot: (array.dtype, array.shape) for slot, array in optimizer.state["large"].items()} == {
        "m": (np.uint8, (130, 64)), "m_absmax": (np.float32, (33,)),
        "v": (np.uint8, (130, 64)), "v_absmax": (np.float32, (33,)),
    }  # fmt: skip
    assert optimizer.state["small"].keys() == {"m", "v"}
    assert sum(array.nbytes for array in optimizer.state["large"].values()) <= 2.04 * ours["large"].size


def test_moments_of_a_byte_come_back_bit_for_bit() -> None:
    rng = np.random.default_rng(3)
    grads = [rng.standard_normal(5000).astype(np.float32) for _ in range(6)]

    def run(tensor: Tensor, optimizer: Optimizer, steps: list[np.ndarray]) -> None:
        for grad in steps:
            give(tensor, grad)
            optimizer.step()

    whole = Tensor(np.ones(5000), requires_grad=True)
    optimizer = AdamW8bit([("w", whole)])
    run(whole, optimizer, grads[:3])
    state, resumed = optimizer.state_dict(), Tensor(whole.data.copy(), requires_grad=True)
    run(whole, optimizer, grads[3:])
    other = AdamW8bit([("w", resumed)])
    other.load_state_dict(state)
    run(resumed, other, grads[3:])
    assert resumed.data.tobytes() == whole.data.tobytes()
    assert bits(other.state_dict()) == bits(optimizer.state_dict())
    spoiled = {**state, "arrays": {**state["arrays"], "w:m": np.zeros(5000, np.float32)}}
    with pytest.raises(CheckpointError, match=r"w:m is float32 \(5000,\), not uint8"):
        other.load_state_dict(spoiled)
    with pytest.raises(CheckpointError, match="incomplete"):
        other.load_state_dict({**state, "arrays": {k: a for k, a in state["arrays"].items() if k != "w:v_absmax"}})


def test_a_parameter_that_is_seldom_seen_does_not_leap() -> None:
    """Without gradients v stays beside a large neighbour: were it rounded to 0, m / eps would throw the weight away."""
    tensor = Tensor(np.zeros(4096), requires_grad=True)
    optimizer = AdamW8bit([tensor], lr=0.01, weight_decay=0.0)
    for step in range(50):
        grad = np.zeros(4096, np.float32)
        grad[::256] = 1.0
        if step == 0:
            grad[1::256] = 3e-5  # v is 1e-9 of its block's largest, m 3e-5
        give(tensor, grad)
        optimizer.step()
    assert np.abs(tensor.data[1::256]).max() < 0.1


@pytest.mark.parametrize("kind", ["AdamW8bit", "bf16 weights", "both"])
def test_what_takes_less_memory_learns_as_well(kind: str) -> None:
    rng = np.random.default_rng(4)
    inputs = rng.standard_normal((512, 64)) * 10.0 ** rng.uniform(-1, 0.5, 64)  # features of unlike size
    targets = np.tanh(inputs @ rng.standard_normal((64, 80)) / 16) + 0.1 * rng.standard_normal((512, 80))

    def final_loss(kind: type[AdamW], dtype: type) -> float:
        weight = Tensor(np.zeros((64, 80), dtype), requires_grad=True)
        optimizer = kind([weight], lr=3e-3)
        for step in range(300):
            x, y = (a[step % 8 :: 8] for a in (inputs, targets))
            w = weight.data.astype(np.float64)
            give(weight, (x.T @ (x @ w - y) / len(x)).astype(np.float32))
            optimizer.step(3e-3 * (1 - step / 300))
        return float(((inputs @ weight.data.astype(np.float64) - targets) ** 2).mean())

    ours = final_loss(
        AdamW if kind == "bf16 weights" else AdamW8bit, np.float32 if kind == "AdamW8bit" else ml_dtypes.bfloat16
    )
    assert ours == pytest.approx(final_loss(AdamW, np.float32), rel=0.01)


# ---- weights in bf16 ----


def test_steps_too_small_for_bf16_add_up_and_resume_bit_for_bit() -> None:
    def run(tensor: Tensor, optimizer: Optimizer, steps: int) -> None:
        for _ in range(steps):
            give(tensor, np.ones(1000, np.float32))
            optimizer.step()

    manual_seed(5)
    whole = Tensor(np.ones(1000, ml_dtypes.bfloat16), requires_grad=True)
    optimizer = SGD([("w", whole)], lr=2.0**-14, momentum=0.0)
    run(whole, optimizer, 1000)
    middle, random = whole.data.copy(), default_rng.state_dict()
    run(whole, optimizer, 1000)
    # Each step is 1/32 of half the distance to the next bf16 number: rounded to nearest, nothing would move.
    assert whole.data.astype(np.float64).mean() == pytest.approx(1 - 2000 * 2.0**-14, abs=2e-3)
    default_rng.load_state_dict(random)
    resumed = Tensor(middle, requires_grad=True)
    run(resumed, SGD([("w", resumed)], lr=2.0**-14), 1000)
    assert resumed.data.tobytes() == whole.data.tobytes()


def test_factors_multiply_the_rate_of_their_parameters_alone() -> None:
    """LoRA+'s two rates: the same as two optimizers, and in the state nothing changes."""
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(7).astype(np.float32) for name in "abc"}
    tensors = {name: Tensor(v.copy(), requires_grad=True) for name, v in values.items()}
    alone = {name: Tensor(v.copy(), requires_grad=True) for name, v in values.items()}
    optimizer = AdamW(tensors.items(), lr=1e-2)
    optimizer.set_factors({"b": 16.0, "c": 0.5})
    each = {name: AdamW([(name, tensor)], lr=1e-2) for name, tensor in alone.items()}
    for _ in range(3):
        for name in "abc":
            grad = Tensor(rng.standard_normal(7).astype(np.float32))
            tensors[name].grad = alone[name].grad = grad
        optimizer.step(2e-2)
        for name, factor in (("a", 1.0), ("b", 16.0), ("c", 0.5)):
            each[name].step(2e-2 * factor)
    for name in "abc":
        assert np.array_equal(tensors[name].data, alone[name].data)
    with pytest.raises(ConfigError, match="no parameter 'd'"):
        optimizer.set_factors({"d": 1.0})
    with pytest.raises(ConfigError, match="factors"):
        optimizer.set_factors({"a": float("nan")})
