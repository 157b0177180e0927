"""What the quickstart shows in the terminal. Plain characters where the terminal has no others, no colour in a file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from entrenar.models.causal_lm import CausalLM

if TYPE_CHECKING:
    from entrenar.quickstart.story import Answer, Score
    from entrenar.train import TrainConfig

T = TypeVar("T")

WIDTH = 100  # columns at most
SHOWN = 3  # notes whose answers are shown
LONGEST = 120  # characters of an answer; records are shorter


class Page:
    """Writes the story, chapter by chapter, to `console`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = min(console.width, WIDTH)
        self.bar = max(8, min(40, self.width - 40))
        plain = console.options.ascii_only
        self.full, self.empty, self.yes, self.no = "#.+-" if plain else "█░✓✗"
        self.rest = "..." if plain else "…"

    def opening(
        self, out: Path, replaced: bool, model: CausalLM, nbytes: int, answers: Mapping[str, str]
    ) -> None:
        self._print("Fine-tune a tiny language model, from base to GGUF", style="bold")
        if replaced:
            self._print(f"{out} holds an earlier quickstart; this one replaces it.", style="yellow")
        self._chapter(1, "The base model")
        c = model.config
        self._print(
            f"base.gguf: a Llama of {c.num_parameters():,} parameters ({c.num_hidden_layers} layers of width "
            f"{c.hidden_size}, {nbytes / 1e6:.1f} MB), made by `entrenar train` from stories of a small world. "
            "Questions like those in its texts it can answer:"
        )
        for prompt, given in answers.items():
            self._answers({"prompt": prompt, "base model": self._short(given)})
        self._print("It has never filed a note as JSON, and does not know what is wanted:")

    def before(self, answers: Sequence[Answer], score: Score) -> None:
        for answer in answers[:SHOWN]:
            self._answers({"note": _note(answer), "base model": self._short(answer.given)})
        self._print(f"Right records on {score.notes} notes: {score.exact}.")

    def training(self, data: Sequence[Mapping[str, str]], config: TrainConfig, trained: int) -> None:
        self._chapter(2, "LoRA fine-tuning")
        self._print(
            f"data/train.jsonl holds {len(data):,} notes with the record to file, such as this one. A low-rank adapter "
            f"of {trained:,} parameters learns from them for {config.max_steps} steps; the base stays as it is."
        )
        self._answers({"prompt": data[0]["prompt"], "completion": data[0]["completion"]})

    def after(
        self, before: Sequence[Answer], after: Sequence[Answer], score_before: Score, score_after: Score
    ) -> None:
        self.console.print()
        self._chapter(3, "What it learned")
        wrong = next((i for i, a in enumerate(after) if not a.right and i >= SHOWN), None)
        for i in (*range(min(SHOWN, len(after))), *([] if wrong is None else [wrong])):
            verdict = f"{self.yes} right" if after[i].right else f"{self.no} wrong, it is {after[i].wanted}"
            given = {"before": self._short(before[i].given), "after": self._short(after[i].given)}
            rows = {"note": _note(after[i]), **given, "": verdict}
            self._answers(rows, style="green" if after[i].right else "red")
        self._print(
            f"On {score_after.notes} notes that are not in the training data, nor any note with the same record:"
        )
        table = Table(box=None, show_header=False, padding=(0, 1))
        for name, part in (("right to the letter", "exact"), ("a JSON object", "json")):
            for when, score, style in (("before", score_before, "dim"), ("after", score_after, "green")):
                share = getattr(score, part) / score.notes
                filled = round(share * self.bar)
                bar = Text(self.full * filled, style=style) + Text(self.empty * (self.bar - filled), style="dim")
                table.add_row(name if when == "before" else "", when, bar, f"{share:6.1%}")
        self.console.print(Padding(table, (0, 0, 1, 0)))

    def closing(self, out: Path, training: TrainConfig, exported: Score, seconds: float) -> None:
        self._chapter(4, "Yours to keep")
        places = {
            "adapter": "the adapter, in PEFT's format",
            "merged": "base and adapter in one: a Hugging Face directory",
            "merged.gguf": f"the same as GGUF (read back, it has {exported.exact} of {exported.notes} right)",
            "base.gguf": "the base model",
            "data": "what it learned from (train.jsonl) and was asked about (valid.jsonl)",
            "answers.jsonl": "every answer before and after",
            "run/loss.svg": "the loss curve; its numbers are in run/metrics.jsonl",
        }
        self.console.print(f"In {out}:", highlight=False, markup=False, soft_wrap=True)
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(no_wrap=True, style="cyan")
        for row in places.items():
            table.add_row(*row)
        self.console.print(Padding(table, (0, 0, 1, 1)), width=self.width)
        self._chapter(5, "What to try next")
        gguf, base, data = (shlex.quote(str(out / name)) for name in ("merged.gguf", "base.gguf", "data"))
        prompt = "'Note: Nora from Lima wants six blue lamps on Friday and will pay 45 coins. Record:'"
        settings = flags(training)
        commands = {
            "your own note": f"entrenar generate --model {gguf} --prompt {prompt}",
            "the same run, by hand": f"entrenar finetune --model {base} --data {data} --out my-first-run {settings}",
            "your own model and data": "entrenar finetune --model YOUR.gguf --data YOUR.jsonl --out my-run",
            "what is in a file": f"entrenar inspect {gguf}",
        }
        for what, command in commands.items():
            self.console.print(f"  {what}:", style="dim", highlight=False)
            self.console.print(f"    {command}", highlight=False, markup=False, soft_wrap=True)
        self.console.print()
        self._print(f"Done in {seconds:.0f} s.", style="bold")

    def counted(self, items: Sequence[T]) -> Iterator[T]:
        """The items, with a bar that counts them while they are worked on, where there is a terminal for it."""
        bar = Progress(
            TextColumn("  asking"), BarColumn(), MofNCompleteColumn(), console=self.console, transient=True,
            disable=not self.console.is_terminal,
        )  # fmt: skip
        with bar:
            yield from bar.track(items)

    def _short(self, text: str) -> str:
        return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + self.rest

    def _chapter(self, number: int, title: str) -> None:
        self.console.rule(f"[bold]{number}  {title}", align="left", characters="-" if self.full == "#" else "─")

    def _print(self, text: str, style: str = "") -> None:
        self.console.print(Padding(Text(text, style=style), (0, 0, 1, 0)), width=self.width)

    def _answers(self, rows: Mapping[str, str], style: str = "") -> None:
        """A small table of what was asked and answered; the last row in `style`."""
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows.items():
            table.add_row(name, Text(text.strip(), style=style if name == list(rows)[-1] else ""))
        self.console.print(Padding(table, (0, 0, 1, 1)), width=self.width)


def _note(answer: Answer) -> str:
    return answer.prompt.removeprefix("Note: ").removesuffix(" Record:")


def flags(training: TrainConfig) -> str:
    """The flags of `entrenar finetune` for these settings."""
    changed = {
        f.name.replace("_", "-"): value for f in fields(training) if (value := getattr(training, f.name)) != f.default
    }
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in changed.items())
