"""Adapters in memory: several on one base, embeddings and whole modules; against dense weights."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import tiny_models as tiny
from tiny_models import IDS, close, logits, randomize

from entrenar import CausalLM, LoraConfig, ModelConfig
from entrenar.errors import AdapterError, ConfigError, FormatError, UsageError

ALL = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")


def with_dense(name, changes):
    """The model whose weights are the base's plus dense changes, computed here in float64."""
    model = tiny.model(name)
    weights = dict(model.named_weights())
    for path, change in changes.items():
        weights[f"{path}.weight"].data[...] += change
    return logits(model)


def two(name="llama"):
    """A model with adapters "a" on all linear layers and "b" on some, and what each changes, dense in float64."""
    model = tiny.model(name)
    changes = {}
    other = LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["o_proj"])
    for adapter, config in (("a", ALL), ("b", other)):
        model.add_lora(config, seed=len(changes), name=adapter)
        randomize(model, len(changes))
        changes[adapter] = {
            path: f.scale * f.b.data.astype(np.float64) @ f.a.data
            for path, f in model.adapters[adapter].factors.items()
        }
    return model, changes


def test_a_sum_is_merged_and_can_t_come_back_as_one_of_its_parts():
    """Its ranks are no config's: saved, it would be a file whose settings are not its factors'."""
    model, _ = two()
    model.set_adapter(["a", "b"])
    want, config = logits(model), model.adapters["a"].config
    factors = model.merge_adapter()
    assert close(logits(model), want)
    with pytest.raises(AdapterError, match=r"o_proj was given factors of rank 5, and the config says 3"):
        model.unmerge_adapter(config, factors)
    assert close(logits(model), want)
    assert model.adapters == {}


def test_switching_scaling_adding_and_disabling():
    model, changes = two()
    base = logits(tiny.model())
    only = {n: with_dense("llama", changes[n]) for n in "ab"}
    assert model.active_adapters == ["b"]
    assert close(logits(model), only["b"])
    model.set_adapter("a")
    assert model.active_adapters == ["a"]
    assert model.adapter is model.adapters["a"].config
    assert close(logits(model), only["a"])
    half = {path: 0.5 * d for path, d in changes["a"].items()}
    model.set_adapter({"a": 0.5})
    assert close(logits(model), with_dense("llama", half))
    both = {path: d + -2 * changes["b"].get(path, 0) for path, d in half.items()}
    model.set_adapter({"a": 0.5, "b": -2})
    assert close(logits(model), with_dense("llama", both))
    with model.disable_adapter():
        assert model.adapter is None
        assert np.array_equal(logits(model), base)
    assert close(logits(model), with_dense("llama", both))
    model.merge_adapter()
    assert close(logits(model), with_dense("llama", both))
    assert model.adapters == {}


def test_deleting_and_unknown_names():
    model, changes = two()
    model.delete_adapter("b")
    assert model.active_adapters == []
    model.set_adapter(["a"])
    assert close(logits(model), with_dense("llama", changes["a"]))
    for call, arguments in ((model.set_adapter, "b"), (model.delete_adapter, "b"), (model.save_adapter, "xb")):
        with pytest.raises(AdapterError, match="no adapter 'b'"):
            call(*arguments)
    with pytest.raises(AdapterError, match="nan"):
        model.set_adapter({"a": float("nan")})
    assert model.active_adapters == ["a"]
    model.unload_adapter()
    assert np.array_equal(logits(model), logits(tiny.model()))


def test_only_the_acting_adapter_is_trained():
    model, _ = two()
    names = {name for name, _ in model.named_parameters()}
    assert all("o_proj" in name for name in names)
    model.loss(IDS).backward()
    assert all(t.grad is None for factors in model.adapters["a"].factors.values() for _, t in factors.named())
    model.set_adapter(["a", "b"])
    assert model.parameters() == []  # a sum is frozen


def test_which_of_several_to_save_must_be_said(tmp_path):
    model, changes = two()
    model.set_adapter(["a", "b"])
    with pytest.raises(AdapterError, match="a, b act"):
        model.save_adapter(tmp_path / "x")
    model.save_adapter(tmp_path / "x", "a")
    fresh = tiny.model()
    fresh.load_adapter(tmp_path / "x", name="first")
    fresh.load_adapter(tmp_path / "x", name="second")
    with pytest.raises(AdapterError, match="second"):
        fresh.load_adapter(tmp_path / "x", name="second")
    fresh.set_adapter("first")
    assert close(logits(fresh), with_dense("llama", changes["a"]))


