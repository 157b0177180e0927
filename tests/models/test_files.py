"""Models as files: every shape saved and loaded in both formats comes back bit for bit; what is wrong is typed."""

import json

import numpy as np
import pytest
import tiny_models as tiny

import entrenar
from entrenar import LoraConfig, no_grad
from entrenar.errors import AdapterError, ConfigError, FormatError, MemoryLimitError, UnsupportedError
from entrenar.formats import gguf_read, gguf_write, safetensors
from entrenar.models import memory

NAMES = list(tiny.CONFIGS)
IDS = np.array([[1, 5, 2, 9, 30, 4, 4, 7]])
LORA = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")


def saved_names(name):
    """GGUF's llama has no attention window."""
    return [".gguf", ""] if name != "mistral-window" else [""]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_save_and_load_is_the_identity(tmp_path, name, dtype):
    model = tiny.model(name)
    for suffix in saved_names(name):
        path = tmp_path / f"model{suffix}"
        model.save(path, dtype=dtype)
        back = entrenar.load(path)
        assert {k: v.dtype for k, v in tiny.arrays(back).items() if v.ndim == 2}.keys() >= {"model.embed_tokens.weight"}
        for key, array in tiny.arrays(model).items():
            want = array if array.ndim == 1 else array.astype(entrenar.models.dtype.DTYPES[dtype])
            assert np.array_equal(tiny.arrays(back)[key], want)
            assert tiny.arrays(back)[key].dtype == want.dtype
        again = tmp_path / f"again{suffix}"
        back.save(again)
        third = entrenar.load(again)
        assert third.config == back.config
        for key, array in tiny.arrays(back).items():
            assert np.array_equal(tiny.arrays(third)[key], array)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "llama-biases", "llama-tied-wide-heads"])
def test_both_formats_compute_the_same_bits(tmp_path, name):
    model = tiny.model(name)
    model.save(tmp_path / "m.gguf")
    model.save(tmp_path / "dir")
    with no_grad():
        want = model(IDS).numpy()
        assert np.array_equal(entrenar.load(tmp_path / "m.gguf")(IDS).numpy(), want)
        assert np.array_equal(entrenar.load(tmp_path / "dir")(IDS).numpy(), want)


def test_only_a_model_in_f32_is_trainable_as_a_whole(tmp_path):
    tiny.model().save(tmp_path / "m.gguf", dtype="bf16")
    assert entrenar.load(tmp_path / "m.gguf").parameters() == []
    whole = entrenar.load(tmp_path / "m.gguf", dtype="f32")
    assert entrenar.count_parameters(whole) == whole.config.num_parameters()
    assert entrenar.count_parameters(whole) == entrenar.count_parameters(whole.config)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192}, {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64}])  # fmt: skip
def test_rope_scaling_survives_both_formats(tmp_path, scaling):
    config = tiny.CONFIGS["llama"].replace(rope_scaling=scaling, head_dim=32)
    model = entrenar.CausalLM.from_config(config)
    for path in (tmp_path / "m.gguf", tmp_path / "dir"):
        model.save(path)
        back = entrenar.load(path).config.rope_scaling
        assert (None if back is None else dict(back)) == scaling


def test_a_window_that_gguf_can_not_say_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="sliding_window"):
        tiny.model("mistral-window").save(tmp_path / "m.gguf")
    slides = entrenar.CausalLM.from_config(tiny.CONFIGS["qwen2"].replace(sliding_window=5))
    with pytest.raises(ConfigError, match="sliding_window"):
        slides.save(tmp_path / "m.gguf")


