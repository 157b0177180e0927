"""A run that is stopped or killed anywhere and resumed ends in the bits of one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

import entrenar as en
from entrenar.errors import CheckpointError, UsageError
from entrenar.observe import Event, subscribed
from entrenar.observe.sinks import read_metrics
from entrenar.optim import AdamW8bit
from entrenar.train import Trainer, TrainingData

TIMED = ("tokens_per_second", "peak_rss_gb", "elapsed")


def rows(out: Path) -> list[dict]:
    """The run's metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(out / "metrics.jsonl")]


def worker(out: Path, *arguments: str) -> subprocess.Popen[str]:
    here = Path(__file__).with_name("tiny.py")
    return subprocess.Popen([sys.executable, str(here), str(out), *arguments], stdout=subprocess.PIPE, text=True)


def final_bits(out: Path) -> dict[str, bytes]:
    return {path.name.removesuffix(".bits"): path.read_bytes() for path in out.glob("*.bits")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[dict]]:
    """Weights and metrics of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    bits, _ = tiny.run(out)
    return bits, rows(out)


def strike_at(name: str, count: int, *signals: signal.Signals) -> object:
    left = [count]

    def strike(event: Event) -> None:
        left[0] -= event.name == name
        if event.name == name and left[0] == 0:
            for number in signals:
                signal.raise_signal(number)

    return subscribed(strike)


@pytest.mark.tier2
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("event", "count", "step"),
    [("train.start", 1, 0), ("train.step", 1, 1), ("train.step", 6, 6), ("train.eval.batch", 1, 5),
     ("train.eval.start", 2, 10), ("train.eval.batch", 5, 14)],
)  # fmt: skip
def test_a_signal_saves_within_a_step_and_resume_equals(
    tmp_path: Path, whole: tuple, event: str, count: int, step: int, number: signal.Signals
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with strike_at(event, count, number):
        _, stopped = tiny.run(tmp_path / "run")
    assert (stopped.stopped_by, stopped.steps, stopped.evaluation) == (number.name, step, None)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    bits, result = tiny.run(tmp_path / "run", resume=True)
    assert (result.stopped_by, result.steps) == (None, 14)
    assert (bits, rows(tmp_path / "run")) == whole


def test_a_signal_amid_accumulation_does_the_step_again(tmp_path: Path, whole: tuple) -> None:
    model = tiny.model()
    calls, loss = [0], model.loss

    def struck(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == 15:  # the first micro-batch of step 8, where evaluations don't intervene
            signal.raise_signal(signal.SIGTERM)
        return loss(*args, **kwargs)

    model.loss = struck
    trainer = Trainer(model, tiny.data(), tiny.config(tmp_path / "run", eval_every=None))
    stopped = trainer.fit()
    assert stopped.steps == 7
    assert calls[0] == 15
    assert all(tensor.grad is None for tensor in model.parameters())
    bits, _ = tiny.run(tmp_path / "run", resume=True, eval_every=None)
    assert bits == whole[0]


def test_the_same_trainer_goes_on_too(tmp_path: Path, whole: tuple) -> None:
    model = tiny.model()
    trainer = Trainer(model, tiny.data(), tiny.config(tmp_path / "run"))
    with strike_at("train.step", 6, signal.SIGTERM):
        assert trainer.fit().stopped_by == "SIGTERM"
    assert trainer.fit().stopped_by is None
    assert (tiny.weights(model), rows(tmp_path / "run")) == whole


def test_a_second_signal_is_obeyed_at_once(tmp_path: Path) -> None:
    with strike_at("train.step", 2, signal.SIGINT, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    process = worker(tmp_path / "other", "--at", "train.step", "2", "--signals", "SIGTERM", "SIGTERM")
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_sigterm_ends_the_process_cleanly(tmp_path: Path) -> None:
    process = worker(tmp_path / "run", "--at", "train.eval.batch", "2", "--signals", "SIGTERM")
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output.splitlines()[-1]) == (0, "SIGTERM")
    assert list((tmp_path / "run/checkpoints").iterdir())


def test_killed_again_and_again(tmp_path: Path, whole: tuple) -> None:
    """SIGKILL before and after the first checkpoint, amid an evaluation, right after a save; then a last start."""
    out = tmp_path / "run"
    for event, count in (("train.step", 3), ("train.step", 7), ("train.eval.batch", 4), ("train.checkpoint", 1)):
        process = worker(out, "--at", event, str(count))
        process.communicate(timeout=30)
        assert process.returncode == -signal.SIGKILL
    process = worker(out)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert (final_bits(out), rows(out)) == whole


def test_killed_at_any_time_with_all_weights_trained(tmp_path: Path) -> None:
    expected, _ = tiny.run(tmp_path / "whole", lora=False)
    out = tmp_path / "run"
    delay = random.uniform(0.0, 0.15)
    process = worker(out, "--full")
    deadline = time.monotonic() + 30
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    process = worker(out, "--full")
    process.communicate(timeout=30)
    assert process.returncode == 0, f"killed after {delay} s"
    assert final_bits(out) == expected, f"killed after {delay} s"


def test_moments_of_a_byte_are_resumed_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdamW8bit, "smallest", 64)  # else this model is too small for them
    settings = {"optimizer": "adamw_8bit", "lora": False}
    bits, _ = tiny.run(tmp_path / "whole", **settings)
    with strike_at("train.step", 6, signal.SIGTERM):
        tiny.run(tmp_path / "run", **settings)
    assert tiny.run(tmp_path / "run", resume=True, **settings)[0] == bits
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert tiny.run(tmp_path / "exact", lora=False)[0] != bits


def test_weights_in_bf16_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    def run(out: Path, resume: bool = False) -> dict[str, bytes]:
        model = en.CausalLM.from_config(tiny.model().config, dtype="bf16")
        Trainer(model, tiny.data(), tiny.config(out, resume=resume)).fit()
        assert {str(weight.dtype) for weight in model.parameters()} == {"bfloat16", "float32"}  # matrices and norms
        return tiny.weights(model)

    whole = run(tmp_path / "whole")
    with strike_at("train.step", 6, signal.SIGTERM):
        run(tmp_path / "run")
    assert run(tmp_path / "run", resume=True) == whole
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0]


def test_a_finished_run_resumed_is_finished(tmp_path: Path, whole: tuple) -> None:
    _, first = tiny.run(tmp_path / "run")
    bits, again = tiny.run(tmp_path / "run", resume=True)
    assert (bits, rows(tmp_path / "run")) == whole
    assert again == first


def test_a_run_of_constant_rate_can_be_made_longer(tmp_path: Path) -> None:
    settings = {"lr_scheduler": "constant", "max_steps": 9}
    tiny.run(tmp_path / "run", **settings)
    longer, _ = tiny.run(tmp_path / "run", resume=True, lr_scheduler="constant", max_steps=13)
    expected, _ = tiny.run(tmp_path / "whole", lr_scheduler="constant", max_steps=13)
    assert longer == expected


def test_what_does_not_change_the_weights_may_change(tmp_path: Path, whole: tuple) -> None:
    with strike_at("train.step", 6, signal.SIGTERM):
        tiny.run(tmp_path / "run")
    bits, _ = tiny.run(
        tmp_path / "run", resume=True, eval_every=2, save_every=1, log_every=3, keep_checkpoints=1,
        gradient_checkpointing=True,
    )  # fmt: skip
    assert bits == whole[0]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000014"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0.02}, "learning_rate was 0.01 and is 0.02"),
        ({"max_steps": 15}, "max_steps"),
        ({"batch_size": 3}, "batch_size"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps"),
        ({"seed": 8}, "seed"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"lr_scheduler": "constant"}, "lr_scheduler|max_steps"),
        ({"weight_decay": 0.0}, "weight_decay"),
        ({"max_grad_norm": 2.0}, "max_grad_norm"),
    ],
)
def test_a_setting_that_counts_must_not_change(tmp_path: Path, changes: dict, words: str) -> None:
    with strike_at("train.step", 1, signal.SIGTERM):
        tiny.run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=words):
        tiny.run(tmp_path / "run", resume=True, **changes)


def test_another_model_or_other_data_are_refused(tmp_path: Path) -> None:
    with strike_at("train.step", 1, signal.SIGTERM):
        tiny.run(tmp_path / "run")
    config = tiny.config(tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="frozen weights"):
        Trainer(tiny.model(seed=1), tiny.data(), config)
    with pytest.raises(CheckpointError, match="trainable weights"):
        Trainer(tiny.model(lora=False), tiny.data(), config)
    with pytest.raises(CheckpointError, match="training data"):
        Trainer(tiny.model(), tiny.data(seed=2), config)


def test_one_changed_line_anywhere_is_other_data() -> None:
    rows = tiny.data().train
    first = TrainingData(rows, files={"a/train.jsonl": "1f"}).digest()
    assert TrainingData(rows, files={"a/train.jsonl": "2e"}).digest() != first
    assert TrainingData(rows, files={"moved/train.jsonl": "1f"}).digest() == first


def test_a_run_is_never_started_over_by_mistake(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run"):
        tiny.run(tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="out"):
        tiny.run(None, resume=True)
    tiny.run(tmp_path / "run", max_steps=1)
    with pytest.raises(UsageError, match="holds a run already"):
        tiny.run(tmp_path / "run")


def test_a_damaged_state_is_a_typed_error(tmp_path: Path) -> None:
    from entrenar.formats import checkpoint

    tiny.run(tmp_path / "run", max_steps=2)
    newest = checkpoint.latest(tmp_path / "run/checkpoints")
    arrays, state = checkpoint.load(newest)
    kept = {name: arrays[name].copy() for name in arrays}
    name = next(name for name in kept if name.startswith("weight/"))
    for arrays, damaged in (
        ({**kept, name: kept[name][:1]}, state),
        ({k: v for k, v in kept.items() if k != name}, state),
        (kept, {k: v for k, v in state.items() if k != "rng"}),
        (kept, {**state, "progress": {"step": 1, "nonsense": 2}}),
    ):
        checkpoint.save(newest, arrays, damaged)
        with pytest.raises(CheckpointError):
            tiny.run(tmp_path / "run", max_steps=2, resume=True)
