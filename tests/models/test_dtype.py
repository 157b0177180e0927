"""Which type a model computes in, and how near the 16-bit path stays to the exact one."""

import gzip
import json

import numpy as np
import pytest
import tiny_models as tiny
from support import need_isa

import entrenar
from entrenar import CausalLM, LoraConfig, _native, no_grad
from entrenar.errors import ConfigError
from entrenar.models.dtype import DTYPES

BF16 = DTYPES["bf16"]
LORA = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
IDS = np.random.default_rng(0).integers(0, 33, (2, 17))


@pytest.fixture(params=["avx2", "avx512_bf16"])
def level(request):
    """A level without bf16 products, and one with them."""
    need_isa(request.param)
    before = _native.isa()
    _native._set_isa(request.param)
    yield request.param
    _native._set_isa(before)


@pytest.mark.tier1
def test_the_policy(level, tmp_path):
    fast = "bf16" if level == "avx512_bf16" else "f32"
    config = tiny.CONFIGS["llama"]
    for dtype, weights, compute in (
        ("auto", "f32", fast), ("f32", "f32", "f32"), ("mixed", "f32", "bf16"), ("bf16", "bf16", "bf16"),
        ("f16", "f16", fast),
    ):  # fmt: skip
        model = CausalLM.from_config(config, dtype=dtype)
        assert (model.lm_head.weight.dtype, model.compute) == (DTYPES[weights], compute)
        assert bool(model.parameters()) == (weights != "f16")
    for stored in ("f32", "f16", "bf16"):
        tiny.model().save(tmp_path / "m.gguf", dtype=stored)
        for dtype, weights, compute in (
            ("auto", stored, "f32" if stored == "f32" else fast), ("f32", "f32", "f32"), ("mixed", "f32", "bf16"),
            ("bf16", "bf16", "bf16"), ("f16", "f16", fast),
        ):  # fmt: skip
            model = entrenar.load(tmp_path / "m.gguf", dtype=dtype)
            assert (model.lm_head.weight.dtype, model.compute) == (DTYPES[weights], compute)


@pytest.mark.tier1
def test_an_unknown_policy_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"dtype.*'f8'.*mixed"):
        CausalLM.from_config(tiny.CONFIGS["llama"], dtype="f8")
    with pytest.raises(ConfigError, match=r"dtype.*'mixed' is not one of auto, f32"):
        tiny.model().save(tmp_path / "m.gguf", dtype="mixed")


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_bf16_stays_near_f32(level, name):
    """Each value that flows is rounded to 8 bits of precision; two layers add up to a few of those roundings."""
    model = tiny.model(name, lora=LORA)
    found = {}
    for compute in ("f32", "bf16"):
        model.compute = compute
        for parameter in model.parameters():
            parameter.grad = None
        loss = model.loss(IDS)
        loss.backward()
        assert loss.dtype == np.float32
        with no_grad():
            logits = model(IDS).numpy()
        assert logits.dtype == np.float32
        assert {p.grad.dtype for p in model.parameters()} == {DTYPES["f32"]}
        found[compute] = loss.item(), logits, [p.grad.numpy() for p in model.parameters()]
    (loss, logits, grads), (loss16, logits16, grads16) = found["f32"], found["bf16"]
    assert 0 < abs(loss16 - loss) <= 0.01 * loss
    assert np.abs(logits16 - logits).max() <= 0.04 * np.abs(logits).max()
    for grad, grad16 in zip(grads, grads16, strict=True):
        assert np.linalg.norm(grad16 - grad) <= 0.06 * np.linalg.norm(grad)


@pytest.mark.parametrize("name", list(tiny.CONFIGS))
def test_the_cache_is_bf16_and_gives_the_logits_of_the_whole_sequence(level, name):
    model = tiny.model(name, dtype="mixed")
    ids = IDS[:1]
    with no_grad():
        whole = model(ids).numpy()[0]
    cache, at = model.new_cache(4), 0
    for size in (5, 1, 9, 2):
        logits = model.next_logits(ids[:, at : at + size], cache)
        at += size
        assert np.abs(logits - whole[at - 1]).max() <= 0.03 * np.abs(whole).max()
    assert {held.dtype for held in [*cache._k, *cache._v]} == {BF16}


def test_recompute_gives_the_same_bits_in_bf16():
    grads = []
    for recompute in (0, 1, 2):
        dropping = LoraConfig(r=2, lora_dropout=0.4, target_modules="all-linear")
        model = tiny.model("qwen2", lora=dropping, dtype="mixed").train()
        model.model.recompute = recompute
        entrenar.manual_seed(11)
        model.loss(IDS).backward()
        grads.append([p.grad.numpy() for p in model.parameters()])
    for other in grads[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok105-f32"])
@pytest.mark.parametrize("dtype", ["mixed", "bf16"])
def test_real_models_predict_as_well_in_bf16(shared_data, level, name, dtype):
    parity = json.loads(gzip.decompress((shared_data / "parity" / f"{name}.logprobs.json.gz").read_bytes()))
    path = shared_data / "models" / f"{name}.gguf"
    exact, model = entrenar.load(path), entrenar.load(path, dtype=dtype)
    ids = parity["teacher_forced_ids"]
    with no_grad():  # nats a token
        assert abs(model.loss(ids).item() - exact.loss(ids).item()) <= 0.005
    out = model.generate(parity["greedy_prompt"], max_new_tokens=24)
    assert sum(a == b for a, b in zip(out.ids, parity["greedy"], strict=False)) >= 8  # then one near tie may turn
