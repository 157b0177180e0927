"""DoRA against dense weights, and against its formula spelled out."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models as tiny
from tiny_models import IDS, close, logits, randomize

from entrenar import LoraConfig, Tensor, manual_seed, ops
from entrenar.errors import AdapterError
from entrenar.nn.layers import project

ALL = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")


def dora(name="llama", dtype="f32", **more):
    model = tiny.model(name, dtype=dtype)
    config = LoraConfig(use_dora=True, **{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **more})
    return model.add_lora(config)


def dense_of(model, path):
    """m/‖W + s·B·A‖ ⊙ (W + s·B·A), in float64."""
    f = model.adapters["default"].factors[path]
    w = dict(model.named_weights())[f"{path}.weight"].data.astype(np.float64)
    w = w + f.scale * f.b.data.astype(np.float64) @ f.a.data
    return f.magnitude.data[:, None] * w / np.linalg.norm(w, axis=1, keepdims=True)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen2", "llama-biases"])
def test_dora_begins_as_the_base_and_is_the_dense_weight(tmp_path, name):
    model = dora(name)
    assert close(logits(model), logits(tiny.model(name)))
    randomize(model, 1)
    other = tiny.model(name)
    base = dict(other.named_weights())
    for path in model.adapters["default"].factors:
        base[f"{path}.weight"].data[...] = dense_of(model, path)
    want = logits(other)
    assert np.abs(want - logits(tiny.model(name))).max() > 0.1
    assert close(logits(model), want)
    model.save_adapter(tmp_path)
    fresh = tiny.model(name)
    fresh.load_adapter(tmp_path, trainable=True)
    assert np.array_equal(logits(fresh), logits(model))
    assert dict(fresh.named_parameters()).keys() == dict(model.named_parameters()).keys()
    merged = model.merge_adapter()
    assert close(logits(model), want)
    with pytest.raises(AdapterError, match="can't be taken out"):
        model.unmerge_adapter(fresh.adapter, merged)


def test_dora_s_gradient_takes_the_norm_as_a_constant():
    """Of one head in float64: gradients of gain·(W + s·B·A) with the gain held, and of the magnitude."""
    model = dora(target_modules=["lm_head"])
    randomize(model, 2)
    f = model.lm_head.lora
    model.loss(IDS).backward()
    other = tiny.model()
    other.lm_head.weight.data[...] = dense_of(model, "lm_head")
    other.loss(IDS).backward()
    g = other.lm_head.weight.grad.numpy().astype(np.float64)
    w = model.lm_head.weight.data.astype(np.float64) + f.scale * f.b.data.astype(np.float64) @ f.a.data
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    gain = f.magnitude.data[:, None] / norms
    assert np.allclose(f.magnitude.grad.numpy(), (g * w / norms).sum(1), atol=2e-6)
    assert np.allclose(f.a.grad.numpy(), f.scale * f.b.data.T @ (gain * g), atol=2e-6)
    assert np.allclose(f.b.grad.numpy(), f.scale * (gain * g) @ f.a.data.T, atol=2e-6)


def test_dora_in_bf16_is_near_f32():
    exact, rounded = dora(), dora(dtype="mixed")
    for model in (exact, rounded):
        randomize(model, 4)
    assert close(logits(rounded), logits(exact), 3e-2)
    rounded.loss(IDS).backward()
    assert all(np.isfinite(p.grad.numpy()).all() for p in rounded.parameters())


def test_dora_norms_follow_the_factors_and_the_scale():
    for alpha in (5, 2.5):
        model = dora(target_modules=["o_proj"], lora_alpha=alpha)
        layer = model.model.layers[0].self_attn.o_proj
        w = layer.weight.data.astype(np.float64)
        for step in range(2):
            f = layer.lora
            f.b.data[...] = np.random.default_rng(step).standard_normal(f.b.shape)
            f.b.version += 1
            want = np.linalg.norm(w + alpha / 3 * f.b.data.astype(np.float64) @ f.a.data, axis=1)
            assert np.allclose(f.row_norms(layer.weight), want, rtol=1e-6)


def test_rows_of_zeros_have_no_direction(tmp_path):
    """A padded vocabulary's, in the head."""
    model = tiny.model("llama")
    model.lm_head.weight.data[[5, 9]] = 0
    with pytest.raises(AdapterError, match=r"lm_head: rows of its weight are all 0, 2 of \d+, the first is 5"):
        model.add_lora(LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "lm_head"]))
    assert not model.adapters
    tiny.model("llama").add_lora(LoraConfig(r=2, use_dora=True, target_modules=["lm_head"])).save_adapter(tmp_path)
    with pytest.raises(AdapterError, match="lm_head: rows"):
        model.load_adapter(tmp_path)


