"""Merging where head and embedding are one weight: each becomes its own when an adapter changes one of the two."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_models as tiny
from reference_llama_cpp import our_logprobs, their_logprobs
from support import need_oracle

import entrenar as en
from entrenar import LoraConfig, no_grad
from entrenar.cli import main
from entrenar.formats import gguf_read

IDS = np.arange(14).reshape(2, 7) % 29
SIDES = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole both": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "a side each": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
}
TIED = ["llama-tied-wide-heads", "qwen2"]


def logits(model, ids=IDS):
    with no_grad():
        return model(ids).numpy().copy()


def adapted(model, side):
    """With an adapter of which everything is far from what it began as."""
    model.add_lora(LoraConfig(r=3, lora_alpha=5, **SIDES[side]), seed=1)
    rng = np.random.default_rng(2)
    for name, tensor in model.named_parameters():
        if "lora_A" not in name and "embedding_B" not in name:
            tensor.data[...] += 0.2 * rng.standard_normal(tensor.shape)
            tensor.version += 1
    return model


def own_head(config):
    return config.replace(tie_word_embeddings=False)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", TIED)
def test_merging_in_memory_keeps_the_logits(name, side):
    base = logits(tiny.model(name))
    model = adapted(tiny.model(name), side)
    embedding, want = model.model.embed_tokens, logits(model)
    assert np.abs(want - base).max() > 0.1
    model.merge_adapter()
    assert np.abs(logits(model) - want).max() <= 1e-5 * np.abs(want).max()
    assert model.config == own_head(tiny.CONFIGS[name])
    assert model.lm_head.weight is not embedding.weight
    assert not np.shares_memory(model.lm_head.weight.data, embedding.weight.data)
    tied = tiny.model(name).model.embed_tokens.weight.data
    for weight, sides in ((model.lm_head.weight, ("head", "both", "dora", "whole head", "whole both", "a side each")),
                          (embedding.weight, ("embedding", "both", "whole embedding", "whole both", "a side each"))):
        assert np.array_equal(weight.data, tied) == (side not in sides)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("form", ["m.gguf", "hf"])
def test_merging_on_the_way_to_a_file_does_and_leaves_the_model_tied(tmp_path, side, form):
    name = "qwen2"
    model = adapted(tiny.model(name), side)
    want = logits(model)
    model.save(tmp_path / form, merge=True)
    assert model.config == tiny.CONFIGS[name]
    assert np.array_equal(logits(model), want)
    loaded = en.load(tmp_path / form)
    assert not loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert np.abs(logits(loaded) - want).max() <= 1e-5 * np.abs(want).max()
    model.merge_adapter()
    model.save(tmp_path / "again" if form == "hf" else tmp_path / "again.gguf")  # what was merged in memory, too
    again = dict(en.load(tmp_path / ("again" if form == "hf" else "again.gguf")).named_weights())
    for weight, tensor in loaded.named_weights():
        assert np.array_equal(tensor.data, again[weight].data), weight


@pytest.mark.parametrize("side", SIDES)
def test_of_a_packed_model_the_changed_side_alone_is_expanded(tmp_path, side):
    config = tiny.CONFIGS["qwen2"].replace(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                                           intermediate_size=64)  # fmt: skip
    en.CausalLM.from_config(config.replace(initializer_range=0.2), seed=3, dtype="f32").save(
        tmp_path / "q.gguf", quant="q8_0")  # fmt: skip
    packed = en.load(tmp_path / "q.gguf")
    assert packed.lm_head.weight.qtype.name == "q8_0"
    packed.compute = "f32"
    model = adapted(packed, side)
    want = logits(model)
    model.save(tmp_path / "m.gguf", merge=True)
    found = {name: info.qtype.name for name, info in gguf_read.read(tmp_path / "m.gguf").tensors.items()}
    changed = {"lm_head": "output.weight", "model.embed_tokens": "token_embd.weight"}
    adapter = model.adapters["default"]
    for path, name in changed.items():
        kind = "f16" if path in adapter.factors else "f32" if f"{path}.weight" in adapter.saved else "q8_0"
        assert found[name] == kind
    loaded = en.load(tmp_path / "m.gguf")
    loaded.compute = "f32"
    model.merge_adapter()
    for merged in (loaded, model):
        assert np.abs(logits(merged) - want).max() <= 3e-3 * np.abs(want).max()


def test_nothing_is_parted_where_neither_changes(tmp_path):
    model = tiny.model("qwen2", lora=LoraConfig(r=2, target_modules=["q_proj"]))
    model.save(tmp_path / "m.gguf", merge=True)
    model.merge_adapter()
    model.save(tmp_path / "n.gguf")
    for path in ("m.gguf", "n.gguf"):
        assert "output.weight" not in gguf_read.read(tmp_path / path).tensors
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_was_merged_can_be_taken_out_again():
    model = adapted(tiny.model("qwen2"), "both")
    want, config = logits(model), model.adapter
    factors = model.merge_adapter()
    model.unmerge_adapter(config, factors)
    assert np.abs(logits(model) - want).max() <= 1e-5 * np.abs(want).max()
    model.unload_adapter()
    assert np.abs(logits(model) - logits(tiny.model("qwen2"))).max() <= 1e-5 * np.abs(want).max()


def test_the_command_reports_the_head(tmp_path, capsys):
    tiny.model("qwen2").save(tmp_path / "m.gguf")
    model = adapted(en.load(tmp_path / "m.gguf"), "head")
    model.save_adapter(tmp_path / "adapter")
    words = ["merge", "--model", tmp_path / "m.gguf", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out.gguf"]
    assert main([*map(str, words), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [line["layer"] for line in report["layers"]][-1] == "lm_head"
    want = logits(model)
    assert np.abs(logits(en.load(tmp_path / "out.gguf")) - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("side", ["both", "whole head"])
def test_transformers_computes_the_same(tmp_path, name, side):
    torch, transformers = need_oracle("torch"), need_oracle("transformers")
    model = adapted(tiny.model(name), side)
    model.save(tmp_path, merge=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not theirs.config.tie_word_embeddings
    with torch.no_grad():
        got = theirs(input_ids=torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(got - logits(model)).max() <= 2e-5 * np.abs(got).max()


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("side", ["both", "whole embedding"])
def test_llama_cpp_computes_the_same(tmp_path, shared_data, model_type, side):
    config = tiny.CONFIGS["qwen2"].replace(model_type=model_type, vocab_size=512, max_position_embeddings=128,
                                           initializer_range=0.2)  # fmt: skip
    model = adapted(en.CausalLM.from_config(config, seed=3, dtype="f32"), side)
    model.tokenizer = en.load(shared_data / "models/stories260K.gguf").tokenizer
    prompts = [[1, 403, 407, 261, 378], [1, 350, 270]]
    want = our_logprobs(model, prompts)
    model.save(tmp_path / "m.gguf", merge=True)
    theirs = their_logprobs(tmp_path / "m.gguf", prompts)
    assert np.abs(theirs - want).max() <= 1e-3
    with model.disable_adapter():
        assert np.abs(theirs - our_logprobs(model, prompts)).max() > 0.1
