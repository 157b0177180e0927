"""The run: ask the base model, fine-tune it, ask again, merge, export, and leave everything in one directory."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from entrenar import backend
from entrenar.errors import UsageError
from entrenar.formats.files import write_json
from entrenar.generate import SamplingConfig, generate
from entrenar.models.causal_lm import CausalLM, count_parameters
from entrenar.models.load import load
from entrenar.nn.lora import LoraConfig
from entrenar.observe.events import subscribed
from entrenar.observe.sinks import display
from entrenar.quickstart import world
from entrenar.quickstart.page import Page
from entrenar.train import TrainConfig, Trainer

BASE = Path(__file__).with_name("base.gguf")
DATA_SEED = 2  # of the notes; the base model's texts have another
HELD_OUT, TRAINED_ON = 120, 2400
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
TRAINING = TrainConfig(
    max_steps=120,
    batch_size=6,
    seq_len=256,
    mask_prompt=True,
    learning_rate=5e-3,
    warmup_steps=10,
    lr_min_ratio=0.05,
    eval_every=30,
    save_every=100,
)
# What the base can do, as its texts have such questions.
ASKED = "Carla came from Lima. They had six blue cups. It was on Friday. It cost 45 coins. Who?"
LONGEST_ANSWER = 80  # tokens
LIKELIEST = SamplingConfig(temperature=0.0)

MARKER = "quickstart.json"  # says that a directory is ours, and holds the results
MADE = ("data", "run", "adapter", "merged", "base.gguf", "merged.gguf", "answers.jsonl", MARKER)


@dataclass(frozen=True)
class Answer:
    """What a model made of a held-out note."""

    prompt: str
    wanted: str
    given: str

    @property
    def right(self) -> bool:
        return self.given == self.wanted

    @property
    def is_json(self) -> bool:
        try:
            return isinstance(json.loads(self.given), dict)
        except json.JSONDecodeError:
            return False


@dataclass(frozen=True)
class Score:
    """Of `notes` answers, how many are the right record to the letter, and how many are a JSON object at all."""

    notes: int
    exact: int
    json: int

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Score:
        return cls(len(answers), sum(a.right for a in answers), sum(a.is_json for a in answers))


def tell(
    out: str | Path,
    console: Console,
    seed: int = 0,
    training: TrainConfig = TRAINING,
    held_out: int = HELD_OUT,
) -> dict[str, Any]:
    """Runs the story and returns its results, which `out`/quickstart.json holds too.

    Args:
        seed: of the adapter's first values and of the order of the training data.
        training: settings of the fine-tune. held_out: number of notes that the model is asked about.

    Returns:
        ``{"stopped_by": "SIGINT"}`` or "SIGTERM" where the training was interrupted.

    Raises:
        UsageError: `out` holds something that no quickstart has made.
    """
    began = time.monotonic()
    page = Page(console)
    out = Path(out)
    replaced = claim(out)
    test, train = notes(held_out)
    write_samples(out / "data/train.jsonl", train)
    write_samples(out / "data/valid.jsonl", test)
    shutil.copyfile(BASE, out / "base.gguf")

    model = load(out / "base.gguf")
    page.opening(out, replaced, model, BASE.stat().st_size, {ASKED: answer(model, ASKED)})
    before = ask(model, test, page)
    page.before(before, Score.of(before))

    model.add_lora(LORA, seed=seed)
    page.training(train, training, count_parameters(model))
    trainer = Trainer(model, out / "data", replace(training, out=str(out / "run"), seed=seed))
    with display(console.file) as sink, subscribed(sink):
        trained = trainer.fit()
    if trained.stopped_by is not None:
        return {"stopped_by": trained.stopped_by}

    after = ask(model, test, page)
    page.after(before, after, Score.of(before), Score.of(after))
    write_samples(out / "answers.jsonl", compared(before, after))

    model.save_adapter(out / "adapter")
    model.merge_adapter()
    model.save(out / "merged")
    model.save(out / "merged.gguf")
    exported = ask(load(out / "merged.gguf"), test, page)
    seconds = time.monotonic() - began
    results = {
        "seed": seed,
        "steps": trained.steps,
        "train_loss": trained.train_loss,
        "eval_loss": trained.eval_loss,
        "before": asdict(Score.of(before)),
        "after": asdict(Score.of(after)),
        "exported": asdict(Score.of(exported)),
        "isa": backend.isa(),
        "threads": backend.get_num_threads(),
        "seconds": round(seconds, 1),
        "out": str(out),
        "made": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    write_json(out / MARKER, results)
    page.closing(out, training, Score.of(exported), seconds)
    return results


def claim(out: Path) -> bool:
    """Makes `out` a directory with our marker in it, without what an earlier quickstart made; was there one?

    Raises UsageError where there is something else: nothing of the user's is ever deleted.
    """
    replaced = (out / MARKER).is_file()
    if not replaced and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and holds no quickstart, so it is left alone; give another --out")
    for path in (out / name for name in MADE):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / MARKER, {"unfinished": True})
    return replaced


def notes(held_out: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The samples to ask about and those to train on; no record is in both."""
    samples = world.orders(DATA_SEED, HELD_OUT + TRAINED_ON)
    return samples[:held_out], samples[HELD_OUT:]


def ask(model: CausalLM, samples: Sequence[dict[str, str]], page: Page) -> list[Answer]:
    return [
        Answer(sample["prompt"], sample["completion"].strip(), answer(model, sample["prompt"]))
        for sample in page.counted(samples)
    ]


def answer(model: CausalLM, prompt: str) -> str:
    """What the model says by its likeliest tokens, up to the end of a line."""
    return generate(model, prompt, LONGEST_ANSWER, LIKELIEST, stop=("\n",)).drain().text.strip()


def compared(before: Sequence[Answer], after: Sequence[Answer]) -> list[dict[str, Any]]:
    return [
        {"prompt": a.prompt, "wanted": a.wanted, "before": b.given, "after": a.given, "right": a.right}
        for b, a in zip(before, after, strict=True)
    ]


def write_samples(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
