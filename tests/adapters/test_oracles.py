"""Adapters against PEFT and llama.cpp, on stories260K and on tiny models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tiny_models as tiny
from reference_llama_cpp import our_logprobs, their_logprobs
from support import need_oracle

import entrenar as en
from entrenar import LoraConfig, no_grad

pytestmark = pytest.mark.oracle

ALL = "all-linear"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=ALL),
    "rslora": LoraConfig(r=4, lora_alpha=6, target_modules=ALL, use_rslora=True, rank_pattern={"o_proj": 9}),
    "patterns": LoraConfig(r=4, target_modules=ALL, rank_pattern={r"layers\.1\..*q_proj": 2},
                           alpha_pattern={"up_proj": 3}),
    "dora": LoraConfig(r=4, lora_alpha=6, target_modules=[*LINEAR, "lm_head"], use_dora=True),
    "embedding": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "whole": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "input_layernorm"]),
}  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 33, (2, 11))


def randomize(model, seed=7, size=0.2):
    rng = np.random.default_rng(seed)
    for name, tensor in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            tensor.data[...] = size * rng.standard_normal(tensor.shape)
        elif "lora" not in name or "magnitude" in name:
            tensor.data[...] *= 1 + 0.3 * rng.random(tensor.shape)
        tensor.version += 1


def peft_model(base, adapter, trainable=True):
    torch, transformers, peft = need_oracle("torch"), need_oracle("transformers"), need_oracle("peft")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return torch, peft.PeftModel.from_pretrained(model, adapter, is_trainable=trainable)


def named(model):
    """PEFT's trained tensors under our names."""
    found = {}
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            name = name.replace("vector.default.weight", "vector").replace(".default", "")
            found[name] = tensor
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "llama-tied-wide-heads"])
def test_logits_gradients_and_a_short_run_equal_peft_s(tmp_path, name, variant):
    need_oracle("peft")
    tiny.model(name).save(tmp_path / "base")
    model = tiny.model(name)
    model.add_lora(VARIANTS[variant])
    randomize(model)
    model.save_adapter(tmp_path / "adapter")
    torch, theirs = peft_model(tmp_path / "base", tmp_path / "adapter")
    ids = torch.from_numpy(IDS)
    ours, parameters = dict(model.named_parameters()), named(theirs)
    swapped = {n: n.endswith("lora_embedding_A") for n in ours}
    assert ours.keys() == parameters.keys()
    settings = {"lr": 1e-2, "weight_decay": 0.0}
    optimizer = en.optim.AdamW(model.named_parameters(), **settings)
    reference = torch.optim.AdamW(list(parameters.values()), **settings)
    with no_grad(), torch.no_grad():
        difference = np.abs(model(IDS).numpy() - theirs(input_ids=ids).logits.numpy()).max()
    assert difference <= 2e-5
    for step in range(4):
        loss, other = model.loss(IDS), theirs(input_ids=ids, labels=ids).loss
        assert abs(loss.item() - other.item()) <= 1e-5 * (1 + step), step
        loss.backward()
        other.backward()
        if step == 0:
            for key, tensor in ours.items():
                want = parameters[key].grad.numpy()
                want = want.T if swapped[key] else want
                assert np.abs(tensor.grad.numpy() - want).max() <= 1e-5 + 1e-4 * np.abs(want).max(), key
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        reference.zero_grad()


@pytest.mark.filterwarnings("ignore")
def test_dora_s_dropout_is_peft_s(tmp_path, monkeypatch):
    """The same mask in both: everything but W·x reads the dropped input."""
    need_oracle("peft")
    tiny.model().save(tmp_path / "base")
    model = tiny.model()
    model.add_lora(LoraConfig(r=4, lora_alpha=6, target_modules=["down_proj"], use_dora=True, lora_dropout=0.5))
    randomize(model)
    model.save_adapter(tmp_path / "adapter")
    torch, theirs = peft_model(tmp_path / "base", tmp_path / "adapter")
    mask = (np.arange(40) % 3 != 0).astype(np.float32) * 2
    monkeypatch.setattr("entrenar.backend.cpu.dropout", lambda x, p, seed, offset: x * mask)
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x * torch.from_numpy(mask) if self.p else x)
    ids = torch.from_numpy(IDS)
    loss, other = model.train().loss(IDS), theirs.train()(input_ids=ids, labels=ids).loss
    assert abs(loss.item() - other.item()) <= 1e-5
    loss.backward()
    other.backward()
    parameters = named(theirs)
    for key, tensor in model.named_parameters():
        want = parameters[key].grad.numpy()
        assert np.abs(tensor.grad.numpy() - want).max() <= 1e-5 + 1e-4 * np.abs(want).max(), key


