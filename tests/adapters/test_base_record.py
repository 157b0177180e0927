"""An adapter remembers how its base was quantized: in memory, in both kinds of files, and for the commands."""

from __future__ import annotations

import io
import json
import sys
import warnings

import numpy as np
import pytest
import tiny_models as tiny
from reference_llama_cpp import our_logprobs, their_logprobs
from support import need_oracle

import entrenar as en
from entrenar import LoraConfig, ModelConfig, no_grad
from entrenar.cli import main
from entrenar.errors import FormatError
from entrenar.formats import gguf_read, gguf_write
from entrenar.models.quantization import FILE, KEY, recorded
from entrenar.tokenizer import from_characters

IDS = np.arange(14).reshape(2, 7) % 29
ALL = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
TEXT = "the cat sat on the mat. the dog sat on the log. " * 20


def logits(model):
    with no_grad():
        return model(IDS).numpy().copy()


def trained(model):
    """With an adapter that changes something."""
    model.add_lora(ALL, seed=1)
    rng = np.random.default_rng(2)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.data[...] = 0.2 * rng.standard_normal(tensor.shape)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of letters in 16 bit and packed, and adapters trained on it in three ways."""
    folder = tmp_path_factory.mktemp("record")
    tokenizer = from_characters(TEXT)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                         initializer_range=0.3, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = en.CausalLM.from_config(config, seed=3, dtype="f32")
    model.tokenizer = tokenizer
    model.save(folder / "hf", dtype="f16")
    model.save(folder / "f16.gguf", dtype="f16")
    model.save(folder / "q4_0.gguf", quant="q4_0")
    for name, how in (("nf4", {"quant": "NF4"}), ("plain", {})):
        trained(en.load(folder / "hf", **how)).save_adapter(folder / name)
    trained(en.load(folder / "q4_0.gguf")).save_adapter(folder / "q4_0")
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_what_is_recorded(folder, tmp_path):
    assert json.loads((folder / "nf4" / FILE).read_text()) == {"types": {"nf4": 14}, "quant": "nf4"}
    assert json.loads((folder / "q4_0" / FILE).read_text()) == {"types": {"q4_0": 14}, "quant": None}
    assert not (folder / "plain" / FILE).exists()
    assert recorded(folder / "plain") is None
    trained(en.load(folder / "hf", quant="nf4")).save_adapter(tmp_path / "a.gguf")
    assert recorded(tmp_path / "a.gguf") == recorded(folder / "nf4")
    mixed = trained(en.CausalLM.from_config(ModelConfig(
        vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        max_position_embeddings=64), quant="q4_k_m"))  # fmt: skip
    assert mixed.adapters["default"].base.types == {"q4_k": 48, "q6_k": 8}
    assert str(mixed.quantization) == "quantized to q4_k_m"


@pytest.mark.parametrize("form", ["adapter", "adapter.gguf"])
def test_the_record_goes_with_the_adapter_and_a_stale_one_away(folder, tmp_path, form):
    model = en.load(folder / "hf", quant="nf4")
    model.load_adapter(folder / "nf4")
    model.save_adapter(tmp_path / form)
    assert recorded(tmp_path / form) == recorded(folder / "nf4")
    plain = en.load(folder / "hf")
    with pytest.warns(UserWarning, match="not quantized"):
        plain.load_adapter(tmp_path / form, trainable=True)  # what it learns from now on it learns here
    plain.save_adapter(tmp_path / form)
    assert recorded(tmp_path / form) is None


def test_a_model_that_is_quantized_otherwise_is_warned_of(folder):
    """No warning where it is as it was: warnings are errors here."""
    model = en.load(folder / "hf", quant="nf4")
    model.load_adapter(folder / "nf4")
    assert np.array_equal(logits(model), logits(trained(en.load(folder / "hf", quant="nf4"))))
    for how in ({}, {"dtype": "f32"}, {"stream": True}):  # expanded, and not in memory
        en.load(folder / "q4_0.gguf", **how).load_adapter(folder / "q4_0")
    en.load(folder / "q4_0.gguf").load_adapter(folder / "plain")
    for path, how, adapter, words in (
        ("hf", {}, "nf4", "a model quantized to nf4, and this one is not quantized.*quantize it to nf4 while"),
        ("hf", {"quant": "fp4"}, "nf4", "this one is quantized to fp4"),
        ("q4_0.gguf", {}, "nf4", "this one is quantized to q4_0.*load the 16-bit model instead, quantized to nf4"),
        ("f16.gguf", {}, "q4_0", "quantized to q4_0, and this one is not.*load the file"),
    ):
        with pytest.warns(UserWarning, match=words):
            en.load(folder / path, **how).load_adapter(folder / adapter)


def test_what_is_merged_is_no_quantized_base(folder, tmp_path):
    model = trained(en.load(folder / "hf", quant="nf4"))
    model.merge_adapter()
    trained(model).save_adapter(tmp_path / "second")
    assert recorded(tmp_path / "second") is None


@pytest.mark.parametrize(
    "text",
    ["[1]", "{}", "{", '{"types": {}}', '{"types": {"f16": 3}}', '{"types": {"nf9": 3}}', '{"types": {"nf4": "3"}}',
     '{"types": {"nf4": true}}', '{"types": {"nf4": 0}}', '{"types": {"nf4": 1}, "quant": "nf9"}',
     '{"types": {"nf4": 1}, "quant": ["nf4"]}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_record_is_a_typed_error(folder, tmp_path, text):
    model = en.load(folder / "hf")
    trained(en.load(folder / "hf")).save_adapter(tmp_path)
    (tmp_path / FILE).write_text(text)
    trained(en.load(folder / "hf")).save_adapter(tmp_path / "a.gguf")
    file = gguf_read.read(tmp_path / "a.gguf")
    tensors = [(name, np.array(file.array(name))) for name in file.tensors]
    gguf_write.write(tmp_path / "b.gguf", {**file.metadata, KEY: text}, tensors)
    for path in (tmp_path, tmp_path / "b.gguf"):
        with pytest.raises(FormatError):
            model.load_adapter(path)
        assert model.adapters == {}


# ---- the commands


def run(capsys, *words):
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def test_generate_eval_and_chat_load_the_base_as_recorded(folder, capsys, monkeypatch):
    """The same as entrenar.load with that quant; --quant none and another type as they say."""
    prompt = ["--prompt", "the cat", "--max-new-tokens", 24, "--temperature", 0]

    def expected(**how):
        model = en.load(folder / "hf", **how)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_adapter(folder / "nf4")
        return model

    want = expected(quant="nf4").generate("the cat", 24, temperature=0).text
    plain = expected().generate("the cat", 24, temperature=0).text
    assert want != plain
    words = ["generate", "--model", folder / "hf", "--adapter", folder / "nf4", *prompt]
    out, err = run(capsys, *words)
    assert out == want
    assert err.count("\n") == 1
    assert "as it was when the adapter was trained; --quant none leaves" in err
    assert run(capsys, *words, "--quant", "nf4") == (want, "")
    out, err = run(capsys, *words, "--quant", "none")
    assert out == plain
    assert "warning: " in err
    assert "this one is not quantized" in err
    out, err = run(capsys, *words, "--quant", "Q8_0")
    assert out == expected(quant="q8_0").generate("the cat", 24, temperature=0).text

    evaluate = ["eval", "--model", folder / "hf", "--data", folder / "text.txt", "--seq-len", 64, "--json"]
    nll = {how: json.loads(run(capsys, *evaluate, *flags)[0])["nll"] for how, flags in (
        ("auto", ["--adapter", folder / "nf4"]), ("nf4", ["--adapter", folder / "nf4", "--quant", "nf4"]),
        ("none", ["--adapter", folder / "nf4", "--quant", "none"]), ("no adapter", []), ("base", ["--quant", "nf4"]),
    )}  # fmt: skip
    assert nll["auto"] == nll["nf4"]
    assert len(set(nll.values())) == 4

    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    chat = ["chat", "--model", folder / "hf", "--adapter", folder / "nf4", "--max-new-tokens", 8]
    assert "is quantized to nf4 while it is loaded" in run(capsys, *chat)[1]


def test_a_quantized_file_stays_as_it_is(folder, capsys):
    words = ["generate", "--prompt", "the", "--max-new-tokens", 4, "--model"]
    assert run(capsys, *words, folder / "q4_0.gguf", "--adapter", folder / "q4_0")[1] == ""
    assert "this one is quantized to q4_0" in run(capsys, *words, folder / "q4_0.gguf", "--adapter", folder / "nf4")[1]
    assert "this one is not quantized" in run(capsys, *words, folder / "f16.gguf", "--adapter", folder / "q4_0")[1]


def test_finetune_records_the_base(folder, tmp_path, capsys):
    words = ["finetune", "--model", folder / "hf", "--data", folder / "text.txt", "--max-steps", 1, "--seq-len", 16]
    run(capsys, *words, "--quant", "NF4", "--out", tmp_path / "run")
    assert recorded(tmp_path / "run/adapter").quant == "nf4"


# ---- other programs


@pytest.mark.oracle
def test_peft_loads_the_directory_without_a_word(tmp_path):
    torch, transformers, peft = need_oracle("torch"), need_oracle("transformers"), need_oracle("peft")
    model = tiny.model()
    model.save(tmp_path / "base")
    packed = trained(en.load(tmp_path / "base", quant="nf4"))
    packed.save_adapter(tmp_path / "adapter")
    said = []
    for with_record in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
            theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        said.append(sorted(str(warning.message) for warning in caught))
        if with_record:
            (tmp_path / "adapter" / FILE).unlink()
    assert said[0] == said[1]
    with torch.no_grad():
        got = theirs(input_ids=torch.from_numpy(IDS)).logits.numpy()
    plain = en.load(tmp_path / "base")
    plain.load_adapter(tmp_path / "adapter")
    assert np.abs(got - logits(plain)).max() <= 2e-5 * np.abs(got).max()


@pytest.mark.oracle
def test_llama_cpp_loads_the_gguf_adapter(tmp_path, shared_data):
    base = shared_data / "models/stories260K-q8_0.gguf"
    model = en.load(base)
    model.compute = "f32"
    model.add_lora(ALL)
    for i, (name, tensor) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            tensor.data[...] = 0.02 * np.random.default_rng(i).standard_normal(tensor.shape)
    model.save_adapter(tmp_path / "a.gguf")
    assert recorded(tmp_path / "a.gguf").types == {"q8_0": 30}  # down_proj is 172 wide
    en.load(base, dtype="f32").save(tmp_path / "dense.gguf")  # for whose weights llama.cpp rounds no activations
    prompts = [[1, 403, 407, 261, 378]]
    theirs = their_logprobs(tmp_path / "dense.gguf", prompts, adapter=tmp_path / "a.gguf")
    assert np.abs(our_logprobs(model, prompts) - theirs).max() <= 1e-3
