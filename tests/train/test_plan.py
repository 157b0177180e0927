"""The memory planner: what it predicts is what a process takes, and what it decides keeps to the budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import spm_vocabulary
from train import tiny

import entrenar as en
from entrenar.errors import ConfigError, MemoryLimitError
from entrenar.models.dtype import DTYPES
from entrenar.models.memory import parse_bytes
from entrenar.models.storage import kept_as
from entrenar.observe import subscribed
from entrenar.tokenizer import from_gguf
from entrenar.train import TrainConfig, Trainer
from entrenar.train.footprint import Footprint
from entrenar.train.plan import Plan, make_plan
from entrenar.train.work import Work

LORA = en.LoraConfig(r=16, target_modules="all-linear")
QWEN = en.ModelConfig.preset("qwen2.5-0.5b")

RUN = """
import json, numpy as np, sys
import entrenar as en
from entrenar.data import Rows, Sample
from entrenar.train import TrainConfig, Trainer, TrainingData
dtype, adapter, batch, budget = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config = en.ModelConfig(
    vocab_size=6000, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
)
model = en.CausalLM.from_config(config, dtype=dtype)
if adapter is not None:
    model.add_lora(en.LoraConfig(r=8, target_modules="all-linear", **adapter))
rng = np.random.default_rng(0)
ids = [rng.integers(0, 6000, 256).astype(np.int32) for _ in range(2 * batch)]
data = TrainingData(Rows([Sample(row, row, "") for row in ids], seq_len=256, packing=False), None)
settings = TrainConfig(max_steps=2, batch_size=batch, seq_len=256, memory_budget=None if budget == "none" else budget)
trainer = Trainer(model, data, settings)
trainer.fit()
status = open("/proc/self/status").read()  # ru_maxrss would count the process that forked this one as well
print(trainer.plan.predicted, trainer.plan.recomputed, int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.parametrize(
    ("dtype", "adapter", "batch", "budget"),
    [
        ("mixed", None, 8, "none"),
        ("f32", None, 8, "none"),
        ("bf16", {}, 16, "none"),
        ("bf16", {}, 16, "220MB"),
        ("f32", {}, 8, "210MB"),
        ("bf16", {"use_dora": True}, 16, "none"),
        ("bf16", {"use_dora": True, "lora_dropout": 0.1}, 16, "none"),
        ("f32", {"use_dora": True, "lora_dropout": 0.1}, 8, "260MB"),
        ("bf16", {"modules_to_save": ["lm_head", "norm"]}, 8, "none"),
        ("bf16", {"modules_to_save": ["embed_tokens", "lm_head"]}, 8, "none"),
        ("f32", {"modules_to_save": ["embed_tokens", "up_proj"]}, 8, "none"),
    ],
)
def test_the_prediction_is_what_a_process_takes(
    dtype: str, adapter: dict[str, object] | None, batch: int, budget: str
) -> None:
    command = [sys.executable, "-c", RUN, dtype, json.dumps(adapter), str(batch), budget]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    predicted, recomputed, peak = map(float, out.split())
    assert abs(predicted - peak) <= 0.1 * peak
    if budget != "none":
        assert recomputed > 0
        assert peak <= 1.05 * parse_bytes("budget", budget)


def test_a_plan_of_a_file_counts_its_tokenizer(tmp_path: Path) -> None:
    words = [f"w{i:x}" for i in range(80_000)]
    keys = spm_vocabulary.metadata()
    keys["tokenizer.ggml.tokens"] += words
    keys["tokenizer.ggml.scores"] += [-99.0] * len(words)
    keys["tokenizer.ggml.token_type"] += [1] * len(words)
    config = en.ModelConfig(vocab_size=len(keys["tokenizer.ggml.tokens"]), hidden_size=32, intermediate_size=64,
                            num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    model = en.CausalLM.from_config(config, seed=0, dtype="bf16")
    model.tokenizer = from_gguf(keys)
    model.save(tmp_path / "m.gguf")
    flags = ["--model", str(tmp_path / "m.gguf"), "--seq-len", "16", "--batch-size", "1", "--json"]

    def said(*command: str) -> dict[str, float]:
        words = [sys.executable, "-m", "entrenar.cli", *command, *flags]
        return dict(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))

    predicted, peak = said("plan")["predicted_peak_gb"], said("bench", "step", "--steps", "1")["peak_rss_gb"]
    assert abs(predicted - peak) <= 0.1 * peak


@pytest.mark.tier1
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True, "rank_pattern": {"lm_head": 3}},
        {"target_modules": ["v_proj", "embed_tokens"]},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "layers.1.mlp", "input_layernorm"]},
    ],
)
def test_what_is_trained_is_counted_from_shapes_as_the_model_has_it(tied: bool, adapter: dict[str, object]) -> None:
    model = en.CausalLM.from_config(tiny.model(lora=False).config.replace(tie_word_embeddings=tied))
    own = sum(weight.data.nbytes for _, weight in model.named_weights())
    model.add_lora(en.LoraConfig(r=4, **adapter))
    work = Work.of(model, TrainConfig(optimizer="adamw"))
    assert sum(work.trained.values()) == en.count_parameters(model)
    parts = Footprint(work).peak(0).parts
    assert parts["weights"] == own  # what is trained whole is a copy beside them
    assert parts["adapter"] == sum(tensor.data.nbytes for tensor in model.parameters())
    assert parts["optimizer"] == 2 * parts["adapter"]