@pytest.mark.filterwarnings("ignore")
def test_adapters_saved_by_peft_load_here(tmp_path):
    torch, transformers, peft = need_oracle("torch"), need_oracle("transformers"), need_oracle("peft")
    tiny.model().save(tmp_path / "base")
    configs = {
        "dora": {"use_dora": True, "target_modules": LINEAR},
        "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True},
        "some": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "fan_in_fan_out": True},
        "numbered": {"target_modules": ["v_proj", "lm_head"], "layers_to_transform": 0, "layers_pattern": "layers"},
        "excluded": {"target_modules": LINEAR, "exclude_modules": ["layers.1.mlp.up_proj", "k_proj"]},
        "patterns": {"target_modules": r".*\.[kv]_proj", "exclude_modules": r".*\.0\..*k_proj"},
        "container": {"target_modules": LINEAR, "modules_to_save": ["mlp"]},
    }
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for name, config in configs.items():
        settings = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False, **config)
        theirs = peft.get_peft_model(copy.deepcopy(base), settings).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.rand_like(parameter)
            theirs.save_pretrained(tmp_path / name)
            want = theirs(input_ids=torch.from_numpy(IDS)).logits.numpy()
        model = tiny.model()
        model.load_adapter(tmp_path / name, name=name)
        with no_grad():
            got = model(IDS).numpy()
        assert np.abs(got - want).max() <= 2e-5 * (1 + np.abs(want).max()), name
        model.save_adapter(tmp_path / f"{name}-again")
        back = peft_model(tmp_path / "base", tmp_path / f"{name}-again", trainable=False)[1].eval()
        with torch.no_grad():
            got = back(input_ids=torch.from_numpy(IDS)).logits.numpy()
        assert np.abs(got - want).max() <= 2e-5 * (1 + np.abs(want).max()), name


@pytest.mark.filterwarnings("ignore")
def test_loraplus_groups_and_steps_are_peft_s(tmp_path):
    """Rates of B and magnitudes ratio times as large, of an embedding's factors a rate of their own."""
    need_oracle("peft")
    from peft.optimizers import create_loraplus_optimizer

    from entrenar.train.setup import make_optimizer

    tiny.model().save(tmp_path / "base")
    for variant in ("dora", "embedding"):
        model = tiny.model()
        model.add_lora(VARIANTS[variant])
        randomize(model)
        model.save_adapter(tmp_path / variant)
        torch, theirs = peft_model(tmp_path / "base", tmp_path / variant)
        config = en.TrainConfig(learning_rate=1e-3, loraplus_lr_ratio=16.0, loraplus_lr_embedding=3e-4)
        optimizer = make_optimizer(config, dict(model.named_parameters()))
        reference = create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_lr_embedding=3e-4
        )
        ids = torch.from_numpy(IDS)
        for _ in range(3):
            model.loss(IDS).backward()
            theirs(input_ids=ids, labels=ids).loss.backward()
            optimizer.step(1e-3)
            reference.step()
            optimizer.zero_grad()
            reference.zero_grad()
        parameters = named(theirs)
        for key, tensor in model.named_parameters():
            want = parameters[key].detach().numpy()
            want = want.T if key.endswith("embedding_A") else want
            assert np.abs(tensor.data - want).max() <= 2e-5, key


# ---- llama.cpp ----------------------------------------------------------------------------------------------------

PROMPTS = [[1, 403, 407, 261, 378], [1, 350, 270, 443, 411, 419, 262, 300], [1]]


@pytest.mark.parametrize("variant", ["lora", "rslora", "patterns", "qv", "embed"])
def test_llama_cpp_counts_our_gguf_adapter_as_we_do(tmp_path, shared_data, variant):
    configs = {
        **VARIANTS, "qv": LoraConfig(r=8, lora_alpha=16),
        "embed": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"]),
    }  # fmt: skip
    base = shared_data / "models/stories260K.gguf"
    need_oracle("xllamacpp")
    model = en.load(base)
    plain = our_logprobs(model, PROMPTS)
    model.add_lora(configs[variant])
    randomize(model, size=0.02)
    model.save_adapter(tmp_path / "adapter.gguf")
    ours, theirs = our_logprobs(model, PROMPTS), their_logprobs(base, PROMPTS, adapter=tmp_path / "adapter.gguf")
    assert np.abs(ours - plain).max() > 0.1
    assert np.abs(ours - theirs).max() <= 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("factor", [1, 0.3, -0.5])
