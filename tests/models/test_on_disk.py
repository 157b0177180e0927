"""Weights left in the files: the same as in memory, one of them in memory at a time."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tiny_models as tiny

import entrenar as en
from entrenar import ModelConfig, no_grad
from entrenar.models.load import load_on_disk
from entrenar.models.on_disk import DiskQTensor, DiskTensor
from entrenar.quant import QTensor

# 4 layers of 12.6 M weights: 101 MB in 16 bit
BIG = ModelConfig(vocab_size=500, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
                  num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "llama-tied-wide-heads", "phi3"])
@pytest.mark.parametrize(
    ("form", "how", "quant"),
    [("m.gguf", {}, None), ("hf", {}, None), ("hf", {"dtype": "bf16"}, None), ("m.gguf", {"quant": "q8_0"}, None),
     ("hf", {}, "nf4"), ("m.gguf", {}, "q8_0")],
)  # fmt: skip
def test_weights_are_those_in_memory(tmp_path, name, form, how, quant):
    config = tiny.CONFIGS[name].replace(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                                        intermediate_size=96)  # fmt: skip
    en.CausalLM.from_config(config, seed=2, dtype="f32").save(tmp_path / form, **how)
    want, found = en.load(tmp_path / form, quant=quant), load_on_disk(tmp_path / form, quant)
    assert found.config == want.config
    assert found.quantization == want.quantization
    for (path, a), (other, b) in zip(want.named_weights(), found.named_weights(), strict=True):
        assert (path, a.shape, a.ndim, a.size) == (other, b.shape, b.ndim, b.size)
        if a.ndim == 2:
            assert isinstance(b, DiskQTensor if isinstance(a, QTensor) else DiskTensor)
        if isinstance(a, QTensor):
            assert (a.qtype, a.nbytes) == (b.qtype, b.nbytes)
        else:
            assert a.dtype == b.dtype
        assert a.source_bytes().tobytes() == b.source_bytes().tobytes()
        for dtype in (np.float32, np.float16):
            assert np.array_equal(a.dense(dtype), b.dense(dtype))
    ids = [[1, 2, 3, 4]]
    with no_grad():
        assert np.array_equal(want(ids).numpy(), found(ids).numpy())
    for kind in ("gguf", "hf"):
        want.save(tmp_path / "a" if kind == "hf" else tmp_path / "a.gguf")
        found.save(tmp_path / "b" if kind == "hf" else tmp_path / "b.gguf")
    again, other = dict(en.load(tmp_path / "a").named_weights()), dict(en.load(tmp_path / "b").named_weights())
    assert all(np.array_equal(again[path].data, other[path].data) for path in again)
    first, second = (en.formats.gguf_read.read(tmp_path / f"{x}.gguf") for x in "ab")
    assert all(np.array_equal(first.raw(path), second.raw(path)) for path in first.tensors)


def test_a_model_may_be_written_over_itself(tmp_path):
    """The bytes that are still to be read are those of the file as it was opened."""
    for form in ("m.gguf", "hf"):
        model = tiny.model()
        model.save(tmp_path / form)
        want = {name: weight.data.astype(np.float16) for name, weight in model.named_weights()}
        load_on_disk(tmp_path / form).save(tmp_path / form, dtype="f16")
        for name, weight in en.load(tmp_path / form).named_weights():
            assert np.array_equal(weight.data.astype(np.float16), want[name])


PEAK = """
import sys
from entrenar.cli import main
from entrenar.models.memory import peak_resident_bytes
import entrenar.models.load, entrenar.models.merge
main(["merge", "--help"])
before = peak_resident_bytes()
code = main(sys.argv[1:])
print(code, peak_resident_bytes() - before)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    model = en.CausalLM.from_config(BIG, seed=1, dtype="f16")
    model.save(folder / "f16.gguf")
    model.save(folder / "hf")
    model.save(folder / "q4_0.gguf", quant="q4_0")
    del model
    packed = en.load(folder / "q4_0.gguf")
    packed.add_lora(en.LoraConfig(r=2, target_modules="all-linear"))
    for i, (name, tensor) in enumerate(packed.named_parameters()):
        if "lora_B" in name:
            tensor.data[...] = 0.01 * np.random.default_rng(i).standard_normal(tensor.shape)
    packed.save_adapter(folder / "adapter")
    return folder


@pytest.mark.parametrize(
    "words",
    ["merge --model @q4_0.gguf --base @f16.gguf --adapter @adapter --into 16bit --out @a.gguf",
     "merge --model @q4_0.gguf --base @hf --adapter @adapter --into 16bit --quant q4_k_m --out @b.gguf",
     "merge --model @q4_0.gguf --base @f16.gguf --adapter @adapter --into dequantized --out @c",
     "merge --model @hf --model-quant nf4 --adapter @adapter --into 16bit --out @d.gguf",
     "convert --model @f16.gguf --out @e --dtype bf16", "quantize --model @hf --quant q8_0 --out @f.gguf"],
)  # fmt: skip
def test_peak_memory_is_of_a_few_weights_not_of_the_models(big, words):
    """The largest weight has 2.9 M numbers, 11.5 MB in f32, of which a handful is in memory at once."""
    command = [sys.executable, "-c", PEAK, *words.replace("@", f"{big}/").split()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={"ENTRENAR_THREADS": "1"})
    code, peak = map(int, done.stdout.split()[-2:])
    assert code == 0, done.stderr
    assert peak <= 75e6 < (big / "f16.gguf").stat().st_size