def test_dora_loaded_beside_another_head_is_of_the_model_s_own(tmp_path):
    first = dora(target_modules=["lm_head"])
    randomize(first, 1)
    first.save_adapter(tmp_path)
    model = tiny.model("llama").add_lora(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.lm_head.weight.data[...] *= 3
    model.eval().load_adapter(tmp_path, name="other")
    assert close(logits(model), logits(first))


def test_dora_has_no_sum_and_no_embedding():
    model = dora(target_modules=["o_proj"])
    model.add_lora(ALL, name="other")
    with pytest.raises(AdapterError, match="DoRA adapters have no sum"):
        model.set_adapter(["default", "other"])
    assert model.active_adapters == ["other"]
    with pytest.raises(AdapterError, match="use_dora"):
        dora(target_modules=["embed_tokens"])


def test_dora_drops_what_the_adapter_adds_and_scales():
    """With everything but W·x dropped (p near 1), the layer is W·x at most places."""
    model = dora(target_modules=["lm_head"], lora_dropout=0.999)
    randomize(model, 6)
    model.train()
    base = logits(tiny.model())
    dropped = logits(model)
    assert np.isclose(dropped, base, atol=1e-5).mean() > 0.5
    assert not np.allclose(logits(model.eval()), base, atol=1e-2)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dora_is_its_formula_with_a_mask_for_each_layer(targets, dropout):
    """Fused, with a norm or a gate before it and a residual behind it, against small operations put together."""
    model = dora("llama-biases", target_modules=targets, lora_dropout=dropout).train()
    randomize(model, 8)
    layer = model.model.layers[0]
    rng = np.random.default_rng(9)
    for inputs, norm in (((24, layer.self_attn._inputs), layer.input_layernorm), ((64, [layer.mlp.down_proj]), None)):
        width, linears = inputs
        x, residual = (Tensor(rng.standard_normal((2, 5, n)), requires_grad=True) for n in (width, 24 * len(linears)))
        manual_seed(4)
        out = project(x, linears, norm=norm, gated=norm is None, residual=residual)
        g = rng.standard_normal(out.shape).astype(np.float32)
        trained = [x, residual] + [t for linear in linears if linear.lora is not None for _, t in linear.lora.named()]
        found = gradients(out, g, trained)
        manual_seed(4)
        h = norm(x) if norm else ops.swiglu(x[..., :32], x[..., 32:])
        whole = ops.concat([spelled_out(h, linear, dropout) for linear in linears], -1) + residual
        assert close(out.numpy(), whole.numpy())
        for got, want in zip(found, gradients(whole, g, trained), strict=True):
            assert close(got, want)


def spelled_out(h, linear, dropout):
    """W·x + (gain - 1) ⊙ W·x̃ + gain ⊙ s·B·A·x̃ + bias."""
    plain, lora = ops.linear(h, linear.weight, linear.bias), linear.lora
    if lora is None:
        return plain
    dropped = ops.dropout(h, dropout)
    gain = lora.magnitude / Tensor(lora.row_norms(linear.weight))
    low = ops.linear(ops.linear(dropped, lora.a), lora.b) * lora.scale
    return plain + ops.linear(dropped, linear.weight) * (gain - 1) + low * gain


def gradients(out, g, tensors):
    for tensor in tensors:
        tensor.grad = None
    out.backward(g)
    return [tensor.grad.numpy().copy() for tensor in tensors]