# ---- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "phi3", "llama-tied-wide-heads"])
@pytest.mark.parametrize(
    "config",
    [
        LORA,
        LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["o_proj", "down_proj"]),
        LoraConfig(
            r=4, target_modules=r".*layers\.1\..*_proj", rank_pattern={"down_proj": 2}, alpha_pattern={"o_proj": 1}
        ),
    ],
    ids=["all-linear", "rslora-list", "pattern"],
)
def test_an_adapter_comes_back_bit_for_bit(tmp_path, name, config):
    model = tiny.model(name, lora=config)
    model.save_adapter(tmp_path / "adapter")
    fresh = tiny.model(name)
    fresh.load_adapter(tmp_path / "adapter", trainable=True)
    with no_grad():
        assert np.array_equal(fresh(IDS).numpy(), model(IDS).numpy())
    assert dict(fresh.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_merging_equals_the_adapter_and_unmerging_the_base():
    model = tiny.model(lora=LORA)
    config = model.adapter
    with no_grad():
        with_adapter = model(IDS).numpy()
        factors = model.merge_adapter()
        merged = model(IDS).numpy()
        assert model.adapter is None
        assert np.abs(merged - with_adapter).max() <= 1e-5 * np.abs(with_adapter).max()
        model.unmerge_adapter(config, factors)
        assert np.abs(model(IDS).numpy() - with_adapter).max() <= 1e-5 * np.abs(with_adapter).max()
        model.unload_adapter()
        base = tiny.model()(IDS).numpy()
        assert np.abs(model(IDS).numpy() - base).max() <= 1e-5 * np.abs(base).max()


@pytest.mark.parametrize(
    ("targets", "count"),
    [(None, 4), ("all-linear", 14), (["q_proj"], 2), (["layers.0.mlp.up_proj", "lm_head"], 2), (r".*\.1\.mlp\..*", 3)],
)
def test_target_modules_select_as_peft_does(targets, count):
    model = tiny.model(lora=LoraConfig(r=1, target_modules=targets))
    assert sum(linear.lora is not None for _, linear in model.linears()) == count


def test_targets_that_do_not_exist_name_what_does():
    for targets in (["w_proj"], ["q_proj", "w_proj"], r"nothing"):
        with pytest.raises(AdapterError, match="q_proj"):
            tiny.model(lora=LoraConfig(target_modules=targets))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"r": 0}, "r"), ({"r": 513}, "r"), ({"r": 2.0}, "r"), ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"), ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"target_modules": []}, "target_modules"), ({"target_modules": "("}, "target_modules"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj"), ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {3: 4}}, "alpha_pattern"), ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern.q_proj"),
        ({"lora_alpha": 10**400}, "lora_alpha"), ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": "8"}, "lora_alpha"), ({"lora_dropout": "0"}, "lora_dropout"),
        ({"lora_dropout": float("nan")}, "lora_dropout"), ({"use_rslora": "no"}, "use_rslora"),
        ({"target_modules": 5}, "target_modules"), ({"target_modules": ["q_proj", 5]}, "target_modules"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"), ({"target_modules": [""]}, "target_modules"),
    ],
)  # fmt: skip
def test_impossible_adapter_settings_name_the_field(changes, field):
    with pytest.raises(ConfigError) as error:
        LoraConfig(**changes)
    assert error.value.field == field


