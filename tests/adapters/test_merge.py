"""Quantized GGUF files, and merging adapters into them: what is stored, what stays, what the report says."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from reference_llama_cpp import our_logprobs, their_logprobs

import entrenar as en
from entrenar import LoraConfig, ModelConfig, no_grad
from entrenar.cli import main
from entrenar.errors import AdapterError, ConfigError, UsageError
from entrenar.formats import gguf_read
from entrenar.models.adapters import Adapter
from entrenar.models.merge import LayerError, MergeReport, require_base
from entrenar.models.on_disk import DiskTensor
from entrenar.quant import QTensor, quantize

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


def logits(model):
    model.compute = "f32"
    with no_grad():
        return model([[1, 2, 3, 5, 8, 13]]).numpy().copy()


def close(a, b, within=4e-3):  # f16 rounds what was merged
    return np.abs(a - b).max() <= within * np.abs(b).max()


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


def reported(trained, base, path, quant=None):
    """The report of a merge into the weights that the adapter was trained on."""
    report = MergeReport.measured(trained, base)
    trained.save(path, quant=quant, merge=True, written=report.written)
    return report


def test_the_report_is_the_float64_ratio_and_advises(tmp_path):
    wide().save(tmp_path / "base.gguf")
    wide().save(tmp_path / "q.gguf", quant="q4_k")
    for size, better in ((3e-4, "dequantized"), (0.2, "dequantized"), (6.0, "16bit")):
        packed, base = en.load(tmp_path / "q.gguf"), en.load(tmp_path / "base.gguf")
        with_lora(packed, size)
        report = reported(packed, base, tmp_path / "m.gguf", "q4_k")
        assert len(report.layers) == 14
        line = report.layers["model.layers.0.mlp.down_proj"]
        f = packed.adapters["default"].factors[line.layer]
        change = 2 * f.b.data.astype(np.float64) @ f.a.data
        own = packed.model.layers[0].mlp.down_proj.weight.dense().astype(np.float64)
        w16 = base.model.layers[0].mlp.down_proj.weight.data.astype(np.float64)
        stored = quantize((own + change).astype(np.float32), "q4_k").dense().astype(np.float64)
        norm = np.linalg.norm(change)
        assert line.change == pytest.approx(norm, rel=1e-2)
        assert line.written == pytest.approx(np.linalg.norm(stored - own - change) / norm, rel=2e-2)
        assert line.base == pytest.approx(np.linalg.norm(w16 - own) / norm, rel=1e-2)
        assert report.better() == better
        assert report.advice().startswith(f"--into {better}")
        assert ("keep the adapter apart" in report.advice()) == (report.median("written") >= 0.8)


def test_layers_that_do_not_change_are_no_part_of_the_medians(tmp_path):
    wide(NARROW).save(tmp_path / "base.gguf")
    wide(NARROW).save(tmp_path / "q.gguf", quant="q4_0")
    packed, base = with_lora(en.load(tmp_path / "q.gguf"), 6.0), en.load(tmp_path / "base.gguf")
    want = reported(packed, base, tmp_path / "m.gguf", "q8_0")
    still = [path for path in packed.adapters["default"].factors if "layers.0" in path or "up_proj" in path]
    for path in still:
        packed.adapters["default"].factors[path].b.data[...] = 0
    report = reported(packed, base, tmp_path / "m.gguf", "q8_0")
    for path, line in report.layers.items():
        assert (line.change, line.base, line.written) == (0, None, None) if path in still else line == want.layers[path]
    for name in ("base", "written"):
        changed = [getattr(line, name) for path, line in want.layers.items() if path not in still]
        assert report.median(name) == pytest.approx(np.median(changed))
    assert report.better() == "16bit"
    assert "nan" not in report.table() + report.advice()


@pytest.mark.parametrize("with_base", [True, False])
def test_nothing_is_advised_where_nothing_changes(tmp_path, with_base):
    wide(NARROW).save(tmp_path / "base.gguf")
    wide(NARROW).save(tmp_path / "q.gguf", quant="q4_0")
    base = en.load(tmp_path / "base.gguf") if with_base else None
    report = reported(with_lora(en.load(tmp_path / "q.gguf"), 0), base, tmp_path / "m.gguf", "q4_0")
    assert report.advice() == "its factors change nothing: ΔW is 0 in every layer"
    assert report.better() is None
    assert (report.as_dict()["median_written"], report.as_dict()["median_base"]) == (None, None)
    assert "nan" not in report.table()
    whole = en.load(tmp_path / "q.gguf")
    saved = {"lm_head.weight": en.Tensor(whole.lm_head.weight.dense() + 1)}
    whole.attach(Adapter(LoraConfig(modules_to_save=["lm_head"]), {}, saved))
    advice = MergeReport.measured(whole, base).advice()
    assert advice.startswith("dequantized is the trained model, if it was trained on this model")


def test_a_report_without_another_base_says_so():
    report = MergeReport({"x": LayerError("x", 1.0, None, 0.1)}, quantized=True, compared=False)
    assert "--base" in report.advice()
    assert "layer" in report.table()
    plain = MergeReport(report.layers, quantized=False, compared=False)
    assert plain.advice() == "writing this type costs 0.1 times the change"
    plain.layers["x"] = LayerError("x", 1.0, None, 0.0)
    assert plain.advice() == "nothing to choose: base and result have the same precision"


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


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A model in 16 bit as a file and a directory, its packed form, and others that are not its base."""
    folder = tmp_path_factory.mktemp("bases")
    wide(NARROW).save(folder / "f16.gguf", dtype="f16")
    wide(NARROW).save(folder / "hf", dtype="f16")
    wide(NARROW).save(folder / "q4_0.gguf", quant="q4_0")
    wide(NARROW.replace(num_attention_heads=8, num_key_value_heads=4)).save(folder / "heads")
    wide(NARROW.replace(rope_theta=500000.0)).save(folder / "theta")
    wide(NARROW.replace(attention_bias=True)).save(folder / "biases")
    wide(WIDE).save(folder / "wide")
    for size in ("small", "large"):
        amount = {"small": 1e-3, "large": 1.0}[size]
        with_lora(en.load(folder / "q4_0.gguf"), amount).save_adapter(folder / f"q4_0-{size}")
        with_lora(en.load(folder / "hf", quant="nf4"), amount).save_adapter(folder / f"nf4-{size}")
        with_lora(en.load(folder / "hf"), amount).save_adapter(folder / f"plain-{size}")
    return folder