def footprint(budget: str | None = None, **settings: object) -> tuple[Footprint, TrainConfig]:
    training = TrainConfig(batch_size=2, seq_len=512, memory_budget=budget, **settings)
    types = {n: kept_as(n, shape, DTYPES["bf16"], None, QWEN).qtype for n, shape in QWEN.parameter_shapes().items()}
    return Footprint(Work(QWEN, types, "bf16", LORA, training)), training


def plan(budget: str | None, free: int = 0, **settings: object) -> Plan:
    return make_plan(*footprint(budget, **settings), free)


@pytest.mark.tier1
def test_a_budget_decides_how_many_layers_keep_their_activations() -> None:
    assert plan(None).recomputed == 0
    assert plan("4GB").recomputed == 0
    assert plan(None, gradient_checkpointing=True).recomputed == 24
    assert plan("4GB", gradient_checkpointing=True).recomputed == 24
    some = plan("1.7GB")
    assert 0 < some.recomputed < 24
    assert some.predicted <= 1.7e9 < footprint()[0].peak(some.recomputed - 1).total  # as few as that needs
    peaks = [footprint()[0].peak(n).total for n in range(25)]
    assert peaks == sorted(peaks, reverse=True)
    assert plan("auto", free=int(1.7e9 / 0.9)).recomputed == some.recomputed


@pytest.mark.tier1
def test_the_gradients_of_earlier_micro_batches_are_there_throughout() -> None:
    one, two = ([moment.parts["gradients"] for moment in footprint(gradient_accumulation_steps=n)[0].moments(0)]
                for n in (1, 2))  # fmt: skip
    total = 4 * 8_798_208  # f32, factors of rank 16 on all linear layers
    assert (one[0], one[-1]) == (0, total)
    assert one == sorted(one)
    assert two[0] == total
    assert [later - total for later in two[1:3]] == one[1:3]  # a layer's come beside them and are added then
    assert total < max(two) < 1.05 * total


@pytest.mark.tier1
def test_fewer_logits_are_the_last_resort() -> None:
    size, _ = footprint()
    assert plan("1.7GB").rows is None
    for rows in (256, 128):
        tight = plan(f"{size.peak(24, rows).total}")
        assert (tight.recomputed, tight.rows) == (24, rows)


@pytest.mark.tier1
def test_a_budget_that_can_not_be_met_says_the_least_and_what_to_change() -> None:
    with pytest.raises(MemoryLimitError, match=r"memory_budget: 1\.00 GB.*batch_size \(2\).*at least (\d\.\d+)GB") as e:
        plan("1GB")
    least = plan(str(e.value).rpartition("at least ")[2])
    assert (least.recomputed, least.rows) == (24, 128)


@pytest.mark.tier1
def test_sizes() -> None:
    for text, size in (("2GB", 2e9), ("1.3 GB", 1.3e9), ("800mb", 8e8), ("1GiB", 2**30), ("512KiB", 2**19), ("7", 7)):
        assert parse_bytes("memory_budget", text) == size
    for wrong in ("", "GB", "2XB", "-1GB", "1e9", "auto "):
        with pytest.raises(ConfigError, match="memory_budget"):
            TrainConfig(memory_budget=wrong)


def test_the_run_says_its_plan(tmp_path) -> None:
    seen = []
    model = tiny.model()
    with subscribed(lambda event: seen.append(event) if event.name == "train.plan" else None):
        trainer = Trainer(model, tiny.data(), tiny.config(tmp_path, max_steps=1, memory_budget="100GB"))
        trainer.fit()
    assert dict(seen[0].fields) == {
        "predicted": trainer.plan.predicted, "budget": 100 * 10**9, "recomputed": 0, "layers": 2,
    }  # fmt: skip
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["memory"]["predicted"] == trainer.plan.predicted
    assert sum(record["memory"]["parts"].values()) == trainer.plan.predicted
