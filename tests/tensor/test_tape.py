"""The tape: which gradients reach which leaf, how often, and what is refused."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar import ops
from entrenar.errors import DTypeError, GraphError, ShapeError
from entrenar.tensor import OPS, Tensor, no_grad, op

tier1 = pytest.mark.tier1
tier2 = pytest.mark.tier2


def leaf(*values: float) -> Tensor:
    return Tensor(np.array(values, np.float32), requires_grad=True)


def grad(x: Tensor) -> list[float]:
    return x.grad.numpy().tolist()


# ---- shared nodes


@tier1
def test_a_tensor_used_twice_in_one_operation() -> None:
    x = leaf(3, -2)
    (x * x).sum().backward()
    assert grad(x) == [6, -4]
    y = leaf(3, -2)
    (y + y).sum().backward()
    assert grad(y) == [2, 2]
    z = leaf(3, -2)
    (z - z).sum().backward()
    assert grad(z) == [0, 0]


@tier1
def test_diamond_and_residual() -> None:
    x = leaf(2, 5)
    h = x * 3
    y = h * h + h  # d/dx = (2 h + 1) 3
    (y + x).sum().backward()
    assert grad(x) == [(2 * 6 + 1) * 3 + 1, (2 * 15 + 1) * 3 + 1]


@tier1
def test_gradients_of_operands_that_share_one_array_stay_apart() -> None:
    """add hands its g to both operands; what is added to one must not show in the other."""
    a, b = leaf(1, 1), leaf(2, 2)
    c = a + b
    d = c + a  # a gets g twice, b once
    (d + d).sum().backward()
    assert grad(a) == [4, 4]
    assert grad(b) == [2, 2]
    assert not np.shares_memory(a.grad.data, b.grad.data)


@tier1
def test_interior_nodes_that_share_one_gradient_stay_apart() -> None:
    x, y = leaf(1, 2), leaf(3, 4)
    u, v = x * 2, y * 3
    w = u + v
    total = w + u * 5  # u: 1 + 5, v: 1
    total.sum().backward()
    assert grad(x) == [12, 12]
    assert grad(y) == [3, 3]


@tier1
def test_the_gradient_given_is_neither_kept_nor_written() -> None:
    x, g = leaf(1, 2), np.array([1, 10], np.float32)
    for _ in range(2):
        x.reshape(2).backward(g)
    assert g.tolist() == [1, 10]
    assert grad(x) == [2, 20]
    x.backward(Tensor(g))  # a leaf is its own root
    assert grad(x) == [3, 30]
    assert g.tolist() == [1, 10]


@tier1
def test_gradients_accumulate_over_graphs() -> None:
    x = leaf(1, 2)
    for scale in (1.0, 10.0, 100.0):
        (x * scale).sum().backward()
    assert grad(x) == [111, 111]


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Straight-line programs: each line combines two earlier values."""
    n = draw(st.integers(1, 25))
    names = st.sampled_from(["add", "sub", "mul"])
    return [draw(st.tuples(names, st.integers(0, i + 1), st.integers(0, i + 1))) for i in range(n)]


@tier2
@settings(max_examples=80, deadline=None)
@given(programs())
def test_any_graph_of_shared_nodes_equals_forward_mode(program: list[tuple[str, int, int]]) -> None:
    """Dual numbers carry the derivatives forward, with no tape at all."""
    start = np.array([0.5, -0.25])
    xs = [Tensor(np.array([v]), requires_grad=True) for v in start]
    values = list(xs)
    duals = [(v, np.eye(2)[i]) for i, v in enumerate(start)]
    for name, i, j in program:
        values.append(OPS[name](values[i], values[j]) * 0.5)
        (a, da), (b, db) = duals[i], duals[j]
        dual = {"add": (a + b, da + db), "sub": (a - b, da - db), "mul": (a * b, a * db + b * da)}[name]
        duals.append((0.5 * dual[0], 0.5 * dual[1]))
    values[-1].sum().backward()
    for i, x in enumerate(xs):
        actual = 0.0 if x.grad is None else x.grad.item()
        assert actual == pytest.approx(duals[-1][1][i], rel=1e-5, abs=1e-6)


# ---- depth


@tier2
def test_a_chain_of_50000_operations_runs_back_and_is_freed() -> None:
    x = leaf(1, 2)
    y = x
    for _ in range(50_000):
        y = y + 1.0
    y.sum().backward()
    assert grad(x) == [1, 1]


@tier2
def test_a_chain_of_50000_operations_is_freed_without_backward() -> None:
    y = leaf(1)
    for _ in range(50_000):
        y = ops.neg(y)
    node = weakref.ref(y)
    del y
    assert node() is None


@tier1
def test_a_deep_ladder_of_diamonds_is_linear_work() -> None:
    x = leaf(1)
    y = x
    for _ in range(1000):  # 2^1000 paths
        y = (y + y) * 0.5
    y.sum().backward()
    assert grad(x) == [1]


# ---- memory


@tier1
def test_the_tape_needs_no_garbage_collector() -> None:
    gc.disable()
    try:
        x = leaf(1, 2)
        h = ops.exp(x * 2)
        tensor, array = weakref.ref(h), weakref.ref(h.data)
        loss = (h * h).sum()
        del h
        assert tensor() is None
        assert array() is not None  # the way back reads it
        loss.backward()
        assert array() is None  # though the loss is still here
    finally:
        gc.enable()


