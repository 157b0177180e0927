"""Quantized GGUF files, and merging adapters into them: what is stored, what stays, what the report says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from reference_llama_cpp import our_logprobs, their_logprobs

import entrenar as en
from entrenar import LoraConfig, ModelConfig, no_grad
from entrenar.cli import main
from entrenar.errors import AdapterError, ConfigError
from entrenar.formats import gguf_read
from entrenar.models.merge import LayerError, MergeReport
from entrenar.quant import quantize

SIZES = {"vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 128}  # fmt: skip
WIDE = ModelConfig(hidden_size=256, intermediate_size=512, **SIZES)
NARROW = ModelConfig(hidden_size=64, intermediate_size=96, **SIZES)
ODD = ModelConfig(hidden_size=72, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)


def wide(config=WIDE, dtype="f32"):
    model = en.CausalLM.from_config(config, seed=3, dtype=dtype)
    for i, (_, weight) in enumerate(model.named_weights()):
        if weight.ndim == 2:
            weight.data[...] = np.random.default_rng(i).standard_normal(weight.shape) / np.sqrt(weight.shape[1])
    return model


def with_lora(model, size=0.02, **more):
    model.add_lora(LoraConfig(r=4, lora_alpha=8, **{"target_modules": "all-linear", **more}))
    rng = np.random.default_rng(5)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.data[...] = size * rng.standard_normal(tensor.shape)
    return model


def types(path):
    return {name: info.qtype.name for name, info in gguf_read.read(path).tensors.items()}


@pytest.mark.parametrize(
    ("config", "quant", "layers", "outer", "number"),
    [(WIDE, "q4_k", "q4_k", "q6_k", 14), (WIDE, "q8_0", "q8_0", "q8_0", 7), (WIDE, "q4_0", "q4_0", "q6_k", 2),
     (NARROW, "q4_k", "q5_0", "q8_0", 8), (NARROW, "q6_k", "q8_0", "q8_0", 7), (ODD, "q4_k", None, "f16", None)],
)  # fmt: skip
def test_types_are_those_that_fit(tmp_path, config, quant, layers, outer, number):
    wide(config).save(tmp_path / "m.gguf", quant=quant)
    found = types(tmp_path / "m.gguf")
    assert {found["token_embd.weight"], found["output.weight"]} == {outer}
    assert {kind for name, kind in found.items() if "norm" in name} == {"f32"}
    metadata = gguf_read.read(tmp_path / "m.gguf").metadata
    assert metadata["general.quantization_version"] == 2
    if layers is not None:
        assert {kind for name, kind in found.items() if name.startswith("blk") and "norm" not in name} == {layers}
        assert metadata["general.file_type"] == number
    else:  # 72 is no multiple of 32, 96 is
        assert found["blk.0.attn_q.weight"] == "f16"
        assert found["blk.0.ffn_down.weight"] == "q5_0"


@pytest.mark.parametrize("quant", ["q4_k", "q8_0", "iq4_nl"])
def test_a_packed_model_saved_again_has_the_same_bytes(tmp_path, quant):
    model = wide()
    model.save(tmp_path / "a.gguf", quant=quant)
    again = en.load(tmp_path / "a.gguf")
    again.save(tmp_path / "b.gguf")
    first, second = gguf_read.read(tmp_path / "a.gguf"), gguf_read.read(tmp_path / "b.gguf")
    assert types(tmp_path / "a.gguf") == types(tmp_path / "b.gguf")
    for name in first.tensors:
        assert np.array_equal(first.raw(name), second.raw(name)), name
    want = quantize(model.model.layers[0].mlp.down_proj.weight.data, quant).bytes
    assert np.array_equal(first.raw("blk.0.ffn_down.weight"), want)


def test_real_packed_files_come_back(tmp_path, shared_data):
    for kind in ("q8_0", "q4_0"):
        source = shared_data / f"models/stories260K-{kind}.gguf"
        en.load(source).save(tmp_path / f"{kind}.gguf")
        first, second = gguf_read.read(source), gguf_read.read(tmp_path / f"{kind}.gguf")
        for name in first.tensors:
            assert np.array_equal(first.raw(name), second.raw(name)), name


def test_merging_on_the_way_stores_the_quantized_sum_and_leaves_the_model(tmp_path):
    model = with_lora(wide())
    path = "model.layers.1.mlp.gate_proj"
    factors, own = model.adapters["default"].factors[path], dict(model.named_weights())[f"{path}.weight"].data.copy()
    told = {}
    model.save(tmp_path / "m.gguf", quant="q4_k", merge=True, written=lambda *told_: told.update({told_[0]: told_[1:]}))
    merged = own + np.float32(2) * (factors.b.data @ factors.a.data)
    stored = gguf_read.read(tmp_path / "m.gguf").array("blk.1.ffn_gate.weight").astype(np.float32)
    assert np.abs(stored - merged).max() <= 0.02 * np.abs(merged).max() + 0.02
    assert np.allclose(told[path][0], merged, atol=1e-6)
    assert np.allclose(told[path][1], stored, atol=2e-3)
    assert len(told) == 14
    assert model.active_adapters == ["default"]
    assert np.array_equal(dict(model.named_weights())[f"{path}.weight"].data, own)
    model.save(tmp_path / "whole", merge=True)
    with no_grad():
        got, want = en.load(tmp_path / "whole")([[1, 2, 3]]).numpy(), model([[1, 2, 3]]).numpy()
    assert np.abs(got - want).max() <= 1e-4


def test_the_report_is_the_float64_ratio_and_advises(tmp_path):
    wide().save(tmp_path / "base.gguf")
    wide().save(tmp_path / "q.gguf", quant="q4_k")
    for size, better in ((3e-4, "dequantized"), (0.2, "16bit")):
        packed, base = en.load(tmp_path / "q.gguf"), en.load(tmp_path / "base.gguf")
        with_lora(packed, size)
        report = MergeReport(packed, base, "dequantized")
        packed.save(tmp_path / "m.gguf", quant="q4_k", merge=True, written=report)
        assert len(report.layers) == 14
        line = next(layer for layer in report.layers if layer.layer.endswith("0.mlp.down_proj"))
        f = packed.adapters["default"].factors[line.layer]
        change = 2 * f.b.data.astype(np.float64) @ f.a.data
        own = packed.model.layers[0].mlp.down_proj.weight.dense().astype(np.float64)
        w16 = base.model.layers[0].mlp.down_proj.weight.data.astype(np.float64)
        stored = quantize((own + change).astype(np.float32), "q4_k").dense().astype(np.float64)
        norm = np.linalg.norm(change)
        assert line.change == pytest.approx(norm, rel=1e-2)
        assert line.written == pytest.approx(np.linalg.norm(stored - own - change) / norm, rel=2e-2)
        assert line.base == pytest.approx(np.linalg.norm(w16 - own) / norm, rel=1e-2)
        assert report.advice().startswith(f"--into {better}")
        assert ("keep the adapter apart" in report.advice()) == (report.median("written") >= 1)


def test_a_report_without_another_base_says_so():
    report = MergeReport(None, None, "dequantized", [LayerError("x", 1.0, 0.1, None)])
    assert "--base" in report.advice()
    assert "layer" in report.table()


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = wide(NARROW)
    with pytest.raises(ConfigError, match=r"quant.*\.gguf"):
        model.save(tmp_path / "d", quant="q4_k")
    for name in ("nf4", "q9", "f16"):
        with pytest.raises(ConfigError, match="quant"):
            model.save(tmp_path / "m.gguf", quant=name)
    with pytest.raises(AdapterError, match="no adapter"):
        model.save(tmp_path / "m.gguf", merge=True)
    assert not (tmp_path / "m.gguf").exists()


def test_the_commands(tmp_path, capsys):
    wide(NARROW).save(tmp_path / "base.gguf")
    assert main(["quantize", "--model", str(tmp_path / "base.gguf"), "--out", str(tmp_path / "q.gguf"),
                 "--quant", "q4_0", "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["bytes"] == (tmp_path / "q.gguf").stat().st_size
    packed = with_lora(en.load(tmp_path / "q.gguf"))
    packed.save_adapter(tmp_path / "adapter")
    merge = ["merge", "--model", str(tmp_path / "q.gguf"), "--adapter", str(tmp_path / "adapter"), "--force"]
    merge += ["--out", str(tmp_path / "m.gguf")]
    assert main([*merge, "--into", "16bit"]) == 2
    assert "--base" in capsys.readouterr().err
    for more, into in ((["--base", str(tmp_path / "base.gguf")], "16bit"), ([], "dequantized")):
        assert main([*merge, *more, "--quant", "q8_0", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["into"] == into
        assert len(report["layers"]) == 14
        assert (report["median_base"] is None) == (not more)
        model = en.load(tmp_path / "m.gguf")
        with no_grad():
            want, got = packed([[1, 2, 3]]).numpy(), model([[1, 2, 3]]).numpy()
        assert np.abs(got - want).max() <= (0.1 if into == "dequantized" else 2) * np.abs(want).max()
    assert main(merge) == 0
    found = capsys.readouterr()
    assert "model.layers.1.mlp.down_proj" in found.out
    assert "dequantized is the trained model" in found.err
    assert types(tmp_path / "m.gguf")["blk.0.attn_q.weight"] == "f16"


@pytest.mark.oracle
@pytest.mark.parametrize("quant", ["q4_k", "q6_k", "q4_0", "q8_0"])
def test_llama_cpp_loads_what_we_quantized_and_computes_the_same(tmp_path, shared_data, quant):
    """Of a merged model; llama.cpp rounds activations to 8 bit for quantized weights, hence the bound."""
    model = with_lora(wide())
    model.tokenizer = en.load(shared_data / "models/stories260K.gguf").tokenizer
    model.save(tmp_path / "m.gguf", quant=quant, merge=True)
    prompts = [[1, 403, 407, 261, 378]]
    ours = our_logprobs(en.load(tmp_path / "m.gguf", dtype="f32"), prompts)
    assert np.abs(ours - their_logprobs(tmp_path / "m.gguf", prompts)).max() <= 0.15
