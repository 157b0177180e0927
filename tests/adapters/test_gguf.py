"""GGUF adapters: written, read back, and laid out as llama.cpp has them."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import tiny_models as tiny

from entrenar import CausalLM, LoraConfig, ModelConfig, load, no_grad
from entrenar.errors import AdapterError, FormatError
from entrenar.formats import gguf_read, gguf_write, safetensors
from entrenar.quant import QTensor

IDS = np.arange(14).reshape(2, 7) % 29
ALL = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")


def logits(model):
    with no_grad():
        return model(IDS).numpy().copy()


def randomized(name, config):
    model = tiny.model(name, lora=config)
    rng = np.random.default_rng(9)
    for path, tensor in model.named_parameters():
        if "lora_B" in path or "lora_embedding_A" in path:
            tensor.data[...] = 0.2 * rng.standard_normal(tensor.shape)
    return model


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2", "phi3", "llama-biases"])
def test_it_comes_back_bit_for_bit(tmp_path, name):
    model = randomized(name, ALL)
    model.save_adapter(tmp_path / "a.gguf")
    fresh = tiny.model(name)
    fresh.load_adapter(tmp_path / "a.gguf", trainable=True)
    assert np.array_equal(logits(fresh), logits(model))
    assert dict(fresh.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert (fresh.adapter.r, fresh.adapter.lora_alpha) == (3, 5)


def test_what_the_file_says_and_where_rows_lie(tmp_path):
    """llama.cpp's llama turns neighbours, so rows of B of q and k move as rows of the weights do."""
    model = randomized("llama", ALL)
    model.save_adapter(tmp_path / "a.gguf")
    model.unload_adapter()
    model.save(tmp_path / "base.gguf")
    file, base = gguf_read.read(tmp_path / "a.gguf"), gguf_read.read(tmp_path / "base.gguf")
    keys = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    assert [file.metadata[k] for k in keys] == ["adapter", "llama", "lora", 5.0]
    assert file.metadata.type_name("adapter.lora.alpha") == "f32"
    model = randomized("llama", ALL)
    merged = {n: f.delta() for n, f in model.adapters["default"].factors.items()}
    model.merge_adapter()
    model.save(tmp_path / "merged.gguf")
    after = gguf_read.read(tmp_path / "merged.gguf")
    count = 0
    for name in base.tensors:
        if f"{name}.lora_a" in file.tensors:
            a, b = file.array(f"{name}.lora_a"), file.array(f"{name}.lora_b")
            assert np.allclose(base.array(name) + 5 / 3 * b @ a, after.array(name), atol=1e-6)
            count += 1
    assert count == len(merged) == 14


@pytest.mark.parametrize(
    ("config", "alpha"),
    [
        (LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear"), 12.0),
        (LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", rank_pattern={"o_proj": 2}), 6.0),
        (LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", alpha_pattern={"o_proj": 2}), 6.0),
        (LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "o_proj", "v_proj"],
                    rank_pattern={"o_proj": 9}), 12.0),
        (LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "embed_tokens", "lm_head"]), 8.0),
    ],
    ids=["rslora", "ranks", "alphas", "rslora-ranks", "embedding"],
)  # fmt: skip
def test_every_scale_is_kept(tmp_path, config, alpha):
    """One alpha for the file: what differs from it is folded into B."""
    model = randomized("llama", config)
    model.save_adapter(tmp_path / "a.gguf")
    file = gguf_read.read(tmp_path / "a.gguf")
    assert file.metadata["adapter.lora.alpha"] == pytest.approx(alpha)
    fresh = tiny.model("llama")
    fresh.load_adapter(tmp_path / "a.gguf")
    want = logits(model)
    assert np.abs(logits(fresh) - want).max() <= 1e-5 * np.abs(want).max()
    fresh.save_adapter(tmp_path / "peft")
    again = tiny.model("llama")
    again.load_adapter(tmp_path / "peft")
    assert np.array_equal(logits(again), logits(fresh))