@tier1
def test_backward_frees_what_it_has_passed() -> None:
    x = Tensor(np.zeros((1000, 100)), requires_grad=True)  # 400 kB
    y = x
    for _ in range(20):
        y = ops.exp(y)  # keeps its result, 8 MB in all
    loss = y.sum()
    del y
    gc.collect()
    tracemalloc.start()
    try:
        loss.backward()
        assert tracemalloc.get_traced_memory()[1] < 4e6  # of gradients only few are alive at once
    finally:
        tracemalloc.stop()


# ---- what is refused


@tier1
def test_a_second_backward_is_refused_and_changes_nothing() -> None:
    x = leaf(1, 2)
    loss = (x * x).sum()
    loss.backward()
    with pytest.raises(GraphError, match="freed at 'sum'"):
        loss.backward()
    assert grad(x) == [2, 4]


@tier1
def test_backward_through_a_part_that_was_freed_is_refused_before_it_changes_anything() -> None:
    x, w = leaf(1, 2), leaf(5, 5)
    trunk = x * x
    first, second = trunk.sum(), (trunk * w).sum()
    first.backward()
    with pytest.raises(GraphError, match="add the losses"):
        second.backward()
    assert grad(x) == [2, 4]
    assert w.grad is None


@tier1
def test_a_leaf_written_in_place_is_refused_before_anything_changes() -> None:
    x, w = leaf(1, 2), leaf(5, 5)
    loss = (x * w * w).sum()
    w.data *= 2
    w.version += 1
    with pytest.raises(GraphError, match="written in place"):
        loss.backward()
    assert x.grad is None
    assert w.grad is None
    (x * w).sum().backward()
    assert grad(x) == [10, 10]


@tier1
def test_data_that_is_replaced_does_not_change_a_gradient() -> None:
    x, w = leaf(1, 2), leaf(5, 5)
    loss = (x * w).sum()
    w.data = np.zeros(2, np.float32)
    loss.backward()
    assert grad(x) == [5, 5]


@tier1
def test_results_on_the_tape_are_read_only_and_others_are_not() -> None:
    x = leaf(1, 2)
    y = ops.exp(x)
    with pytest.raises(ValueError, match="read-only"):
        y.numpy()[0] = 0
    x.numpy()[0] = 7
    ops.exp(Tensor([1.0])).numpy()[0] = 0
    view = x.reshape(2, 1)
    assert not view.numpy().flags.writeable
    assert x.numpy().flags.writeable


@tier1
def test_what_needs_no_gradient_has_none() -> None:
    with pytest.raises(GraphError, match="requires a gradient"):
        Tensor([1.0]).backward()
    x, frozen = leaf(1, 2), Tensor([3.0, 4.0])
    (x * frozen).sum().backward()
    assert grad(x) == [3, 4]
    assert frozen.grad is None
    assert not (frozen * 2).requires_grad


@tier1
def test_the_gradient_given_must_fit() -> None:
    y = leaf(1, 2) * 2
    with pytest.raises(ShapeError, match=r"\(2,\) needs a grad"):
        y.backward()
    with pytest.raises(ShapeError, match=r"grad has shape \(3,\), the tensor \(2,\)"):
        y.backward(np.ones(3))
    with pytest.raises(DTypeError, match="float16"):
        y.backward(np.ones(2, np.float16))


@tier1
def test_detach_stops_the_gradient() -> None:
    x = leaf(3)
    (x * (x * 2).detach()).sum().backward()
    assert grad(x) == [6]


# ---- no_grad


@tier1
def test_no_grad_is_a_block_and_a_decorator() -> None:
    x = leaf(1)
    with no_grad():
        assert not (x * 2).requires_grad
        with no_grad():
            pass
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad

    @no_grad()
    def double(t: Tensor) -> Tensor:
        return t * 2

    assert not double(x).requires_grad
    assert not double(x).requires_grad
    assert double.__name__ == "double"


@tier1
def test_no_grad_ends_with_an_exception() -> None:
    x = leaf(1)
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert (x * 2).requires_grad


@tier1
def test_no_grad_holds_for_its_thread_only() -> None:
    x, seen = leaf(1), []
    thread = threading.Thread(target=lambda: seen.append((x * 2).requires_grad))
    with no_grad():
        thread.start()
        thread.join()
    assert seen == [True]


@tier1
def test_threads_build_and_run_their_own_graphs() -> None:
    def work(out: list[float]) -> None:
        x = leaf(2)
        for _ in range(50):
            (x * x).sum().backward()
        out.append(x.grad.item())

    results: list[float] = []
    threads = [threading.Thread(target=work, args=(results,)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [200.0] * 4


# ---- new operations


@tier1
def test_an_operation_of_ones_own() -> None:
    try:

        @op(method="cubed")
        def cube(x: Tensor, scale: float = 1.0):  # type: ignore[no-untyped-def]
            """x³."""
            return scale * x.data**3, lambda g: (3 * scale * x.data**2 * g,)

        x = leaf(2)
        x.cubed(scale=2.0).backward()  # type: ignore[attr-defined]
        assert grad(x) == [24]
        assert cube(3.0).item() == 27
        assert cube.__doc__ == "x³."
        assert OPS["cube"] is cube
        with pytest.raises(TypeError):
            cube(x, factor=2.0)
    finally:
        OPS.pop("cube", None)
        if hasattr(Tensor, "cubed"):
            del Tensor.cubed