def test_the_same_adapter_in_peft_llama_cpp_and_here(tmp_path, shared_data, factor):
    need_oracle("xllamacpp")
    need_oracle("peft")
    base = shared_data / "models/stories260K.gguf"
    model = en.load(base)
    model.save(tmp_path / "base")
    model.add_lora(VARIANTS["lora"])
    randomize(model, size=0.02)
    model.set_adapter({"default": factor})
    model.save_adapter(tmp_path / "adapter.gguf")
    back = en.load(base)
    back.load_adapter(tmp_path / "adapter.gguf")
    back.save_adapter(tmp_path / "adapter")
    torch, peft = peft_model(tmp_path / "base", tmp_path / "adapter", trainable=False)
    theirs = []
    with torch.no_grad():
        for prompt in PROMPTS:
            theirs.append(torch.log_softmax(peft(input_ids=torch.tensor([prompt])).logits[0, -1].double(), -1).numpy())
    ours = our_logprobs(model, PROMPTS)
    assert np.abs(ours - np.array(theirs)).max() <= 1e-3
    assert np.abs(ours - their_logprobs(base, PROMPTS, adapter=tmp_path / "adapter.gguf")).max() <= 1e-3


@pytest.fixture(scope="module", params=["q8_0", "q4_0"])
def trained(request, shared_data, tmp_path_factory):
    """A quantized file, our model of it with an adapter trained on it, and where what it saved lies."""
    base, folder = shared_data / f"models/stories260K-{request.param}.gguf", tmp_path_factory.mktemp(request.param)
    model = en.load(base)
    model.add_lora(LoraConfig(r=8, lora_alpha=16, target_modules=ALL), seed=1)
    model.compute = "f32"
    text = (shared_data / "text/tinyshakespeare.txt").read_text()[:6000]
    ids = np.array(model.tokenizer.encode(text)[:2048]).reshape(16, 128)
    optimizer = en.optim.AdamW(model.named_parameters(), lr=3e-3)
    losses = []
    for step in range(24):
        loss = model.train().loss(ids[step % 4 * 4 : step % 4 * 4 + 4])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1  # it has learned something to lose
    model.eval()
    model.save_adapter(folder / "adapter")
    model.save_adapter(folder / "adapter.gguf")
    plain = en.load(base, dtype="f32")
    plain.save(folder / "dense")
    plain.save(folder / "dense.gguf")
    return base, model, folder


def test_an_adapter_trained_on_a_quantized_file_is_the_same_in_llama_cpp(trained):
    """On the file's own values as F32 to 1e-3; on the quantized file, for which llama.cpp rounds activations, the loss
    to 0.01."""
    need_oracle("xllamacpp")
    base, model, folder = trained
    theirs = their_logprobs(folder / "dense.gguf", PROMPTS, adapter=folder / "adapter.gguf")
    assert np.abs(our_logprobs(model, PROMPTS) - theirs).max() <= 1e-3
    ids = model.tokenizer.encode("Speak, speak. First Citizen: You are all resolved rather to die than to famish?")
    with no_grad():
        ours = model.loss(ids).item()
    rows = their_logprobs(base, [ids[:n] for n in range(1, len(ids))], adapter=folder / "adapter.gguf")
    theirs = -np.mean([row[token] for row, token in zip(rows, ids[1:], strict=True)])
    assert len(ids) > 40
    assert abs(ours - theirs) <= 0.01, (ours, theirs)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_trained_on_a_quantized_file_is_the_same_in_peft(trained):
    _, model, folder = trained
    torch, theirs = peft_model(folder / "dense", folder / "adapter", trainable=False)
    with torch.no_grad():
        rows = [torch.log_softmax(theirs(input_ids=torch.tensor([p])).logits[0, -1].double(), -1) for p in PROMPTS]
    assert np.abs(our_logprobs(model, PROMPTS) - np.array([row.numpy() for row in rows])).max() <= 1e-3


def test_what_is_merged_and_quantized_again_runs_in_llama_cpp(trained, tmp_path):
    """The merged file in each of some types: llama.cpp's loss of it is ours."""
    need_oracle("xllamacpp")
    _, model, _ = trained
    ids = model.tokenizer.encode("Speak, speak. First Citizen: You are all resolved")
    for quant in ("q8_0", "q5_1", "q4_k_m"):
        path = tmp_path / f"{quant}.gguf"
        model.save(path, quant=quant, merge=True)
        merged = en.load(path)
        merged.compute = "f32"
        with no_grad():
            ours = merged.loss(ids).item()
        rows = their_logprobs(path, [ids[:n] for n in range(1, len(ids))])
        theirs = -np.mean([row[token] for row, token in zip(rows, ids[1:], strict=True)])
        assert abs(ours - theirs) <= 0.02, (quant, ours, theirs)
