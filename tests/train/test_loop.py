"""The training loop: what a step is, what is not applied, what is said and kept."""

from __future__ import annotations

import json
import math
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import tiny

from entrenar import Tensor, backend
from entrenar.data import Rows
from entrenar.errors import ConfigError, DataError, NonFiniteError, TokenizerError
from entrenar.observe import Event, subscribed
from entrenar.observe.sinks import read_metrics
from entrenar.train import Trainer, TrainingData, evaluate, prepare

pytestmark = pytest.mark.tier2


def test_it_learns(tmp_path: Path) -> None:
    model = tiny.model(lora=False)
    before = evaluate(model, [tiny.data().valid.batch([0, 1])]).nll
    config = tiny.config(tmp_path / "run", max_steps=60, eval_every=None)
    result = Trainer(model, tiny.data(), config).fit()
    assert result.eval_loss < before - 0.5
    assert result.steps == result.total_steps == 60
    assert result.train_loss < before
    assert model.training


def test_the_run_directory(tmp_path: Path) -> None:
    out = tmp_path / "run"
    _, result = tiny.run(out)
    rows = read_metrics(out / "metrics.jsonl")
    steps = [row for row in rows if "event" not in row]
    evals = [row for row in rows if row.get("event") == "eval"]
    assert [row["step"] for row in steps] == list(range(1, 15))
    assert [row["step"] for row in evals] == [5, 10, 14]
    needed = {"loss", "lr", "grad_norm", "tokens_per_second", "peak_rss_gb", "tokens", "elapsed"}
    assert all(needed <= row.keys() for row in steps)
    assert [row["lr"] for row in steps[:4]] == pytest.approx([0, 0.01 / 3, 0.02 / 3, 0.01])
    assert 0.01 < steps[-1]["peak_rss_gb"] < 100
    assert steps[-1]["elapsed"] >= steps[0]["elapsed"]
    assert evals[-1]["nll"] == result.eval_loss
    record = json.loads((out / "run.json").read_text())
    assert record["config"]["learning_rate"] == 0.01
    assert record["cpu"]["isa"] and record["cpu"]["threads"] >= 1 and record["versions"]["entrenar"]  # noqa: PT018
    assert ElementTree.parse(out / "loss.svg").getroot().tag.endswith("svg")
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000012", "step-00000014"]


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with_directory, _ = tiny.run(tmp_path / "run")
    without, _ = tiny.run(None)
    assert without == with_directory
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_tokens_are_the_labels_of_an_epoch() -> None:
    seen: list[Event] = []
    data = tiny.data()
    with subscribed(seen.append):
        config = tiny.config(None, max_steps=None, num_train_epochs=2.0, gradient_accumulation_steps=1)
        Trainer(tiny.model(), data, config).fit()
    labels = sum(data.train.batch([row]).tokens for row in range(len(data.train)))
    last = [event for event in seen if event.name == "train.step"][-1]
    assert last.fields["tokens"] == 2 * labels
    assert last.fields["step"] == 2 * math.ceil(len(data.train) / 2)


def test_accumulation_is_the_larger_batch() -> None:
    """Micro-batches with unlike numbers of labels weigh by their labels, not one by one."""
    results = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        model = tiny.model(lora=False)
        config = tiny.config(
            None, batch_size=size, gradient_accumulation_steps=parts, optimizer="sgd", weight_decay=0.0,
            warmup_steps=0, max_steps=3, learning_rate=0.5,
        )  # fmt: skip
        Trainer(model, tiny.data(), config).fit()
        results.append([tensor.data for tensor in model.parameters()])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_and_the_norm_before_is_reported() -> None:
    """One SGD step of rate 1 moves the weights by exactly the clipped norm."""
    model = tiny.model(lora=False)
    before = [tensor.data.astype(np.float64) for tensor in model.parameters()]
    seen: list[Event] = []
    config = tiny.config(
        None, optimizer="sgd", weight_decay=0.0, warmup_steps=0, max_steps=1, learning_rate=1.0, max_grad_norm=0.01
    )
    with subscribed(seen.append):
        Trainer(model, tiny.data(), config).fit()
    moved = sum(float(((a - t.data) ** 2).sum()) for a, t in zip(before, model.parameters(), strict=True))
    assert math.sqrt(moved) == pytest.approx(0.01, rel=1e-3)
    assert next(e for e in seen if e.name == "train.step").fields["grad_norm"] > 0.1


