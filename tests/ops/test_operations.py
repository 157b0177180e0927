"""What single operations promise beyond their gradients: 16-bit storage, options, and errors that say what
and where."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import reference as ref

from entrenar import ops
from entrenar.errors import DataError, DTypeError, EntrenarError, ShapeError, UsageError
from entrenar.tensor import Tensor, checkpoint, manual_seed

pytestmark = pytest.mark.tier1
rng = np.random.default_rng(8)


def zeros(*shape: int) -> Tensor:
    return Tensor(np.zeros(shape))


def normal(*shape: int, requires_grad: bool = False) -> Tensor:
    return Tensor(rng.normal(size=shape), requires_grad=requires_grad)


# ---- frozen weights in 16 bits

HALVES = pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])


@HALVES
def test_16_bit_weights_are_used_as_they_are(dtype: type) -> None:
    w = Tensor(rng.normal(size=(7, 5)).astype(dtype))
    wide = w.numpy().astype(np.float64)
    x = normal(3, 5, requires_grad=True)
    y = ops.linear(x, w)
    assert ref.error(y.numpy(), ref.linear(x.numpy(), wide)) < 1e-5
    y.sum().backward()
    assert ref.error(x.grad.numpy(), np.broadcast_to(wide.sum(0), (3, 5))) < 1e-5
    product = normal(3, 7) @ w
    assert product.dtype == np.float32
    ids = np.array([[6, 0], [3, 3]])
    np.testing.assert_array_equal(ops.embedding(w, ids).numpy(), wide[ids].astype(np.float32))
    assert w.grad is None


@HALVES
def test_16_bit_storage_is_refused_elsewhere(dtype: type) -> None:
    w, x = Tensor(np.ones((3, 3), dtype)), zeros(3, 3)
    for call in (
        lambda: x + w, lambda: w @ x, lambda: ops.relu(w), lambda: ops.concat([x, w]),
        lambda: ops.linear(x, x, lora=(w, x, 1.0)), lambda: ops.rms_norm(x, w[0]),
    ):
        with pytest.raises(DTypeError, match=r"float16.*ops\.cast"):
            call()
    w.requires_grad = True
    leaf = dtype == ml_dtypes.bfloat16
    computed = ops.cast(Tensor(np.ones((3, 3)), requires_grad=True), "bf16") if leaf else w
    for call in (lambda: ops.linear(x, computed), lambda: ops.embedding(computed, [0]), lambda: x @ w):
        with pytest.raises(DTypeError, match="no gradient"):
            call()


def test_gradients_of_rows_are_added_to_what_is_there() -> None:
    """A table that is also a factor, and one that is summed, in either order and through a checkpoint."""
    rng = np.random.default_rng(2)
    values, x = rng.standard_normal((6, 4)), rng.standard_normal((3, 4))
    counts = np.bincount([1, 4, 1, 0], minlength=6)[:, None] * np.ones((6, 4))

    def looked_up(w: Tensor) -> Tensor:
        return ops.embedding(w, [[1, 4], [1, 0]]).sum()

    others = (
        (lambda w: (Tensor(x) @ w.transpose()).sum(), np.broadcast_to(x.sum(0), (6, 4))),
        (lambda w: w.sum(), np.ones((6, 4))),  # its gradient is a view of one number
        (looked_up, counts),
    )
    for other, extra in others:
        for rows in (looked_up, lambda w: checkpoint(looked_up, w)):
            for order in (lambda a, b: a + b, lambda a, b: b + a):
                w = Tensor(values, requires_grad=True)
                for times in (1, 2):
                    order(rows(w), other(w)).backward()
                    np.testing.assert_allclose(w.grad.numpy(), times * (counts + extra), rtol=1e-6, atol=1e-6)


def test_a_gradient_that_is_the_gradient_to_come() -> None:
    """The gradient handed to backward is a leaf's own."""
    w = Tensor(np.arange(12.0).reshape(4, 3), requires_grad=True)
    ops.embedding(w, [0, 1, 2, 3]).sum().backward()
    ops.embedding(w, [3, 3, 0, 1]).backward(w.grad)
    np.testing.assert_array_equal(w.grad.numpy(), np.array([2, 2, 1, 3])[:, None] * np.ones((4, 3)))