def test_the_embedding_s_a_lies_by_token(tmp_path):
    model = randomized("llama", LoraConfig(r=2, target_modules=["embed_tokens"]))
    model.save_adapter(tmp_path / "a.gguf")
    model.save_adapter(tmp_path / "peft")
    file = gguf_read.read(tmp_path / "a.gguf")
    assert file.tensors["token_embd.weight.lora_a"].shape == (37, 2)
    assert file.tensors["token_embd.weight.lora_b"].shape == (24, 2)
    stored = safetensors.read(tmp_path / "peft/adapter_model.safetensors")
    a = stored["base_model.model.model.embed_tokens.lora_embedding_A"]
    assert np.array_equal(a, file.array("token_embd.weight.lora_a").T)


def test_what_llama_cpp_cannot_hold_is_refused_with_advice(tmp_path):
    cases = [
        ("llama", LoraConfig(use_dora=True), "DoRA.*merge"),
        ("llama", LoraConfig(modules_to_save=["model.norm"]), r"model\.norm\.weight is held whole.*merge"),
        ("qwen2", LoraConfig(target_modules=["lm_head"]), r"changes lm_head, .*tied.*merge"),
        ("llama-tied-wide-heads", LoraConfig(target_modules=["q_proj", "embed_tokens"]),
         r"changes model\.embed_tokens, .*tied.*merge"),
    ]  # fmt: skip
    for name, config, words in cases:
        with pytest.raises(AdapterError, match=words):
            tiny.model(name, lora=config).save_adapter(tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m, t: m.update({"general.architecture": "qwen2"}), AdapterError, "general.architecture is 'qwen2'"),
        (lambda m, t: m.update({"general.type": "model"}), AdapterError, "general.type is 'model'"),
        (lambda m, t: m.update({"adapter.type": "ia3"}), AdapterError, "adapter.type is 'ia3'"),
        (lambda m, t: m.update({"adapter.alora.invocation_tokens": [1]}), AdapterError, "activated LoRA"),
        (lambda m, t: m.pop("adapter.lora.alpha"), FormatError, "alpha.* is missing"),
        (lambda m, t: m.update({"adapter.lora.alpha": float("nan")}), FormatError, "alpha.* is nan"),
        (lambda m, t: m.update({"adapter.lora.alpha": -1.0}), FormatError, "alpha.* is -1"),
        (lambda m, t: t.pop("blk.0.attn_q.weight.lora_b"), FormatError, r"attn_q\.weight\.lora_b.* is missing"),
        (lambda m, t: t.update({"blk.9.attn_q.weight.lora_a": t["blk.0.attn_q.weight.lora_a"]}), AdapterError, "blk.9"),
        (lambda m, t: t.update({"blk.0.attn_q.weight": t["blk.0.attn_q.weight.lora_a"]}), AdapterError, "not a LoRA"),
        (lambda m, t: t.update({"blk.0.attn_q.weight.lora_a": np.zeros((3, 25), np.float32)}), AdapterError, "25"),
        (lambda m, t: t.update({"blk.0.attn_q.weight.lora_b": np.zeros((24, 4), np.float32)}), AdapterError, "24, 4"),
        (lambda m, t: t.update({"blk.0.attn_q.weight.lora_a": np.zeros(3, np.float32)}), AdapterError, "3,"),
        (lambda m, t: t.clear(), AdapterError, "holds no adapter"),
        (lambda m, t: t["blk.0.attn_q.weight.lora_b"].fill(np.nan), FormatError, r"attn_q\.weight\.lora_b.*NaN"),
    ],
)
def test_files_that_lie_are_typed_errors(tmp_path, change, error, words):
    model = tiny.model(lora=ALL)
    model.save_adapter(tmp_path / "a.gguf")
    file = gguf_read.read(tmp_path / "a.gguf")
    metadata, tensors = dict(file.metadata), {n: np.array(file.array(n)) for n in file.tensors}
    change(metadata, tensors)
    gguf_write.write(tmp_path / "bad.gguf", metadata, tensors.items())
    fresh = tiny.model()
    with pytest.raises(error, match=words):
        fresh.load_adapter(tmp_path / "bad.gguf")
    assert fresh.adapters == {}
    assert fresh.adapter is None