def poison(model: object, steps: set[int], how: str) -> None:
    """Makes the loss (how = "loss") or one gradient ("gradient") of these steps, from 1, NaN or infinite."""
    loss, calls = model.loss, [0]
    target = next(tensor for name, tensor in model.named_parameters() if "lora_B" in name)

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        value = loss(*args, **kwargs)
        calls[0] += model.training
        if model.training and calls[0] in steps:
            return value * math.nan if how == "loss" else value + ((target - target.detach()) ** 0.5).sum()
        return value

    model.loss = poisoned


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_applied(tmp_path: Path, how: str) -> None:
    model = tiny.model()
    poison(model, {4, 6, 7}, how)
    history: dict[int, tuple[str, dict[str, bytes]]] = {0: ("start", tiny.weights(model))}

    def note(event: Event) -> None:
        if event.name in ("train.step", "train.skip"):
            history[event.fields["step"]] = (event.name, tiny.weights(model))

    config = tiny.config(tmp_path / "run", gradient_accumulation_steps=1, max_steps=9, warmup_steps=0)
    with subscribed(note):
        result = Trainer(model, tiny.data(), config).fit()
    for step in range(1, 10):
        name, bits = history[step]
        assert name == ("train.skip" if step in (4, 6, 7) else "train.step")
        assert (bits == history[step - 1][1]) == (name == "train.skip")
    assert result.skipped == 3
    assert math.isfinite(result.train_loss)
    skips = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row.get("event") == "skip"]
    assert [(row["step"], row["consecutive"]) for row in skips] == [(4, 1), (6, 1), (7, 2)]
    assert how in skips[0]["reason"]


def test_too_many_in_a_row_stop_the_run_and_keep_the_good_checkpoint(tmp_path: Path) -> None:
    model = tiny.model()
    poison(model, {6, 7, 8}, "loss")
    config = tiny.config(
        tmp_path / "run", gradient_accumulation_steps=1, save_every=1, max_skipped_steps=3, keep_checkpoints=1
    )
    with pytest.raises(NonFiniteError, match=r"after step 8: 3 steps in a row.*step-00000005"):
        Trainer(model, tiny.data(), config).fit()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    assert (tmp_path / "run/loss.svg").exists()


def test_a_run_of_which_no_step_was_applied_is_no_success(tmp_path: Path) -> None:
    model = tiny.model()
    poison(model, {1, 2, 3}, "loss")
    config = tiny.config(tmp_path / "run", gradient_accumulation_steps=1, save_every=1, max_steps=3)
    with pytest.raises(NonFiniteError, match=r"after step 3: 3 steps .* None was applied, so it comes from the model"):
        Trainer(model, tiny.data(), config).fit()
    assert not list((tmp_path / "run").glob("checkpoints/step*"))


def test_it_runs_outside_of_the_main_thread() -> None:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(tiny.run(None)))
    thread.start()
    thread.join(60)
    assert results[0][0] == tiny.run(None)[0]


def test_files_are_read_with_the_models_tokenizer(tmp_path: Path) -> None:
    from entrenar.tokenizer import from_characters

    text = "".join(chr(ord("a") + i % 20) for i in range(400))
    (tmp_path / "text.txt").write_text(text)
    model = tiny.model(lora=False)
    model.tokenizer = from_characters(text)
    settings = {"valid_fraction": 0.25, "seq_len": 12, "eval_every": None, "batch_size": 3}
    for crops in (False, True):
        config = tiny.config(tmp_path / f"{crops}", random_crops=crops, **settings)
        trainer = Trainer(model, tmp_path / "text.txt", config)
        assert trainer.fit().eval_loss > 0
        # every token of the held-out quarter is predicted once, and its end; BOS is not
        assert trainer.evaluation.tokens == 100 + 1
    epoch = tiny.config(None, random_crops=True, max_steps=None, gradient_accumulation_steps=1, **settings)
    assert Trainer(model, tmp_path / "text.txt", epoch).total_steps == math.ceil(math.ceil(302 / 12) / 3)
    record = json.loads((tmp_path / "True/run.json").read_text())
    assert list(record["data"]) == [str(tmp_path / "text.txt")]


