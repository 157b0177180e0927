"""What the fused operations of a decoder's layer promise beyond results and gradients: what they compute and what they
keep for the way back, and that neither memory layout, chunks nor `checkpoint` change a result."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import reference as ref

from entrenar import ops
from entrenar.backend import cpu
from entrenar.ops import loss
from entrenar.ops.parts import Weights
from entrenar.tensor import Tensor, checkpoint, manual_seed, no_grad

BF16 = np.dtype(ml_dtypes.bfloat16)
HEADS, KV, D, INNER, RANK = 4, 2, 8, 24, 3
WIDTH = HEADS * D
ANGLES = np.outer(np.arange(5), [1.0, 0.3, 0.1, 0.01])
COS, SIN = np.cos(ANGLES).astype(np.float32), np.sin(ANGLES).astype(np.float32)
BOTH = pytest.mark.parametrize("dtype", ["f32", "bf16"])


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def part(out: int, in_: int, weight: np.ndarray | None = None, trainable: bool = False, seed: int = 0) -> ops.Part:
    lora = ops.Lora(Tensor(normal(RANK, in_, seed=seed), True), Tensor(normal(out, RANK, seed=seed), True), 0.5)
    return ops.Part(Tensor(normal(out, in_, seed=seed) if weight is None else weight, trainable), None, lora)


class Layer:
    """A decoder's layer with an adapter everywhere; weights are frozen unless `trainable`."""

    def __init__(self, trainable: bool = False) -> None:
        sizes = [WIDTH, KV * D, KV * D]
        rows = np.split(normal(sum(sizes), WIDTH), np.cumsum(sizes)[:-1])
        self.qkv = [part(n, WIDTH, w, trainable, i) for i, (n, w) in enumerate(zip(sizes, rows, strict=True))]
        self.out = [part(WIDTH, WIDTH, trainable=trainable)]
        self.gate_up = [part(INNER, WIDTH, trainable=trainable, seed=i) for i in range(2)]
        self.down = [part(WIDTH, INNER, trainable=trainable)]
        self.norms = [Tensor(1 + 0.1 * normal(WIDTH, seed=i), trainable) for i in range(2)]

    def __call__(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        qkv = ops.projection(x, self.qkv, norm=(self.norms[0], 1e-6), dropout=dropout)
        o = ops.rope_attention(qkv, HEADS, KV, COS, SIN, D**-0.5)
        x = ops.projection(o, self.out, residual=x, dropout=dropout)
        both = ops.projection(x, self.gate_up, norm=(self.norms[1], 1e-6), dropout=dropout)
        return ops.projection(both, self.down, gated=True, residual=x, dropout=dropout)

    def leaves(self) -> list[Tensor]:
        parts = self.qkv + self.out + self.gate_up + self.down
        tensors = [t for p in parts for t in (p.weight, p.lora.a, p.lora.b)] + self.norms
        return [t for t in tensors if t.requires_grad]


# ---- what lies in memory


def blocks(*weights: Tensor) -> int:
    return len(Weights("test", [ops.Part(w) for w in weights], weights[0].shape[1]).blocks)


@pytest.mark.tier1
def test_consecutive_rows_of_one_array_are_one_weight() -> None:
    rows = normal(9, 4)
    views = [Tensor(rows[:4]), Tensor(rows[4:6]), Tensor(rows[6:])]
    assert blocks(*views) == 1
    merged = Weights("test", [ops.Part(w) for w in views], 4).blocks[0].weight
    assert merged.shape == rows.shape
    assert np.shares_memory(merged, rows)
    np.testing.assert_array_equal(merged, rows)
    half = rows.astype(BF16)
    assert blocks(Tensor(half[:4]), Tensor(half[4:])) == 1
    columns = np.asfortranarray(normal(4, 9)).T  # (9, 4), its rows apart from one another
    assert blocks(Tensor(columns[:4]), Tensor(columns[4:])) == 1


@pytest.mark.tier1
def test_what_is_not_consecutive_is_not_merged() -> None:
    rows, wide = normal(9, 4), normal(9, 8)
    for apart in (
        (rows[:4], rows[5:]), (rows[4:], rows[:4]), (rows[:4], rows[:4]), (rows[:4], rows[4:].copy()),
        (rows[:4], wide[4:, :4]), (rows[:4], rows[4:].astype(BF16)), (rows[3::-1], rows[4:]),
    ):
        assert blocks(*map(Tensor, apart)) == 2
    assert blocks(Tensor(rows[:4], requires_grad=True), Tensor(rows[4:])) == 2


@pytest.mark.tier1
@BOTH
def test_merged_weights_give_what_single_ones_give(dtype: str) -> None:
    results = []
    for copy in (False, True):
        layer = Layer(trainable=True)
        if copy:
            layer.qkv = [p._replace(weight=Tensor(p.weight.data.copy(), True)) for p in layer.qkv]
        x = Tensor(normal(2, 5, WIDTH), True)
        y = ops.projection(ops.cast(x, dtype), layer.qkv, norm=(layer.norms[0], 1e-6))
        y.backward(normal(*y.shape))
        results.append([y.numpy(), x.grad.numpy(), *(p.weight.grad.numpy() for p in layer.qkv)])
    for one, other in zip(*results, strict=True):
        assert ref.error(one.astype(np.float32), other.astype(np.float32)) <= (1e-6 if dtype == "f32" else 2**-8)


# ---- what is kept


def kept_by(vjp: Callable[..., Any]) -> Iterator[np.ndarray]:
    """Every array that a way back can reach: through closures, attributes, lists and tuples."""
    todo, seen = [vjp], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            yield item
        elif isinstance(item, (list, tuple)):
            todo += item
        elif isinstance(item, types.FunctionType):
            todo += [cell.cell_contents for cell in item.__closure__ or ()]
        elif isinstance(item, types.MethodType):
            todo.append(item.__self__)
        elif type(item).__module__.startswith("entrenar.ops"):
            todo += vars(item).values()


def owner(x: np.ndarray) -> np.ndarray:
    while isinstance(x.base, np.ndarray):
        x = x.base
    return x


def bytes_kept(loss: Tensor, parameters: list[Tensor]) -> dict[str, list[int]]:
    """Bytes that each node below a result holds by itself, without parameters: {operation: sizes}. The same memory
    held by two counts for the later one."""
    known = {owner(t.data).__array_interface__["data"][0] for t in parameters}
    found: dict[str, list[int]] = {}
    nodes, seen = [loss._node], set()
    while nodes:
        node = max(nodes, key=lambda n: n.number)
        nodes.remove(node)
        if node in seen:
            continue
        seen.add(node)
        own = {owner(x).__array_interface__["data"][0]: owner(x).nbytes for x in kept_by(node.vjp)}
        found.setdefault(node.name, []).append(sum(size for at, size in own.items() if at not in known))
        known |= own.keys()
        nodes += [p for p in node.parents if p is not None and not isinstance(p, Tensor)]
    return found


@pytest.mark.tier1
@BOTH
def test_a_layer_keeps_what_its_way_back_reads_and_no_more(dtype: str) -> None:
    n, size, layer = 10, {"f32": 4, "bf16": 2}[dtype], Layer()
    constants = [*layer.leaves(), *layer.norms, Tensor(COS), Tensor(SIN)]
    constants += [p.weight for p in layer.qkv + layer.out + layer.gate_up + layer.down]
    y = layer(ops.cast(Tensor(normal(2, 5, WIDTH), True), dtype))
    qkv = n * (HEADS + 2 * KV) * D * size
    o = x = x2 = n * WIDTH * size
    gate_up, rstd, lse = n * 2 * INNER * size, n * 4, n * HEADS * 4
    low = n * RANK * size
    assert bytes_kept(y, constants) == {
        "projection": [gate_up + low, x2 + rstd + 2 * low, o + low, x + rstd + 3 * low],  # from the last to the first
        "rope_attention": [qkv + lse],  # and o, which the projection behind it counts
        "cast": [0],
    }


@pytest.mark.tier1
def test_frozen_projections_without_adapters_keep_the_input_of_what_is_not_linear_alone() -> None:
    x, w, half, norm = Tensor(normal(4, 8), True), Tensor(normal(6, 8)), Tensor(normal(6, 4)), Tensor(np.ones(8))
    for y, expected in (
        (ops.projection(x * 1, [ops.Part(w)]), 0),
        (ops.projection(x * 1, [ops.Part(w)], norm=(norm, 1e-6)), x.data.nbytes + 4 * 4),
        (ops.projection(x * 1, [ops.Part(half)], gated=True), x.data.nbytes),
    ):
        assert bytes_kept(y, [w, half, norm])["projection"] == [expected]


@pytest.mark.tier1
@BOTH
def test_a_head_keeps_the_gradient_of_its_input_and_of_what_is_trainable(dtype: str) -> None:
    head = part(50, 8)
    x = ops.cast(Tensor(normal(6, 8), True), dtype)
    y = ops.linear_cross_entropy(x, head, np.array([1, 2, -100, 4, 5, -100]))
    counted = 4 * 8 * x.data.itemsize
    assert bytes_kept(y, [head.weight, head.lora.a, head.lora.b])["linear_cross_entropy"] == [
        counted + head.lora.a.data.nbytes + head.lora.b.data.nbytes + 4 * 8  # which rows counted, int64
    ]


# ---- what is computed


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products made since."""
    made: list[tuple[int, ...]] = []
    product = cpu.product

    def counted(terms: Any, out: np.ndarray, **options: Any) -> np.ndarray:
        made.append(out.shape)
        return product(terms, out, **options)

    monkeypatch.setattr(cpu, "product", counted)
    return made


@pytest.mark.tier1
def test_a_projection_is_one_product_and_one_for_the_low_ranks(products: list[tuple[int, ...]]) -> None:
    layer, x = Layer(), Tensor(normal(2, 5, WIDTH), True)
    width = (HEADS + 2 * KV) * D
    y = ops.projection(x, layer.qkv, norm=(layer.norms[0], 1e-6))
    assert products == [(10, 3 * RANK), (10, width)]
    products.clear()
    y.backward(normal(*y.shape))
    kv = (KV * D, RANK)
    assert sorted(products) == sorted([(10, 3 * RANK), (10, WIDTH), (3 * RANK, WIDTH), (WIDTH, RANK), kv, kv])


@pytest.mark.tier1
def test_nothing_is_computed_that_nobody_needs(products: list[tuple[int, ...]]) -> None:
    w, x = Tensor(normal(6, 8)), Tensor(normal(4, 8))
    bias = Tensor(normal(6), requires_grad=True)
    y = ops.projection(x, [ops.Part(w, bias)])
    y.sum().backward()
    assert products == [(4, 6)]
    products.clear()
    x.requires_grad = True
    y = ops.projection(x, [ops.Part(w)], residual=Tensor(normal(4, 6)))
    y.sum().backward()
    assert products == [(4, 6), (4, 8)]
    products.clear()
    with no_grad():
        ops.linear_cross_entropy(x, ops.Part(Tensor(normal(6, 8), True)), [1, 2, 3, 4])
    assert products == [(4, 6)]
    products.clear()
    ops.linear_cross_entropy(x, ops.Part(w), [1, -100, 3, -100])
    assert products == [(2, 6), (2, 8)]


@pytest.mark.tier1
def test_the_gradient_of_a_residual_is_the_one_that_came() -> None:
    x, residual = Tensor(normal(4, 8), True), Tensor(normal(4, 6), True)
    g = normal(4, 6)
    assert ops.projection(x, [ops.Part(Tensor(normal(6, 8)))], residual=residual)._node.vjp(g)[-1] is g


# ---- the loss in chunks


@pytest.mark.tier1
@BOTH
@pytest.mark.parametrize("rows", [1, 4, 7, 100])
def test_chunks_of_the_head_add_up(dtype: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS", 1)
    monkeypatch.setattr(loss, "MIN_ROWS", rows)
    labels = np.array([3, 0, -100, 7, 11, 12, -100, 5, 1, 2, 3, 4])
    results = []
    for fused in (True, False):
        x = Tensor(normal(12, 8), True)
        w, c = Tensor(normal(13, 8), True), Tensor(normal(13), True)
        a, b = Tensor(normal(2, 8), True), Tensor(normal(13, 2), True)
        h = ops.cast(x, dtype)
        if fused:
            y = ops.linear_cross_entropy(h, ops.Part(w, c, ops.Lora(a, b, 0.5)), labels)
        else:
            y = ops.cross_entropy(ops.cast(ops.linear(h, w, c, (a, b, 0.5)), "f32"), labels)
        (y * 3).backward()
        results.append([y.numpy(), *(t.grad.numpy() for t in (x, w, c, a, b))])
    for one, other in zip(*results, strict=True):
        assert ref.error(one, other) <= (1e-5 if dtype == "f32" else 2**-6)


@pytest.mark.tier1
@pytest.mark.parametrize("trainable", [True, False])
def test_a_batch_in_which_no_label_counts_adds_nothing(trainable: bool) -> None:
    x, w, a, b = Tensor(normal(3, 8), True), Tensor(normal(13, 8), trainable), Tensor(normal(2, 8), True), normal(13, 2)
    y = ops.linear_cross_entropy(x, ops.Part(w, None, ops.Lora(a, Tensor(b), 0.5)), [-100] * 3, denominator=5)
    y.backward()
    assert y.item() == 0
    for t in (x, w, a):
        assert (t.grad is None and not t.requires_grad) or not t.grad.numpy().any()


@pytest.mark.tier1
def test_chunks_are_alike_and_not_too_small() -> None:
    vocab, bf16 = 151_936, 2
    assert loss.chunk_rows(1024, vocab * bf16) == 512
    assert loss.chunk_rows(1024, vocab * 4) == 256
    assert loss.chunk_rows(600, vocab * bf16) == 300
    assert loss.chunk_rows(1024, 10**9) == loss.MIN_ROWS
    assert loss.chunk_rows(1000, 1000) == 1000
    assert loss.chunk_rows(1, 1) == 1


# ---- computing again


@pytest.mark.tier1
@BOTH
@pytest.mark.parametrize("trainable", [False, True], ids=["adapters", "everything"])
def test_a_layer_in_a_checkpoint_is_the_same_to_the_bit(dtype: str, trainable: bool) -> None:
    results = []
    for again in (True, False):
        manual_seed(5)
        layers, x = [Layer(trainable), Layer(trainable)], Tensor(normal(2, 5, WIDTH), True)
        h = ops.cast(x, dtype)
        for layer in layers:
            h = checkpoint(layer, h, 0.3) if again else layer(h, 0.3)
        h.backward(normal(2, 5, WIDTH))
        results.append([h.numpy(), x.grad.numpy(), *(t.grad.numpy() for layer in layers for t in layer.leaves())])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.tier1
def test_two_backwards_of_one_micro_batch_each_equal_one_of_both() -> None:
    """Gradients accumulate over graphs into arrays that are views of one product's result."""
    whole, halves = Layer(trainable=True), Layer(trainable=True)
    x, g = normal(4, 5, WIDTH), normal(4, 5, WIDTH, seed=1)
    whole(Tensor(x)).backward(g)
    for i in (0, 2):
        halves(Tensor(x[i : i + 2])).backward(g[i : i + 2])
    for one, other in zip(whole.leaves(), halves.leaves(), strict=True):
        assert ref.error(one.grad.numpy(), other.grad.numpy()) <= 1e-5


@pytest.mark.tier1
def test_a_batch_of_nothing_goes_through_a_layer() -> None:
    layer, x = Layer(trainable=True), Tensor(np.zeros((0, 5, WIDTH)), True)
    y = layer(x)
    assert y.shape == (0, 5, WIDTH)
    y.backward(np.zeros(y.shape))
    assert x.grad.shape == x.shape
    assert all(not t.grad.numpy().any() for t in layer.leaves())