def test_an_alpha_of_zero_means_factors_as_they_are(tmp_path):
    model = randomized("llama", LoraConfig(r=3, lora_alpha=3, target_modules="all-linear", rank_pattern={"k_proj": 1},
                                           alpha_pattern={"k_proj": 1}))  # fmt: skip
    model.save_adapter(tmp_path / "a.gguf")
    file = gguf_read.read(tmp_path / "a.gguf")
    tensors = {n: np.array(file.array(n)) for n in file.tensors}
    for i in range(2):
        tensors[f"blk.{i}.attn_k.weight.lora_b"] *= 3  # it was folded for alpha 3 and rank 1
    gguf_write.write(tmp_path / "b.gguf", {**file.metadata, "adapter.lora.alpha": 0.0}, tensors.items())
    fresh = tiny.model()
    fresh.load_adapter(tmp_path / "b.gguf")
    want = logits(model)
    assert np.abs(logits(fresh) - want).max() <= 1e-5 * np.abs(want).max()


# ---- PEFT's directory ---------------------------------------------------------------------------------------------


def edited(directory, config=None, tensors=None):
    raw = json.loads((directory / "adapter_config.json").read_text())
    arrays = {n: np.array(a) for n, a in safetensors.read(directory / "adapter_model.safetensors").items()}
    for change, what in ((config, raw), (tensors, arrays)):
        if change:
            change(what)
    (directory / "adapter_config.json").write_text(json.dumps(raw))
    safetensors.write(directory / "adapter_model.safetensors", arrays)


def test_absent_rank_and_alpha_are_eight(tmp_path):
    model = randomized("llama", LoraConfig())
    model.save_adapter(tmp_path)
    edited(tmp_path, lambda c: [c.pop(k) for k in ("r", "lora_alpha", "rank_pattern", "use_rslora", "use_dora")])
    fresh = tiny.model()
    fresh.load_adapter(tmp_path)
    assert np.array_equal(logits(fresh), logits(model))


def test_fan_in_fan_out_speaks_of_the_base_alone(tmp_path):
    model = randomized("llama", ALL)
    model.save_adapter(tmp_path)
    edited(tmp_path, lambda c: c.update(fan_in_fan_out=True))
    fresh = tiny.model()
    fresh.load_adapter(tmp_path)
    assert np.array_equal(logits(fresh), logits(model))