def test_a_leaf_in_bf16_has_gradients_in_f32() -> None:
    rng = np.random.default_rng(1)
    values, x = rng.standard_normal((5, 4)).astype(ml_dtypes.bfloat16), Tensor(rng.standard_normal((6, 4)))
    labels = rng.integers(5, size=6)
    for call in (
        lambda w: (ops.linear(x, w) * ops.linear(x, w)).sum(),
        lambda w: (ops.embedding(w, [1, 4, 1]) * ops.embedding(w, [1, 4, 2])).sum(),
        lambda w: ops.linear_cross_entropy(x, ops.Part(w), labels),
    ):
        half, full = Tensor(values, requires_grad=True), Tensor(values.astype(np.float32), requires_grad=True)
        for w in (half, full):
            call(w).backward()
            call(w).backward()
        assert half.grad.dtype == np.float32
        np.testing.assert_allclose(half.grad.data, full.grad.data, rtol=1e-6)


# ---- pow at its corners


def test_the_gradient_of_pow_at_zero_is_that_of_the_limit() -> None:
    x = Tensor([0.0, 2.0, -3.0], requires_grad=True)
    (x**0).sum().backward()
    assert x.grad.numpy().tolist() == [0, 0, 0]
    x.grad = None
    (x**2).sum().backward()
    assert x.grad.numpy().tolist() == [0, 4, -6]
    exponent = Tensor([2.0, 0.0, 1.0], requires_grad=True)
    (np.array([0.0, 0.0, 1.0], np.float32) ** exponent).sum().backward()
    assert exponent.grad.numpy().tolist() == [0, 0, 0]


# ---- linear


def test_lora_with_zero_b_is_the_base_to_the_bit() -> None:
    x, w, bias = normal(4, 6), normal(5, 6), normal(5)
    plain = ops.linear(x, w, bias).numpy()
    np.testing.assert_array_equal(ops.linear(x, w, bias, lora=(normal(3, 6), zeros(5, 3), 2.0)).numpy(),
    plain)


def test_frozen_weights_cost_no_gradient() -> None:
    x, w = normal(4, 6, requires_grad=True), normal(5, 6)
    a, b = normal(3, 6, requires_grad=True), normal(5, 3, requires_grad=True)
    y = ops.linear(x, w, lora=(a, b, 2.0))
    assert y._node.vjp(np.ones((4, 5), np.float32))[1] is None
    y.sum().backward()
    assert w.grad is None
    assert (a.grad.shape, b.grad.shape) == (a.shape, b.shape)


def test_one_node_each() -> None:
    """The fused operations keep the tape short: the parents of the last node are the leaves."""
    x, w = normal(4, 6, requires_grad=True), normal(6, 6, requires_grad=True)
    lora = (normal(3, 6, requires_grad=True), normal(6, 3, requires_grad=True), 2.0)
    assert ops.linear(x, w, None, lora)._node.parents == [x, w, *lora[:2]]
    assert ops.swiglu(x, w[:4])._node.parents[0] is x
    assert ops.cross_entropy(x, [1, 2, 3, 4])._node.parents == [x]


# ---- attention and rope


def test_attention_of_a_cache_slice_equals_that_of_a_copy() -> None:
    cache = rng.normal(size=(2, 16, 2, 4)).astype(np.float32)
    q = normal(2, 3, 4, 4)
    part, whole = Tensor(cache[:, :7], requires_grad=True), Tensor(cache[:, :7].copy(), requires_grad=True)
    assert not part.numpy().flags.c_contiguous
    outs = [ops.attention(q, k, k) for k in (part, whole)]
    np.testing.assert_array_equal(outs[0].numpy(), outs[1].numpy())
    for out in outs:
        out.backward(np.ones(out.shape))
    np.testing.assert_array_equal(part.grad.numpy(), whole.grad.numpy())


def test_attention_is_causal_to_the_bit() -> None:
    q, k, v = normal(1, 9, 2, 4), normal(1, 9, 2, 4), normal(1, 9, 2, 4)
    before = ops.attention(q, k, v).numpy().copy()
    for x in (k, v):
        x.data[:, 6:] = 1e3
    after = ops.attention(q, k, v).numpy()
    np.testing.assert_array_equal(after[:, :6], before[:, :6])
    assert (after[:, 6:] != before[:, 6:]).any()