@pytest.mark.parametrize("factor", [0.5, 0.3, -2, 0])
@pytest.mark.parametrize("form", ["peft", "a.gguf"])
def test_what_is_saved_counts_as_what_acts(tmp_path, form, factor):
    """In each form, with settings that count differently from layer to layer, of a layer and of the embedding."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj", "embed_tokens"], use_rslora=True,
                        rank_pattern={"down_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 7})  # fmt: skip
    model = tiny.model(lora=config)
    randomize(model, 4)
    whole = logits(model)
    model.set_adapter({"default": factor})
    want = logits(model)
    model.save_adapter(tmp_path / form)
    fresh = tiny.model()
    fresh.load_adapter(tmp_path / form)
    assert close(logits(fresh), want, 1e-6)
    assert not close(want, whole, 1e-2)
    model.save_adapter(tmp_path / f"as-trained-{form}", "default")  # by its name, as it was trained
    again = tiny.model()
    again.load_adapter(tmp_path / f"as-trained-{form}")
    assert close(logits(again), whole, 1e-6)


def test_an_adapter_trained_at_a_factor_is_saved_with_it(tmp_path):
    model, _ = two()
    model.set_adapter({"b": 0.25})
    model.loss(IDS).backward()
    for parameter in model.parameters():
        parameter.data[...] -= 0.5 * parameter.grad.numpy()
        parameter.version += 1
    model.save_adapter(tmp_path)
    fresh = tiny.model()
    fresh.load_adapter(tmp_path)
    assert close(logits(fresh), logits(model), 1e-6)


def test_dora_and_whole_modules_count_once():
    """A magnitude or a weight stands in for the model's own; half of it would be no half of what was learned."""
    model, _ = two()
    model.add_lora(LoraConfig(r=2, target_modules=["k_proj"], use_dora=True), name="dora")
    model.add_lora(LoraConfig(r=2, target_modules=["k_proj"], modules_to_save=["norm"]), name="whole")
    for name in ("dora", "whole"):
        for factors in ({name: 0.5}, {"b": 0.5, name: 2}, {name: 0}):
            with pytest.raises(AdapterError, match=rf"'{name}' counts 1 or not at all.*{factors[name]}"):
                model.set_adapter(factors)
        assert model.active_adapters == ["whole"]
    model.set_adapter({"b": 0.5, "whole": 1.0})
    assert model.active_adapters == ["b", "whole"]


def test_an_adapter_that_is_not_added_leaves_the_acting_ones(tmp_path):
    for names in ("a", {"a": 0.5, "b": -1.0}):
        model, _ = two()
        model.set_adapter(names)
        acting, want = model.active_adapters, logits(model)
        refused = [LoraConfig(target_modules=["zz"]), LoraConfig(modules_to_save=["zz"], target_modules=["q_proj"]),
                   LoraConfig(target_modules=["embed_tokens"], use_dora=True)]  # fmt: skip
        for config in refused:
            with pytest.raises(AdapterError):
                model.add_lora(config, name="c")
        with pytest.raises(FormatError, match=r"adapter_config\.json"):
            model.load_adapter(tmp_path, name="c")
        assert model.active_adapters == acting
        assert sorted(model.adapters) == ["a", "b"]
        assert np.array_equal(logits(model), want)


def test_arguments_of_other_types_are_typed_errors(tmp_path):
    model, _ = two()
    for names in (None, 5, [None], [["a"]]):
        with pytest.raises(AdapterError, match="adapter"):
            model.set_adapter(names)
    for factor in ("x", "0.5", None, True, [1.0], 10**400, 1e300, -1001, float("inf"), float("nan")):
        with pytest.raises(AdapterError, match="'a' can't count"):
            model.set_adapter({"a": factor})
    for call in (model.load_adapter, model.save_adapter):
        with pytest.raises(UsageError, match="None"):
            call(None)
    with pytest.raises(AdapterError, match="None"):
        model.delete_adapter(None)
    with pytest.raises(AdapterError, match="5"):
        model.add_lora(ALL, name=5)
    with pytest.raises(AdapterError, match="None"):
        model.load_adapter(tmp_path, name=None)
    assert model.active_adapters == ["b"]


@pytest.mark.parametrize("dtype", ["f32", "mixed"])
def test_an_adapter_of_the_embedding(tmp_path, dtype):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "lm_head"])
    model = tiny.model(dtype=dtype)
    before = logits(model)
    model.add_lora(config)
    assert np.array_equal(logits(model), before)
    randomize(model, 3)
    table = model.adapters["default"].factors["model.embed_tokens"]
    head = model.adapters["default"].factors["lm_head"]
    dense = {
        "model.embed_tokens": 1.5 * table.a.data.astype(np.float64) @ table.b.data.T,
        "lm_head": 1.5 * head.b.data.astype(np.float64) @ head.a.data,
    }
    want = with_dense("llama", dense)
    assert np.abs(want - before).max() > 0.1
    assert close(logits(model), want, 1e-5 if dtype == "f32" else 3e-2)
    model.save_adapter(tmp_path)
    fresh = tiny.model(dtype=dtype)
    fresh.load_adapter(tmp_path)
    assert np.array_equal(logits(fresh), logits(model))
    if dtype == "f32":
        model.merge_adapter()
        assert close(logits(model), want)