def adapted(path, adapter, **how):
    model = en.load(path, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_adapter(adapter)
    return model


def merge(capsys, folder, words, code=0):
    """What the command said, on stdout and stderr."""
    got = main(["merge", *(word.replace("@", f"{folder}/") for word in words.split())])
    out, err = capsys.readouterr()
    assert got == code, err
    return out, err


@pytest.mark.parametrize(
    ("name", "value"),
    [("vocab_size", 511), ("hidden_size", 128), ("intermediate_size", 128), ("num_hidden_layers", 3),
     ("num_attention_heads", 8), ("num_key_value_heads", 4), ("head_dim", 32), ("rope_theta", 5e5),
     ("rms_norm_eps", 1e-4), ("rope_scaling", {"rope_type": "linear", "factor": 2.0})],
)  # fmt: skip
def test_a_base_that_is_another_model_is_refused(name, value):
    """As of Llama 3 and 3.1, whose sizes are the same."""
    base, trained = (en.CausalLM.from_config(c, dtype="f32") for c in (NARROW.replace(**{name: value}), NARROW))
    with pytest.raises(UsageError, match=name):
        require_base(base, trained)
    require_base(en.CausalLM.from_config(NARROW, dtype="bf16"), trained)


def test_values_beyond_f16_are_no_infinities(tmp_path):
    base = wide(NARROW)
    base.model.layers[0].mlp.up_proj.weight.data[3, 5] = 1e5
    base.save(tmp_path / "base", dtype="bf16")
    model = with_lora(en.load(tmp_path / "base", quant="nf4"), 0.1)
    for to in ("m.gguf", "m"):
        with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj\.weight has values beyond f16's.*bf16"):
            model.save(tmp_path / to, merge=True)
        with pytest.raises(ConfigError, match="beyond f16's"):
            base.save(tmp_path / to, dtype="f16")
        assert not (tmp_path / "m.gguf").exists()
    model.save(tmp_path / "m.gguf", merge=True, dtype="bf16")
    want = logits(model)
    assert close(logits(en.load(tmp_path / "m.gguf")), want, 2e-2)
    model.merge_adapter()
    kinds = {name: weight.dtype for name, weight in model.named_weights() if "layers.0.mlp" in name}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "bfloat16"
    assert kinds["model.layers.0.mlp.down_proj.weight"] == "float16"
    assert close(logits(model), want, 2e-2)


def test_what_an_adapter_was_fitted_to_is_what_its_record_says(bases, tmp_path, capsys):
    words = f"--model @q4_0.gguf --out {tmp_path}/m.gguf --force --json --adapter"
    for adapter, more, said in (
        ("nf4-small", "--base @hf", "the adapter was trained on other weights than these"),
        ("plain-small", "", "dequantized is the trained model, if it was trained on this model"),
        ("plain-small", "--base @hf", "fitted to the dequantized weights, if it was trained on this model"),
        ("q4_0-small", "--base @hf", "the adapter was fitted to the dequantized weights"),
        ("q4_0-small", "", "dequantized is the trained model; --base"),
    ):
        report = json.loads(merge(capsys, bases, f"{words} @{adapter} {more}")[0])
        assert said in report["advice"]
        assert report["into"] == "dequantized"


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("base", ["f16.gguf", "hf"])
def test_into_which_base_a_quantized_file_s_adapter_is_merged(bases, tmp_path, capsys, size, base):
    adapter = bases / f"q4_0-{size}"
    want = {"dequantized": adapted(bases / "q4_0.gguf", adapter), "16bit": adapted(bases / "hf", adapter)}
    advised = {"small": "dequantized", "large": "16bit"}[size]
    words = f"--model @q4_0.gguf --adapter {adapter} --out {tmp_path}/m.gguf --force --json"
    for more, into in (("", "dequantized"), (f"--base @{base}", advised), (f"--base @{base} --into 16bit", "16bit"),
                       (f"--base @{base} --into dequantized", "dequantized")):  # fmt: skip
        report = json.loads(merge(capsys, bases, f"{words} {more}")[0])
        assert report["into"] == into
        assert len(report["layers"]) == 14
        assert (report["median_base"] is None) == (more == "")
        assert ("--into " + advised in report["advice"]) == (more != "")
        model = en.load(tmp_path / "m.gguf")
        assert close(logits(model), logits(want[into]))
        assert model.config.rope_theta == NARROW.rope_theta
        assert types(tmp_path / "m.gguf")["blk.0.attn_q.weight"] == "f16"
    assert not close(logits(want["dequantized"]), logits(want["16bit"]))


@pytest.mark.parametrize("size", ["small", "large"])
def test_a_base_quantized_while_it_was_loaded_is_known_in_both_forms(bases, tmp_path, capsys, size):
    adapter = bases / f"nf4-{size}"
    want = {"dequantized": adapted(bases / "hf", adapter, quant="nf4"), "16bit": adapted(bases / "hf", adapter)}
    advised = {"small": "dequantized", "large": "16bit"}[size]
    words = f"--model @hf --adapter {adapter} --out {tmp_path}/m.gguf --force"
    for more, into in (("", advised), ("--into 16bit", "16bit"), ("--into dequantized", "dequantized")):
        out, err = merge(capsys, bases, f"{words} {more} --json")
        report = json.loads(out)
        assert report["into"] == into
        assert f"--into {advised}" in report["advice"]
        assert "hf is quantized to nf4 while it is loaded, as it was when the adapter was trained" in err
        assert close(logits(en.load(tmp_path / "m.gguf")), logits(want[into]))
        line = report["layers"][0]
        w16 = en.load(bases / "hf").model.layers[0].self_attn.q_proj.weight.dense().astype(np.float64)
        error = np.linalg.norm(quantize(w16.astype(np.float16), "nf4").dense() - w16)
        assert line["base"] == pytest.approx(error / line["change"], rel=1e-3)
    out, err = merge(capsys, bases, words)
    assert "model.layers.1.mlp.down_proj" in out
    assert f"--into {advised}" in err
    assert f"merged into {tmp_path}/m.gguf ({advised})" in err


def test_what_16_bits_round_away_of_a_small_change_is_said(bases, tmp_path, capsys):
    """Of a base that is not quantized as well: onto its own numbers a small enough change is rounded to nothing."""
    adapter = tmp_path / "adapter"
    with_lora(en.load(bases / "hf"), 1e-7).save_adapter(adapter)
    words = f"--model @hf --adapter {adapter} --out {tmp_path}/m.gguf --force"
    for dtype, much in (("f16", True), ("f32", False)):
        out, err = merge(capsys, bases, f"{words} --dtype {dtype}")
        assert "model.layers.1.mlp.down_proj" in out
        assert ("much of what was learned is rounded away" in err) == much
        report = json.loads(merge(capsys, bases, f"{words} --dtype {dtype} --json")[0])
        assert (report["median_written"] > 0.8) == much


def test_what_the_model_was_quantized_to_can_be_said(bases, tmp_path, capsys):
    """For an adapter without a record, or against it."""
    words = f"--out {tmp_path}/m.gguf --force --json --adapter"
    report = json.loads(merge(capsys, bases, f"--model @hf {words} @plain-large --model-quant NF4")[0])
    assert report["median_base"] is not None
    out, err = merge(capsys, bases, f"--model @hf {words} @nf4-large --model-quant none")
    assert json.loads(out)["median_base"] is None
    assert "warning: " in err
    assert "this one is not quantized" in err
    report = json.loads(merge(capsys, bases, f"--model @hf {words} @plain-large")[0])
    assert (report["into"], report["median_base"]) == ("16bit", None)
    assert report["advice"].startswith("writing this type costs")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model @q4_0.gguf --adapter @q4_0-large --into 16bit", "--into 16bit needs the 16-bit model as --base"),
        ("--model @q4_0.gguf --adapter @q4_0-large --base @q4_0.gguf", "is quantized itself, to q4_0 and q8_0"),
        ("--model @q4_0.gguf --adapter @q4_0-large --base @wide", "hidden_size is 256 and 64"),
        ("--model @q4_0.gguf --adapter @q4_0-large --base @heads", "num_attention_heads is 8 and 4"),
        ("--model @q4_0.gguf --adapter @q4_0-large --base @theta", "rope_theta is 500000.0 and 10000.0"),
        ("--model @q4_0.gguf --adapter @q4_0-large --base @biases", "self_attn.k_proj.bias is (32,) and absent"),
        ("--model @q4_0.gguf --adapter @q4_0-large --model-quant nf4", "model_quant: 'nf4': "),
        ("--model @hf --adapter @plain-large --model-quant q9", "model_quant: 'q9' is not one of"),
        ("--model @hf --adapter @plain-large --base @f16.gguf", "one base only, without --base"),
        ("--model @hf --adapter @plain-large --into dequantized", "one base only, without --into dequantized"),
        ("--model @hf --adapter @q4_0-large --into dequantized", "model quantized to q4_0, and this one is not"),
        ("--model @hf --adapter @nf4-large --base @f16.gguf", "itself the 16-bit model, quantized to nf4"),
    ],
)
def test_bases_that_cannot_be_are_refused_before_anything_is_read(bases, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setattr(QTensor, "dense", None)
    monkeypatch.setattr(DiskTensor, "dense", None)
    out, err = merge(capsys, bases, f"{words} --out {tmp_path}/m.gguf", code=2)
    assert said in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_repeat_the_tied_head_that_another_has_once(bases, tmp_path, capsys):
    """stories260K.gguf has it twice, its packed forms once."""
    tied = wide(NARROW.replace(tie_word_embeddings=True))
    tied.save(tmp_path / "tied")
    tied.save(tmp_path / "q.gguf", quant="q4_0")
    repeated = wide(NARROW)
    for (_, weight), (_, other) in zip(repeated.named_weights(), tied.named_weights(), strict=False):
        weight.data[...] = other.data
    repeated.lm_head.weight.data[...] = tied.lm_head.weight.data
    repeated.save(tmp_path / "repeated")
    targets = ["q_proj", "lm_head"]
    with_lora(en.load(tmp_path / "q.gguf"), 0.2, target_modules=targets).save_adapter(tmp_path / "adapter")
    found = []
    for base in ("tied", "repeated"):
        words = f"--model @q.gguf --base @{base} --adapter @adapter --out @merged-{base} --into 16bit"
        merge(capsys, tmp_path, words)
        found.append(logits(en.load(tmp_path / f"merged-{base}")))
    assert np.array_equal(*found)


def test_dora_and_whole_modules_are_merged_into_either_base(bases, tmp_path, capsys):
    config = {"use_dora": True, "modules_to_save": ["lm_head", "model.norm"]}
    model = with_lora(en.load(bases / "q4_0.gguf"), 0.2, **config)
    for name, tensor in model.named_parameters():
        if "lora" not in name or "magnitude" in name:
            tensor.data[...] *= 1.25
    model.save_adapter(tmp_path / "adapter")
    for into in ("16bit", "dequantized"):
        words = f"--model @q4_0.gguf --base @hf --adapter {tmp_path}/adapter --out {tmp_path}/{into} --into {into}"
        merge(capsys, bases, words)
        base = "hf" if into == "16bit" else "q4_0.gguf"
        want = adapted(bases / base, tmp_path / "adapter")
        assert close(logits(en.load(tmp_path / into)), logits(want))


def test_the_commands(tmp_path, capsys):
    wide(NARROW).save(tmp_path / "base.gguf")
    assert main(["quantize", "--model", str(tmp_path / "base.gguf"), "--out", str(tmp_path / "q.gguf"),
                 "--quant", "q4_0", "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["bytes"] == (tmp_path / "q.gguf").stat().st_size
    with_lora(en.load(tmp_path / "q.gguf")).save_adapter(tmp_path / "adapter")
    words = f"--model @q.gguf --adapter @adapter --out {tmp_path}/m.gguf"
    out, err = merge(capsys, tmp_path, words)
    assert "model.layers.1.mlp.down_proj" in out
    assert "dequantized is the trained model" in err
    assert types(tmp_path / "m.gguf")["blk.0.attn_q.weight"] == "f16"
    merge(capsys, tmp_path, f"{words} --force --quant q8_0")
    assert types(tmp_path / "m.gguf")["blk.0.attn_q.weight"] == "q8_0"


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