def test_packed_sequences_do_not_see_each_other() -> None:
    a, b = (tuple(normal(1, n, 2, 4) for _ in range(3)) for n in (3, 4))
    packed = [Tensor(np.concatenate([x.numpy(), y.numpy()], 1)) for x, y in zip(a, b, strict=True)]
    out = ops.attention(*packed, starts=np.array([[0, 0, 0, 3, 3, 3, 3]])).numpy()
    alone = np.concatenate([ops.attention(*a).numpy(), ops.attention(*b).numpy()], 1)
    np.testing.assert_allclose(out, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_depends_on_distance_alone(interleaved: bool) -> None:
    angles = np.outer(np.arange(40), 0.7 ** np.arange(3))
    cos, sin = np.cos(angles), np.sin(angles)
    q, k = normal(1, 1, 1, 6), normal(1, 1, 1, 6)

    def score(i: int, j: int) -> float:
        turned = [
            ops.rope(x, cos[p : p + 1], sin[p : p + 1], interleaved).numpy().ravel() for x, p in ((q, i), (k,
            j))
        ]
        return float(turned[0] @ turned[1])

    assert score(7, 3) == pytest.approx(score(29, 25), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 5), abs=1e-3)


# ---- dropout


def test_dropout_keeps_its_share_and_the_mean() -> None:
    manual_seed(0)
    y = ops.dropout(Tensor(np.ones(100_000)), 0.3).numpy()
    kept = y != 0
    assert np.unique(y[kept]).tolist() == [np.float32(1 / 0.7)]
    assert abs(kept.mean() - 0.7) < 0.01
    neighbours = np.corrcoef(kept[:-1], kept[1:])[0, 1]
    assert abs(neighbours) < 0.02


def test_dropout_gives_its_gradient_to_what_it_kept() -> None:
    x = Tensor(np.ones(50), requires_grad=True)
    y = ops.dropout(x, 0.5)
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), y.numpy())


def test_dropout_outside_training_draws_nothing() -> None:
    manual_seed(0)
    x = normal(5)
    np.testing.assert_array_equal(ops.dropout(x, 0.9, training=False).numpy(), x.numpy())
    first = ops.dropout(x, 0.5).numpy()
    manual_seed(0)
    np.testing.assert_array_equal(ops.dropout(x, 0.5).numpy(), first)


# ---- cross-entropy


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    assert ops.cross_entropy(zeros(4, 11), [0, 3, 10, -100]).item() == pytest.approx(np.log(11), rel=1e-6)


def test_denominator_makes_micro_batches_add_up() -> None:
    logits, labels = normal(6, 9), np.array([1, -100, 3, 4, -100, 8])
    whole = ops.cross_entropy(logits, labels).item()
    parts = sum(ops.cross_entropy(logits[i : i + 2], labels[i : i + 2], denominator=4).item() for i in (0, 2, 4))
    assert parts == pytest.approx(whole, rel=1e-6)
    assert ops.cross_entropy(logits, np.full(6, -100), denominator=4).item() == 0


def test_ignored_positions_get_no_gradient_whatever_they_hold() -> None:
    logits = normal(3, 5, requires_grad=True)
    logits.data[1] = np.nan
    ops.cross_entropy(logits, [1, -100, 2]).backward()
    np.testing.assert_array_equal(logits.grad.numpy()[1], 0)
    assert np.isfinite(logits.grad.numpy()).all()


# ---- buffers that callers use again


def test_ids_labels_and_starts_may_change_before_backward() -> None:
    w = normal(5, 4, requires_grad=True)
    ids, labels, starts = np.array([[0, 3, 3]]), np.array([[1, 2, 0]]), np.array([[0, 0, 2]], np.int32)

    def run(spoil: bool) -> np.ndarray:
        w.grad = None
        a, b, c = ids.copy(), labels.copy(), starts.copy()
        h = ops.embedding(w, a)
        q = h.reshape(1, 3, 2, 2)
        loss = ops.cross_entropy(ops.attention(q, q, q, starts=c).reshape(1, 3, 4), b)
        if spoil:
            a[:], b[:], c[:] = 1, 3, 0
        loss.backward()
        return w.grad.numpy()

    np.testing.assert_array_equal(run(spoil=True), run(spoil=False))


# ---- errors