@pytest.mark.parametrize(
    "settings",
    [{"layers_to_transform": [1]}, {"layers_to_transform": 1, "layers_pattern": "layers"},
     {"exclude_modules": ["layers.0.self_attn.q_proj"]}, {"exclude_modules": r"model\.layers\.0\..*"}],
)  # fmt: skip
def test_targets_that_reach_fewer_layers_are_saved_in_full(tmp_path, settings):
    """Files of such settings have fewer layers than the names of their targets reach."""
    model = randomized("llama", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_adapter(tmp_path)
    edited(tmp_path, lambda c: c.update(settings), lambda t: [t.pop(n) for n in list(t) if "layers.0" in n])
    fresh = tiny.model()
    fresh.load_adapter(tmp_path)
    assert list(fresh.adapters["default"].factors) == ["model.layers.1.self_attn.q_proj"]
    fresh.save_adapter(tmp_path / "again")
    raw = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert raw["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    again = tiny.model()
    again.load_adapter(tmp_path / "again")
    assert np.array_equal(logits(again), logits(fresh))


def test_a_pattern_that_could_take_forever_is_not_tried_while_loading(tmp_path):
    """On a path of forty letters it would outlast us all; nor is it later, in a plan or when saving."""
    model = randomized("llama", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_adapter(tmp_path)
    for settings in ({"target_modules": "(.?)*x"}, {"exclude_modules": "(a|.)*x"}):
        edited(tmp_path, lambda c, settings=settings: c.update(settings))
        fresh = tiny.model()
        with pytest.warns(UserWarning, match=next(iter(settings))):
            fresh.load_adapter(tmp_path, trainable=True)
        assert np.array_equal(logits(fresh), logits(model))
        assert fresh.adapter.target_modules == tuple(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))


def test_dora_s_magnitude_under_its_older_name(tmp_path):
    model = randomized("llama", LoraConfig(use_dora=True))
    model.save_adapter(tmp_path)
    old = ".lora_magnitude_vector"
    edited(tmp_path, tensors=lambda t: [t.update({f"{n}.weight": t.pop(n)}) for n in list(t) if n.endswith(old)])
    fresh = tiny.model()
    fresh.load_adapter(tmp_path)
    assert np.array_equal(logits(fresh), logits(model))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.norm.weight"


@pytest.mark.parametrize(
    ("config", "tensors", "error", "words"),
    [
        (lambda c: c.update(use_dora=True), None, FormatError, "lora_magnitude_vector.*missing"),
        (None, lambda t: t.update({f"{Q}.lora_magnitude_vector": np.zeros(24, np.float32)}),
         AdapterError, "call for no such tensor"),
        (None, lambda t: t.clear(), AdapterError, "holds no factors"),
        (lambda c: c.update(target_modules=""), None, AdapterError, "q_proj.*select no"),
        (None, lambda t: [t.pop(n) for n in list(t) if n.startswith(Q)], FormatError, r"0\.self_attn\.q_proj.*missing"),
        (lambda c: c.update(target_modules=["q_proj", "lm_head"]), None, AdapterError, "select no .*target_modules"),
        (lambda c: c.update(target_modules=None), None, AdapterError, r"k_proj.*select no"),
        (lambda c: c.update(target_modules=r".*q_proj"), None, AdapterError, r"k_proj.*select no"),
        (lambda c: c.update(exclude_modules=["k_proj"]), None, AdapterError, r"k_proj.*select no .*exclude_modules"),
        (lambda c: c.update(layers_to_transform=[1]), None, AdapterError, r"layers\.0.*select no .*layers_to"),
        (lambda c: c.update(modules_to_save=["mlp"]), None, AdapterError, r"mlp.*select no .*modules_to_save"),
        (lambda c: c.update(layers_to_transform=-1), None, FormatError, "layers_to_transform"),
        (lambda c: c.update(layers_to_transform=[True]), None, FormatError, "layers_to_transform"),
        (lambda c: c.update(layers_to_transform=[0], target_modules=".*"), None, FormatError, "layers_to_transform"),
        (lambda c: c.update(exclude_modules="("), None, FormatError, "exclude_modules"),
        (lambda c: c.update(exclude_modules=3), None, FormatError, "exclude_modules"),
        (lambda c: c.update(layers_pattern="h"), None, AdapterError, "layers_pattern"),
        (None, lambda t: t[f"{Q}.lora_B.weight"].fill(np.inf), FormatError, r"q_proj\.lora_B.*infinit"),
        (None, lambda t: t[f"{Q}.lora_A.weight"][1:].fill(np.nan), FormatError, r"q_proj\.lora_A.*NaN"),
        (None, lambda t: t.update({f"{Q}.lora_A.weight": np.full((3, 24), 1e39)}), FormatError, r"q_proj\.lora_A.*inf"),
        (None, lambda t: t.update({f"{Q}.lora_A.weight": np.ones((3, 24), np.int64)}), FormatError, "lora_A.*int64"),
        (None, lambda t: t.update({f"{Q}.lora_B.weight": np.ones((24, 3), bool)}), FormatError, "lora_B.*bool"),
        (None, lambda t: t.update({NORM: np.ones(24, np.int8)}), FormatError, r"norm\.weight.*int8"),
        (None, lambda t: t.update({NORM: np.full(24, np.nan, np.float32)}), FormatError, r"norm\.weight.*NaN"),
        (lambda c: c.update(modules_to_save=["score"]), None, AdapterError, "modules_to_save.*'score'"),
        (lambda c: c.update(modules_to_save=["lm_head"]), None, FormatError, r"lm_head\.weight.*missing"),
        (None, lambda t: t.update({"base_model.model.lm_head.weight": np.zeros((38, 24), np.float32)}),
         AdapterError, r"\(38, 24\), the model's is \(37, 24\)"),
        (None, lambda t: t.update({"base_model.model.lm_head.lora_B.default": np.zeros(3, np.float32)}),
         AdapterError, "not a LoRA factor"),
        (None, lambda t: t.update({"base_model.model.model.norm.lora_A.weight": np.zeros((3, 24), np.float32)}),
         AdapterError, "no linear layer"),
        (None, lambda t: t.update({"base_model.model.model.norm.bias": np.zeros(24, np.float32)}),
         AdapterError, "no weight"),
        (lambda c: c.update(trainable_token_indices=[1]), None, AdapterError, "trainable_token_indices"),
        (lambda c: c.update(ensure_weight_tying=True), None, AdapterError, "ensure_weight_tying"),
        (lambda c: c.update(lora_bias=True), None, AdapterError, "lora_bias"),
    ],
)  # fmt: skip
def test_peft_files_that_lie_or_ask_for_more_are_typed_errors(tmp_path, config, tensors, error, words):
    tiny.model(lora=ALL).save_adapter(tmp_path)
    edited(tmp_path, config, tensors)
    model = tiny.model()
    with pytest.raises(error, match=words):
        model.load_adapter(tmp_path)
    assert model.adapters == {}


@pytest.mark.parametrize("kind", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_factors_of_every_floating_type_load(tmp_path, kind):
    model = randomized("llama", ALL)
    for _, tensor in model.named_parameters():
        tensor.data[...] = tensor.data.astype(ml_dtypes.bfloat16)
    model.save_adapter(tmp_path)
    edited(tmp_path, tensors=lambda t: t.update({name: array.astype(kind) for name, array in t.items()}))
    fresh = tiny.model()
    fresh.load_adapter(tmp_path)
    assert np.abs(logits(fresh) - logits(model)).max() <= (1e-2 if kind == np.float16 else 0)


def test_whole_modules_of_a_packed_base_must_be_in_the_file(tmp_path):
    config = ModelConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    CausalLM.from_config(config, seed=3, dtype="f32").save(tmp_path / "base.gguf", quant="q8_0")
    packed = load(tmp_path / "base.gguf")
    assert all(isinstance(m.weight, QTensor) for m in (packed.lm_head, packed.model.layers[0].mlp.up_proj))
    packed.add_lora(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"]))
    packed.save_adapter(tmp_path / "a")
    for name in ("lm_head", "model.layers.0.mlp.up_proj"):
        packed.save_adapter(tmp_path / "a")
        edited(tmp_path / "a", tensors=lambda t, name=name: t.pop(f"base_model.model.{name}.weight"))
        with pytest.raises(FormatError, match=rf"{name}\.weight: is missing"):
            load(tmp_path / "base.gguf").load_adapter(tmp_path / "a")


@pytest.mark.parametrize("name", ["llama", "llama-tied-wide-heads"])
def test_whole_modules_that_equal_the_base_go_on_training(tmp_path, name):
    """Saved before the first step, say: they come back trainable as the others do."""
    model = tiny.model(name)
    model.add_lora(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]))
    model.save_adapter(tmp_path)
    fresh = tiny.model(name)
    fresh.load_adapter(tmp_path, trainable=True)
    names = [n for n, _ in fresh.named_parameters()]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert {"lm_head.weight", "model.norm.weight"} < set(names)
