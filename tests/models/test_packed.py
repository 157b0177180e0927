"""Models whose matrices stay quantized: loaded, made, trained with an adapter; against the same model expanded."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models as tiny

import entrenar
from entrenar import CausalLM, LoraConfig, no_grad, quant
from entrenar.errors import ConfigError, MemoryLimitError
from entrenar.formats import gguf_read
from entrenar.models import memory
from entrenar.models.mixture import OUTER
from entrenar.optim import AdamW
from entrenar.quant import QTensor

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def packed_names(model):
    return {name for name, weight in model.named_weights() if isinstance(weight, QTensor)}


def matrices(config):
    return {name for name, shape in config.parameter_shapes().items() if len(shape) == 2}


def expand(model):
    """The same model with every packed weight as f32."""
    for _, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), QTensor):
            module.weight = entrenar.Tensor(module.weight.dense())
    return model


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_gguf_file_s_quantized_matrices_stay_as_they_are(shared_data, kind):
    path = shared_data / "models" / f"stories260K-{kind}.gguf"
    model, file = entrenar.load(path), gguf_read.read(path)
    narrow = {name for name in matrices(model.config) if "down_proj" in name}  # rows of 172 are no whole blocks
    assert packed_names(model) == matrices(model.config) - narrow
    weights = dict(model.named_weights())
    same = weights["model.layers.1.self_attn.o_proj.weight"].bytes
    assert same.tobytes() == file.raw("blk.1.attn_output.weight").tobytes()
    turned = weights["model.layers.1.self_attn.q_proj.weight"].bytes.reshape(64, -1)  # 8 heads of 8, pairs side by side
    rows = file.raw("blk.1.attn_q.weight").reshape(8, 4, 2, -1).swapaxes(1, 2).reshape(64, -1)
    np.testing.assert_array_equal(turned, rows)
    assert not list(model.named_parameters())
    ids = np.arange(3, 90)[None]
    model.compute = "f32"
    with no_grad():
        logits = model(ids).numpy()
        np.testing.assert_allclose(logits, entrenar.load(path, dtype="f32")(ids).numpy(), rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(logits, expand(model)(ids).numpy())


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_quant_packs_the_linear_layers_of_any_model_while_loading(tmp_path, name):
    model = tiny.model(name)
    for path in (tmp_path / "dir",) + ((tmp_path / "m.gguf",) if name != "mistral-window" else ()):
        model.save(path)
        loaded = entrenar.load(path, quant="nf4")
        assert packed_names(loaded) == matrices(model.config) - set(OUTER)
        for key, weight in loaded.named_weights():
            dense = tiny.arrays(model)[key]
            if isinstance(weight, QTensor):
                assert weight.bytes.tobytes() == quant.quantize(dense, "nf4").bytes.tobytes()
            else:
                np.testing.assert_array_equal(weight.data, dense)
        assert loaded.new_cache(8) is not None
        ids = np.arange(20)[None]
        with no_grad():
            loaded.compute = "f32"
            packed = loaded(ids).numpy()
            np.testing.assert_allclose(packed, expand(loaded)(ids).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.tier1
def test_random_weights_are_packed_one_by_one():
    plain = CausalLM.from_config(tiny.CONFIGS["qwen2"], seed=3, dtype="f32")
    model = CausalLM.from_config(tiny.CONFIGS["qwen2"], seed=3, quant="nf4")
    for key, weight in model.named_weights():
        dense = dict(plain.named_weights())[key].data
        if isinstance(weight, QTensor):
            assert weight.bytes.tobytes() == quant.quantize(dense, "nf4").bytes.tobytes()
        else:
            np.testing.assert_array_equal(weight.data, dense.astype(weight.dtype))
    assert not list(model.named_parameters())
    assert entrenar.count_parameters(model, trainable_only=False) == plain.config.num_parameters()
    fits = CausalLM.from_config(tiny.CONFIGS["llama"].replace(hidden_size=64, intermediate_size=40), quant="q4_k")
    mlp = [weight for _, weight in fits.model.layers[0].mlp.named_weights()]
    kinds = {w.qtype.name if isinstance(w, QTensor) else str(w.dtype) for w in mlp}
    assert kinds == {"q5_0", "float16"}  # rows of 64 fill blocks of 32 only, rows of 40 none


def test_an_adapter_of_a_packed_model_has_the_gradients_of_the_expanded_one():
    config = tiny.CONFIGS["llama"].replace(hidden_size=48, intermediate_size=72)
    ids = np.arange(30).reshape(2, 15)
    grads = []
    for expanded in (False, True):
        model = CausalLM.from_config(config, seed=1, quant="nf4", dtype="f32")
        if expanded:
            expand(model)
        model.add_lora(LORA)
        rng = np.random.default_rng(5)
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.data[...] = 0.1 * rng.standard_normal(weight.shape)
        model.model.recompute = 1
        model.loss(ids).backward()
        grads.append({name: weight.grad.data for name, weight in model.named_parameters()})
    assert len(grads[0]) == 2 * 7 * 2
    for name, grad in grads[0].items():
        np.testing.assert_allclose(grad, grads[1][name], rtol=1e-4, atol=1e-6 * np.abs(grads[1][name]).max() + 1e-9)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_qlora_reaches_lora_s_validation_loss(shared_data, kind):
    """Within 2 % after the same steps on the same text, of which the last part is held out."""
    text = (shared_data / "text" / "tinyshakespeare.txt").read_text()[:12000]
    losses = {}
    for name in ("stories260K", f"stories260K-{kind}"):
        model = entrenar.load(shared_data / "models" / f"{name}.gguf")
        tokens = np.asarray(model.tokenizer.encode(text), np.int64)
        rows = tokens[: len(tokens) // 128 * 128].reshape(-1, 128)
        train, held_out = rows[:-8], rows[-8:]
        model.add_lora(LORA)
        optimizer = AdamW(model.named_parameters(), lr=5e-3)
        with no_grad():
            before = model.loss(held_out).item()
        for step in range(16):
            model.loss(train[step * 4 % (len(train) - 4) :][:4]).backward()
            optimizer.step()
            optimizer.zero_grad()
        with no_grad():
            losses[name] = model.loss(held_out).item()
        assert losses[name] < 0.9 * before
    lora, qlora = losses.values()
    assert qlora <= 1.02 * lora


@pytest.mark.tier1
def test_what_can_not_be_quantized_is_refused(tmp_path, shared_data, monkeypatch):
    with pytest.raises(ConfigError, match="'nf5' is not one of"):
        CausalLM.from_config(tiny.CONFIGS["llama"], quant="nf5")
    tiny.model().save(tmp_path)
    with pytest.raises(ConfigError, match="quant"):
        entrenar.load(tmp_path, quant="f16")
    path = shared_data / "models" / "stories260K-q4_0.gguf"
    with pytest.raises(ConfigError, match="is quantized already"):
        entrenar.load(path, quant="nf4")
    monkeypatch.setattr(memory, "available_bytes", lambda: 140_000)
    with pytest.raises(MemoryLimitError):
        entrenar.load(path)
    monkeypatch.setattr(memory, "available_bytes", lambda: 350_000)  # 520 KB in 16 bit
    entrenar.load(path)


def test_a_packed_model_is_saved_and_merged_in_16_bit(tmp_path):
    model = CausalLM.from_config(tiny.CONFIGS["llama"], quant="nf4")
    weights = {name: weight.dense() for name, weight in model.named_weights()}
    model.save(tmp_path / "m.gguf")
    for name, weight in entrenar.load(tmp_path / "m.gguf").named_weights():
        np.testing.assert_array_equal(weight.dense(), weights[name].astype(weight.dtype))