def test_rank_one_and_512_work():
    for rank in (1, 512):
        model = tiny.model(lora=LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
        model.loss(IDS).backward()
        assert all(np.isfinite(p.grad.numpy()).all() for p in model.parameters())


def test_adapters_of_another_kind_or_model_are_refused(tmp_path):
    tiny.model(lora=LORA).save_adapter(tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    with pytest.raises(AdapterError, match="shape"):
        tiny.model("llama-biases").load_adapter(tmp_path)
    with pytest.raises(AdapterError, match="no linear layer"):
        tiny.model("phi3").load_adapter(tmp_path)
    for key, value in [("peft_type", "IA3"), ("bias", "all"), ("layer_replication", [[0, 1]]),
                       ("target_parameters", ["x"]), ("init_lora_weights", "pissa"),
                       ("alora_invocation_tokens", [5])]:  # fmt: skip
        (tmp_path / "adapter_config.json").write_text(json.dumps({**raw, key: value}))
        with pytest.raises(AdapterError, match=key):
            tiny.model().load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FormatError):
        tiny.model().load_adapter(tmp_path)


def test_a_copy_of_the_head_beside_its_adapter_is_read_past(tmp_path):
    """PEFT saves the base's head along where the head has an adapter."""
    model = tiny.model(lora=LoraConfig(r=3, target_modules=["lm_head"]))
    model.save_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    factors = {name: np.array(array) for name, array in safetensors.read(file).items()}
    key, head = "base_model.model.lm_head.base_layer.weight", model.lm_head.weight.data
    back = tiny.model()
    safetensors.write(file, {**factors, key: head})
    back.load_adapter(tmp_path)
    with no_grad():
        assert np.array_equal(back(IDS).numpy(), model(IDS).numpy())
    safetensors.write(file, {**factors, key: head + 1})
    with pytest.raises(AdapterError, match="base_layer"):
        tiny.model().load_adapter(tmp_path)


@pytest.mark.parametrize(("rslora", "factor"), [(False, 2.0), (True, 4.0)])
def test_an_adapter_counts_alpha_over_the_rank_or_over_its_root(rslora, factor):
    """Rank 4, alpha 8: 8/4 and 8/√4, against the merged weights in float64."""
    lora = LoraConfig(r=4, lora_alpha=8, use_rslora=rslora, target_modules=["o_proj"])
    model = tiny.model(lora=lora)
    layer = model.model.layers[0].self_attn.o_proj
    before = layer.weight.data.astype(np.float64)
    factors = model.merge_adapter()["model.layers.0.self_attn.o_proj"]
    change = factor * factors.b.data.astype(np.float64) @ factors.a.data.astype(np.float64)
    assert np.abs(change).max() > 1e-3
    assert np.allclose(layer.weight.data - before, change, rtol=0, atol=1e-6)


def test_a_directory_without_a_config_says_which_file_in_it_may_be_meant(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match=r"no config\.json; did you mean .*a\.gguf\?"):
        entrenar.load(tmp_path)


def test_an_adapter_must_be_off_before_another_or_a_save(tmp_path):
    model = tiny.model(lora=LORA)
    with pytest.raises(AdapterError):
        model.add_lora(LORA)
    with pytest.raises(AdapterError, match="merge_adapter"):
        model.save(tmp_path / "m")
    with pytest.raises(AdapterError):
        tiny.model().merge_adapter()


# ---- files that are wrong -----------------------------------------------------------------------------------------


def rewritten(source, target, metadata=lambda m: m, tensors=lambda t: t):
    file = gguf_read.read(source)
    arrays = {name: file.array(name) for name in file.tensors}
    gguf_write.write(target, metadata(dict(file.metadata)), tensors(arrays).items())
    return target


@pytest.mark.parametrize(
    ("metadata", "error", "where"),
    [
        ({"general.architecture": "mamba"}, UnsupportedError, "mamba"),
        ({"llama.block_count": 0}, FormatError, "block_count"),
        ({"llama.attention.head_count": 5}, FormatError, "attn_q|head_count"),
        ({"llama.embedding_length": 10**12}, FormatError, "embedding_length"),
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedError, "scaling"),
        ({"llama.expert_count": 8}, UnsupportedError, "expert"),
        ({"llama.embedding_length": "wide"}, FormatError, "embedding_length"),
    ],
)
def test_a_gguf_header_that_lies_is_a_typed_error(tmp_path, metadata, error, where):
    tiny.model().save(tmp_path / "m.gguf")
    bad = rewritten(tmp_path / "m.gguf", tmp_path / "bad.gguf", metadata=lambda m: {**m, **metadata})
    with pytest.raises(error, match=where):
        entrenar.load(bad)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    tiny.model().save(tmp_path / "m.gguf")
    name = "blk.1.ffn_gate.weight"
    cases = [
        (lambda t: {k: v for k, v in t.items() if k != name}, FormatError),
        (lambda t: {**t, name: t[name][:-1]}, FormatError),
        (lambda t: {**t, "blk.0.attn_q_norm.weight": t[name]}, UnsupportedError),
    ]
    for change, error in cases:
        bad = rewritten(tmp_path / "m.gguf", tmp_path / "bad.gguf", tensors=change)
        with pytest.raises(error, match=r"ffn_gate|attn_q_norm"):
            entrenar.load(bad)


@pytest.mark.parametrize(
    ("changes", "error", "where"),
    [
        ({"model_type": "gemma"}, UnsupportedError, "model_type"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act"),
        ({"final_logit_softcapping": 30.0}, UnsupportedError, "softcapping"),
        ({"quantization_config": {"bits": 4}}, UnsupportedError, "quantization_config"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedError, "dynamic"),
        ({"hidden_size": None}, FormatError, "hidden_size"),
        ({"vocab_size": 10**12}, FormatError, "vocab_size"),
        ({"num_hidden_layers": "two"}, FormatError, "num_hidden_layers"),
    ],
)
def test_a_config_json_that_asks_for_the_unserved_names_the_key(tmp_path, changes, error, where):
    tiny.model().save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | changes
    raw = {k: v for k, v in raw.items() if v is not None or k != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(error, match=where):
        entrenar.load(tmp_path)


def test_an_unknown_config_key_is_a_warning(tmp_path):
    tiny.model().save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "flavour": "lemon"}))
    with pytest.warns(UserWarning, match="flavour"):
        entrenar.load(tmp_path)


def test_transformers_4_spelling_of_rope_is_read(tmp_path):
    tiny.model().save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 777.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = entrenar.load(tmp_path).config
    assert config.rope_theta == 777.0
    assert dict(config.rope_scaling) == {"type": "linear", "factor": 2.0}


def test_a_file_that_cannot_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    tiny.model().save(tmp_path / "m.gguf")
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    with pytest.raises(MemoryLimitError, match=r"0\.04 MB for its weights alone and 0\.00 MB are available"):
        entrenar.load(tmp_path / "m.gguf")


def test_nothing_there_is_a_format_error(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        entrenar.load(tmp_path / "absent.gguf")


def test_hugging_face_file_names_are_the_ecosystems(tmp_path):
    tiny.model().save(tmp_path)
    assert set(safetensors.read(tmp_path)) == set(tiny.CONFIGS["llama"].parameter_shapes())