def test_a_step_without_labels_is_an_error() -> None:
    data = tiny.data()
    for sample in data.train.samples:
        sample.labels[:] = -100
    with pytest.raises(DataError, match="step 1"):
        Trainer(tiny.model(), TrainingData(data.train), tiny.config(None)).fit()


def test_sequences_are_no_longer_than_the_models_context(tmp_path: Path) -> None:
    from entrenar.tokenizer import from_characters

    (tmp_path / "text.txt").write_text("abcdefgh" * 100)
    model = tiny.model()
    model.tokenizer = from_characters("abcdefgh")
    trainer = Trainer(model, tmp_path / "text.txt", tiny.config(None, seq_len=512))
    assert trainer.config.seq_len == trainer.data.train.batch([0]).ids.shape[1] == 64


def test_the_data_is_shown_before_the_first_step() -> None:
    from entrenar.tokenizer import from_characters

    model, data, seen = tiny.model(), tiny.data(), []
    model.tokenizer = from_characters("abcdefghijklmnopqrstuvwxyz")
    with subscribed(seen.append):
        Trainer(model, data, tiny.config(None, max_steps=1)).fit()
    assert [event.name for event in seen[:4]] == ["train.data", "train.plan", "train.start", "train.step"]
    assert (seen[0].fields["rows"], seen[0].fields["valid_rows"]) == (len(data.train), len(data.valid))
    first = data.train.sample(0)
    learned = [i for i, label in zip(first.ids[1:], first.labels[1:], strict=True) if label != -100]
    marked = "".join(part.split("⟧")[0] for part in seen[0].fields["sample"].split("⟦")[1:])
    assert marked == "".join(model.tokenizer.decode([int(i)], skip_special=False) for i in learned)


def test_a_micro_batch_without_labels_is_passed_over() -> None:
    """Its neighbours in the step count alone, as if it were not there."""
    results = []
    for size, parts in ((2, 1), (1, 2)):
        model = tiny.model(lora=False)
        rows = Rows(tiny.data(count=2).train.samples, seq_len=16, packing=False)
        rows.samples[0].labels[:] = -100
        config = tiny.config(
            None, max_steps=1, warmup_steps=0, optimizer="sgd", batch_size=size, gradient_accumulation_steps=parts
        )
        Trainer(model, TrainingData(rows), config).fit()
        results.append([tensor.data for tensor in model.parameters()])
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        Trainer(tiny.model(), tmp_path, tiny.config(None))


def test_a_directorys_valid_file_is_evaluated_on(tmp_path: Path) -> None:
    from entrenar.tokenizer import from_characters

    for name, count in (("train", 9), ("valid", 3)):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "abcabc"}\n' * count)
    model = tiny.model()
    model.tokenizer = from_characters("abc")
    data = prepare(tmp_path, model.tokenizer, tiny.config(None, packing=False, valid_fraction=0.5))
    assert (len(data.train), len(data.valid)) == (9, 3)
    assert sorted(Path(path).name for path in data.files) == ["train.jsonl", "valid.jsonl"]


def test_threads_do_not_change_a_bit() -> None:
    threads = backend.get_num_threads()
    try:
        bits = []
        for count in (1, 3):
            backend.set_num_threads(count)
            bits.append(tiny.run(None, max_steps=4)[0])
    finally:
        backend.set_num_threads(threads)
    assert bits[0] == bits[1]


def test_nothing_trainable_is_an_error() -> None:
    model = tiny.model(lora=False)
    for _, weight in model.named_weights():
        weight.requires_grad = weight.ndim == 1  # as in a 16-bit model: norms alone
    with pytest.raises(ConfigError, match="add_lora"):
        Trainer(model, tiny.data(), tiny.config(None))