ERRORS: list[tuple[type[EntrenarError], str, Callable[[], object]]] = [
    (ShapeError, r"add.*\(2, 3\).*\(4,\)", lambda: zeros(2, 3) + zeros(4)),
    (ShapeError, r"matmul: \(2, 3\) @ \(2, 3\)", lambda: zeros(2, 3) @ zeros(2, 3)),
    (ShapeError, r"matmul: \(2, 1, 3\) @ \(3, 3, 1\)", lambda: zeros(2, 1, 3) @ zeros(3, 3, 1)),
    (ShapeError, r"matmul: \(\) @ \(3,\)", lambda: zeros() @ zeros(3)),
    (ShapeError, r"linear: a weight \(4, 5\) for an input \(..., 3\)", lambda: ops.linear(zeros(2, 3), zeros(4, 5))),
    (ShapeError, r"linear: bias \(5,\)", lambda: ops.linear(zeros(2, 3), zeros(4, 3), zeros(5))),
    (
        ShapeError, r"lora A \(2, 4\) and B \(4, 2\); needed are \(r, 3\) and \(4, r\)",
        lambda: ops.linear(zeros(2, 3), zeros(4, 3), lora=(zeros(2, 4), zeros(4, 2), 1.0)),
    ),
    (
        ShapeError, r"lora input \(1, 3\)",
        lambda: ops.linear(zeros(2, 3), zeros(4, 3), lora=(zeros(2, 3), zeros(4, 2), 1.0, zeros(1, 3))),
    ),
    (ShapeError, r"sum: axis 2 for a tensor of 2", lambda: zeros(2, 3).sum(2)),
    (ShapeError, r"mean: axis \(0, -2\)", lambda: zeros(2, 3).mean((0, -2))),
    (ShapeError, r"reshape: \(2, 3\) \(6 elements\) into \(4, -1\)", lambda: zeros(2, 3).reshape(4, -1)),
    (ShapeError, r"transpose: \(0, 1\).*\(2, 3, 4\)", lambda: zeros(2, 3, 4).transpose(0, 1)),
    (ShapeError, r"transpose: axis \(0, 0\)", lambda: zeros(2, 3).transpose(0, 0)),
    (ShapeError, r"slice: 5 of \(2, 3\)", lambda: zeros(2, 3)[5]),
    (ShapeError, r"slice: .* of \(2,\)", lambda: zeros(2)[0, 0]),
    (ShapeError, r"slice: .* of \(2,\)", lambda: zeros(2)[::0]),
    (DTypeError, r"slice: an index of type ndarray", lambda: zeros(2, 3)[np.array([0])]),
    (DTypeError, r"slice: an index of type bool", lambda: zeros(2, 3)[True]),
    (ShapeError, r"concat: shapes \[\(2, 3\), \(2, 4\)\] along axis 0", lambda: ops.concat([zeros(2, 3), zeros(2, 4)])),
    (ShapeError, r"concat", lambda: ops.concat([])),
    (DTypeError, r"concat: give a list of Tensors", lambda: ops.concat([np.zeros(3)])),
    (ShapeError, r"softmax: axis 0 for a tensor of 0", lambda: ops.softmax(zeros(), 0)),
    (ShapeError, r"swiglu: gate \(2,\) and up \(3,\)", lambda: ops.swiglu(zeros(2), zeros(3))),
    (UsageError, r"gelu: approximate='erf'", lambda: ops.gelu(zeros(2), "erf")),
    (ShapeError, r"rms_norm: weight \(2,\) for x \(2, 3\)", lambda: ops.rms_norm(zeros(2, 3), zeros(2))),
    (ShapeError, r"layer_norm: bias \(1,\)", lambda: ops.layer_norm(zeros(2, 3), zeros(3), zeros(1))),
    (ShapeError, r"rope: x \(2, 3\)", lambda: ops.rope(zeros(2, 3), [[1.0]], [[0.0]])),
    (ShapeError, r"rope: x .*cos \(3, 2\)", lambda: ops.rope(zeros(1, 2, 1, 4), np.ones((3, 2)), np.ones((3, 2)))),
    (ShapeError, r"turns 6 of the 4", lambda: ops.rope(zeros(1, 2, 1, 4), np.ones((2, 3)), np.ones((2, 3)))),
    (
        ShapeError, r"attention: q \(1, 3, 2, 4\) with k \(1, 2, 2, 4\)",
        lambda: ops.attention(zeros(1, 3, 2, 4), zeros(1, 2, 2, 4), zeros(1, 2, 2, 4)),
    ),
    (ShapeError, r"multiple of Hkv", lambda: ops.attention(zeros(1, 2, 3, 4), zeros(1, 2, 2, 4), zeros(1, 2,
    2, 4))), (
        ShapeError, r"starts must be \(1, 2\), its shape is \(1, 3\)",
        lambda: ops.attention(*[zeros(1, 2, 1, 4)] * 3, starts=np.zeros((1, 3), np.int32)),
    ),
    (UsageError, r"attention: window -1", lambda: ops.attention(*[zeros(1, 2, 1, 4)] * 3, window=-1)),
    (ShapeError, r"embedding: weight \(3,\)", lambda: ops.embedding(zeros(3), [0])),
    (EntrenarError, r"5", lambda: ops.embedding(zeros(5, 2), [0, 5])),
    (EntrenarError, r"-1", lambda: ops.embedding(zeros(5, 2), [-1])),
    (DTypeError, r"embedding: ids of type float64", lambda: ops.embedding(zeros(5, 2), [0.5])),
    (UsageError, r"dropout: p=1", lambda: ops.dropout(zeros(2), 1.0)),
    (UsageError, r"dropout: p=nan", lambda: ops.dropout(zeros(2), float("nan"))),
    (ShapeError, r"labels \(3,\) for rows \(2,\)", lambda: ops.cross_entropy(zeros(2, 5), [0, 1, 2])),
    (DataError, r"label 5 is outside 0 … 4", lambda: ops.cross_entropy(zeros(2, 5), [0, 5])),
    (DataError, r"label -1 ", lambda: ops.cross_entropy(zeros(2, 5), [0, -1])),
    (DataError, r"all 2 labels are -100", lambda: ops.cross_entropy(zeros(2, 5), [-100, -100])),
    *[
        (error, message, lambda call=call: call(zeros(2, 4), ops.Part(zeros(3, 4))))
        for error, message, call in (
            (UsageError, r"projection: 0 parts; give 1 to 4", lambda x, p: ops.projection(x, [])),
            (UsageError, r"projection: 5 parts", lambda x, p: ops.projection(x, [p] * 5)),
            (UsageError, r"projection: the input is normed or gated", lambda x, p: ops.projection(
                x, [p], norm=(zeros(4), 1e-6), gated=True)),
            (UsageError, r"projection: dropout=1.0", lambda x, p: ops.projection(x, [p], dropout=1.0)),
            (ShapeError, r"a weight \(3, 4\) for an input \(..., 2\)", lambda x, p: ops.projection(x, [p], gated=True)),
            (ShapeError, r"x \(2, 3\); needed is \(..., 2·in\)", lambda x, p: ops.projection(
                zeros(2, 3), [p], gated=True)),
            (ShapeError, r"projection: residual \(2, 4\) for a result \(2, 3\)", lambda x, p: ops.projection(
                x, [p], residual=x)),
            (ShapeError, r"projection: norm weight \(3,\) for x \(2, 4\)", lambda x, p: ops.projection(
                x, [p], norm=(zeros(3), 1e-6))),
            (ShapeError, r"rope_attention: qkv \(1, 2, 7\) with 2 heads on 1", lambda x, p: ops.rope_attention(
                zeros(1, 2, 7), 2, 1, [[1.0]] * 2, [[0.0]] * 2, 1.0)),
            (ShapeError, r"rope_attention: x \(1, 2, 4, 2\), cos \(3, 1\)", lambda x, p: ops.rope_attention(
                zeros(1, 2, 8), 2, 1, [[1.0]] * 3, [[0.0]] * 3, 1.0)),
            (ShapeError, r"linear_cross_entropy: labels \(3,\) for rows \(2,\)", lambda x, p: ops.linear_cross_entropy(
                x, p, [0, 1, 2])),
            (DataError, r"linear_cross_entropy: label 3 is outside 0 … 2", lambda x, p: ops.linear_cross_entropy(
                x, p, [0, 3])),
            (DataError, r"linear_cross_entropy: all 2 labels", lambda x, p: ops.linear_cross_entropy(x, p, [-100] * 2)),
        )
    ],
    (UsageError, r"denominator 0", lambda: ops.cross_entropy(zeros(2, 5), [0, 1], denominator=0)),
]


@pytest.mark.parametrize(("error", "message", "call"), ERRORS, ids=[m for _, m, _ in ERRORS])
def test_errors_say_what_and_where(error: type[EntrenarError], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()