def test_the_embedding_s_adapter_has_the_gradient_of_the_dense_table():
    model = tiny.model(lora=LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens"]))
    randomize(model, 5)
    table = model.adapters["default"].factors["model.embed_tokens"]
    model.loss(IDS).backward()
    dense = tiny.model()
    weight = dense.model.embed_tokens.weight
    weight.data[...] += 3 * table.a.data @ table.b.data.T
    dense.loss(IDS).backward()
    g = weight.grad.numpy().astype(np.float64)
    assert np.allclose(table.a.grad.numpy(), 3 * g @ table.b.data, atol=1e-6)
    assert np.allclose(table.b.grad.numpy(), 3 * g.T @ table.a.data, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "llama-tied-wide-heads"])
def test_whole_modules_are_trained_saved_and_switched(tmp_path, name):
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "model.norm"])
    model = tiny.model(name)
    base = logits(model)
    model.add_lora(config)
    assert np.array_equal(logits(model), base)
    whole = [n for n, _ in model.named_parameters() if "lora" not in n]
    assert sorted(whole) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    model.loss(IDS).backward()
    for n, tensor in model.named_parameters():
        if "lora" not in n:
            assert np.abs(tensor.grad.numpy()).max() > 0
            tensor.data[...] -= 0.5 * tensor.grad.numpy()
            tensor.version += 1
    trained = logits(model)
    assert np.abs(trained - base).max() > 1e-3
    with model.disable_adapter():
        assert np.array_equal(logits(model), base)
    assert np.array_equal(logits(model), trained)
    model.save_adapter(tmp_path)
    fresh = tiny.model(name)
    fresh.load_adapter(tmp_path)
    assert np.array_equal(logits(fresh), trained)
    fresh.merge_adapter()
    assert close(logits(fresh), trained)


def test_whole_modules_are_copied_once():
    config = ModelConfig(vocab_size=20000, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    model = CausalLM.from_config(config, seed=0, dtype="bf16")
    tracemalloc.start()
    try:
        model.add_lora(LoraConfig(r=1, modules_to_save=["embed_tokens"]))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held >= 4 * 20000 * 64
    assert peak <= 1.2 * held


def test_what_modules_to_save_takes():
    with pytest.raises(AdapterError, match="no module with weights is named 'embedding'"):
        tiny.model().add_lora(LoraConfig(target_modules=["q_proj"], modules_to_save=["embedding"]))
    with pytest.raises(ConfigError, match="modules_to_save"):
        LoraConfig(modules_to_save="lm_head")
    model = tiny.model()
    for name in ("a", "b"):
        model.add_lora(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), name=name)
    with pytest.raises(AdapterError, match=r"lm_head\.weight is held whole by several"):
        model.set_adapter(["a", "b"])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["embed_tokens"], "modules_to_save": ["embed_tokens"]},
         r"model\.embed_tokens is named by target_modules and by modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
         r"lm_head is named by target_modules and by modules_to_save"),
        ({"target_modules": r"lm_.*", "modules_to_save": ["lm_head"]}, r"lm_head is named by target_modules and by"),
        ({"target_modules": ["up_proj"], "modules_to_save": ["mlp"]}, r"mlp\.up_proj is named by target_modules and"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
         r"exclude_modules and layers_to_transform leave .*q_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 7}, "layers_to_transform leave .*q_proj"),
        ({"target_modules": ["embed_tokens"], "layers_to_transform": [0]}, "leave .*embed_tokens"),
        ({"target_modules": ["zz"], "exclude_modules": ["q_proj"]}, "'zz'.*there are"),
    ],
)  # fmt: skip
def test_targets_that_other_settings_take_away_say_which(config, words):
    with pytest.raises(AdapterError, match=words):
        tiny.model().add_lora(LoraConfig(**config))


def test_a_module_to_save_may_hold_others():
    model = tiny.model(lora=LoraConfig(target_modules="all-linear", modules_to_save=["layers.0.mlp", "norm"]))
    names = {name for name, _ in model.named_parameters()}
    mlp = {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert {name for name in names if "lora" not in name} == {*mlp, "model.norm.weight"}
    assert not any("layers.0.mlp" in name for name in names - mlp)
    assert sum("lora_A" in name for name in names) == 11
