"""The decoder against a float64 reference that shares no code with it, and the properties every decoder has."""

import numpy as np
import pytest
import reference_decoder as reference
import tiny_models as tiny

from entrenar import CausalLM, LoraConfig, ModelConfig, no_grad
from entrenar.errors import DataError, DTypeError, EntrenarError, GraphError, MemoryLimitError, ShapeError
from entrenar.models import memory

NAMES = list(tiny.CONFIGS)
LORA = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")


def ids_for(model, shape, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, shape)


@pytest.mark.tier1
@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_float64_reference(name):
    model = tiny.model(name)
    ids = ids_for(model, (2, 17))
    with no_grad():
        out = model(ids).numpy()
    for row, got in zip(ids, out, strict=True):
        want = reference.logits(tiny.arrays(model), tiny.plain(model), row)
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_gradients_of_a_two_layer_model_equal_the_float64_reference(name, lora):
    """Each weight's gradient, projected on a random direction, against central differences in float64."""
    model = tiny.model(name, lora=lora)
    ids = ids_for(model, (2, 11))
    labels = np.where(np.random.default_rng(5).random(ids.shape) < 0.3, -100, ids)
    loss = model.loss(ids, labels)
    loss.backward()
    weights, config = {k: v.astype(np.float64) for k, v in tiny.arrays(model).items()}, tiny.plain(model)
    assert loss.item() == pytest.approx(reference.loss(weights, config, ids, labels), rel=1e-5)
    rng = np.random.default_rng(9)
    worst = 0.0
    total = 0.0
    for path, parameter in model.named_parameters():
        grad = parameter.grad.numpy().astype(np.float64)
        direction = rng.choice([-1.0, 1.0], size=grad.shape)
        step = 1e-5
        sides = [
            reference.loss({**weights, path: weights[path] + sign * step * direction}, config, ids, labels)
            for sign in (1, -1)
        ]
        want = (sides[0] - sides[1]) / (2 * step)
        worst = max(worst, abs((grad * direction).sum() - want))
        total = max(total, float(np.linalg.norm(grad)))
    assert worst <= 1e-4 * total


@pytest.mark.tier1
@pytest.mark.parametrize("name", NAMES)
def test_a_later_token_never_changes_an_earlier_logit(name):
    model = tiny.model(name)
    ids = ids_for(model, (1, 19))
    with no_grad():
        before = model(ids).numpy()
        for cut in (1, 8, 18):
            changed = ids.copy()
            changed[0, cut:] = (changed[0, cut:] + 1) % model.config.vocab_size
            after = model(changed).numpy()
            assert np.array_equal(after[0, :cut], before[0, :cut])
            assert not np.array_equal(after[0, cut], before[0, cut])


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_gives_the_logits_of_the_whole_sequence(name):
    model = tiny.model(name)
    ids = ids_for(model, (1, 23))
    with no_grad():
        whole = model(ids).numpy()[0]
    for chunks, room in (([23], 23), ([1] * 23, 23), ([5, 1, 9, 8], 23), ([5, 1, 9, 8], 1), ([1] * 23, 4)):
        cache, at = model.new_cache(room), 0  # a small one has to grow
        for size in chunks:
            logits = model.next_logits(ids[:, at : at + size], cache)
            at += size
            assert np.abs(logits - whole[at - 1]).max() <= 1e-5 * np.abs(whole).max()


def test_a_cache_and_gradients_exclude_each_other():
    model = tiny.model()
    with pytest.raises(GraphError, match="no_grad"):
        model.model(ids_for(model, (1, 3)), cache=model.new_cache(3))


def test_packed_sequences_do_not_see_each_other():
    model = tiny.model()
    first, second = ids_for(model, (9,), 1), ids_for(model, (6,), 2)
    packed = np.concatenate([first, second])[None]
    starts = np.array([[0] * 9 + [9] * 6], np.int32)
    labels = packed.copy()
    labels[0, 9] = -100
    one = model.loss(packed, labels, denominator=1.0, starts=starts).item()
    apart = model.loss(first, denominator=1.0).item() + model.loss(second, denominator=1.0).item()
    assert one == pytest.approx(apart, rel=1e-5)


def test_an_untrained_adapter_leaves_every_bit_as_it_was():
    model = tiny.model()
    ids = ids_for(model, (2, 9))
    with no_grad():
        base = model(ids).numpy()
        model.add_lora(LORA)
        assert np.array_equal(model(ids).numpy(), base)


def test_recompute_gives_the_same_bits():
    grads = []
    for recompute in (False, True):
        model = tiny.model("qwen2", lora=LoraConfig(r=2, lora_dropout=0.4, target_modules="all-linear")).train()
        model.model.recompute = recompute
        import entrenar

        entrenar.manual_seed(11)
        model.loss(ids_for(model, (2, 9))).backward()
        grads.append([p.grad.numpy() for p in model.parameters()])
    assert all(np.array_equal(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_acts_in_training_only():
    model = tiny.model(lora=LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"))
    ids = ids_for(model, (1, 9))
    with no_grad():
        assert not np.array_equal(model.train()(ids).numpy(), model.train()(ids).numpy())
        assert np.array_equal(model.eval()(ids).numpy(), model.eval()(ids).numpy())


def test_random_weights_depend_on_seed_and_place_only():
    small = tiny.CONFIGS["llama"]
    a, b, c = (tiny.arrays(CausalLM.from_config(small, seed=s)) for s in (3, 3, 4))
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(a["lm_head.weight"], c["lm_head.weight"])
    down, up = (a[f"model.layers.1.mlp.{m}_proj.weight"].std() for m in ("down", "up"))
    assert up == pytest.approx(0.02, rel=0.1)
    assert down == pytest.approx(0.02 / 2, rel=0.1)  # 2 layers: divided by sqrt(4)


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("ids", "error"),
    [([[]], ShapeError), ([[[1]]], ShapeError), ([1.5], DTypeError), ([999], EntrenarError), ([-1], EntrenarError)],
)
def test_impossible_token_ids_are_typed_errors(ids, error):
    with pytest.raises(error):
        tiny.model()(np.array(ids))


def test_nothing_to_learn_is_an_error():
    model = tiny.model()
    with pytest.raises(DataError, match="masked"):
        model.loss([1, 2, 3], [-100, -100, -100])
    with pytest.raises(DataError, match="single token"):
        model.loss([1])
    with pytest.raises(ShapeError):
        model.loss([1, 2, 3], [1, 2])


def test_a_model_that_cannot_fit_is_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 4_000_000_000)
    with pytest.raises(MemoryLimitError, match=r"26\.95 GB.*4\.00 GB"):
        CausalLM.from_config(ModelConfig.preset("llama2-7b"))


def test_how_many_logits_are_held_at_once_changes_rounding_only():
    found = []
    for rows in (None, 3, 1):
        model = tiny.model("qwen2", lora=LORA)
        model.logits_rows = rows
        loss = model.loss(ids_for(model, (2, 9)))
        loss.backward()
        found.append((loss.item(), [p.grad.numpy() for p in model.parameters()]))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for grad, want in zip(grads, found[0][1], strict=True):
            assert np.abs(grad - want).max() <= 1e-5 * np.abs(want).max()
