"""``entrenar bench step``: training steps of a model on random tokens: speed, memory, and where the time goes."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import entrenar
from entrenar import backend
from entrenar.cli.doctor import in_billions, limits
from entrenar.cli.output import note, print_json
from entrenar.cli.settings import option, positional
from entrenar.cli.step import StepSettings
from entrenar.errors import ConfigError, NonFiniteError
from entrenar.models.causal_lm import CausalLM
from entrenar.models.flops import step_flops
from entrenar.models.load import load
from entrenar.models.memory import peak_resident_bytes
from entrenar.observe.profile import Kernel, Profile, draw, table
from entrenar.optim.clip import clip_scale, grad_norm
from entrenar.train.config import TrainConfig
from entrenar.train.plan import plan_for
from entrenar.train.setup import make_optimizer

AROUND = 2  # steps before those that count, to make the optimizer's state and fill caches, and after, to be profiled


@dataclass(frozen=True, kw_only=True)
class Command(StepSettings):
    """Measure training steps on random tokens.

    Says tokens a second (the median step), useful FLOP/s, their share of what this machine can do at most (measured in
    the same run, as `entrenar doctor` does), peak memory, and the time of each kernel. LoRA on all linear layers, or
    with --full all weights.
    """

    what: Literal["step"] = positional("what to measure: step")
    steps: int = option(8, "steps that count; two go before (one if 1 counts), and as many after are profiled")
    seed: int = option(0, "of weights and tokens")
    profile: str | None = option(None, "write a trace of the profiled steps here, for ui.perfetto.dev")
    picture: str | None = option(None, "write a picture of where the time goes here, SVG")
    json: bool = option(False, "print one JSON object")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("steps", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(name, f"{getattr(self, name)} must be at least {least}")

    @property
    def around(self) -> int:
        return min(AROUND, self.steps)

    def run(self) -> int:
        model = self.build()
        result, profile, kernels = self.measure(model)
        if self.profile is not None:
            Path(self.profile).write_text(json.dumps(profile.trace()), encoding="utf-8")
        if self.picture is not None:
            title = f"{self.around} steps of {result['model']}, {result['work']}"
            Path(self.picture).write_text(draw(kernels, profile.seconds, title), encoding="utf-8")
        if self.json:
            print_json(result)
        else:
            show(result, kernels, profile.seconds)
        return 0

    def build(self) -> CausalLM:
        """The model, ready to train."""
        if self.model is not None:
            model = load(self.model, quant=self.quant, dtype=self.dtype, stream=self.stream)
        else:
            config = self.model_config(self.seq_len)
            model = CausalLM.from_config(config, seed=self.seed, dtype=self.made_as(), quant=self.quant)
        adapter = self.adapter()
        if adapter is not None:
            model.add_lora(adapter, seed=self.seed)
        return model.train()

    def measure(self, model: CausalLM) -> tuple[dict[str, Any], Profile, list[Kernel]]:
        """What ``--json`` prints, the profile of the last steps, and its rows."""
        training = self.training(model.config)
        self.say_lowered(training)
        shape = (training.batch_size, training.seq_len)
        parts = training.gradient_accumulation_steps
        ids = np.random.default_rng(self.seed).integers(0, model.config.vocab_size, (parts, *shape))
        plan = plan_for(model, training)
        model.model.recompute, model.logits_rows = plan.recomputed, plan.rows
        step = stepper(model, ids, training)
        for _ in range(self.around):
            loss = step()
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss of random tokens is {loss}")
        seconds = []
        for index in range(self.steps):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
            if not self.json:
                note(f"step {index + 1}/{self.steps}  {ids.size / seconds[-1]:,.1f} tokens/s")
        peak_rss = peak_resident_bytes() / 2**30
        with Profile() as profile:
            for _ in range(self.around):
                step()
        peaks = backend.cpu.peaks()  # last, because its buffer counts as memory
        kernels = profile.kernels(peaks)
        arithmetic: dict[str, float] = {"f32": 0.0, "bf16": 0.0}
        for row in kernels:
            arithmetic["bf16" if row.dtype == "bf16" else "f32"] += row.flops
        kind = max(arithmetic, key=lambda name: arithmetic[name])
        median = statistics.median(seconds)
        flops = parts * step_flops(model, *shape)
        result = {
            "work": "full" if self.full else f"{'dora' if self.dora else 'lora'}-r{self.rank}",
            "model": self.preset or self.model or "sizes",
            "batch_size": training.batch_size,
            "gradient_accumulation_steps": parts,
            "seq_len": training.seq_len,
            "dtype": self.dtype,
            "quant": self.quant,
            "stream": self.stream,
            "arithmetic": kind,
            "optimizer": self.optimizer,
            "cpu": backend.cpu_info()["model"],
            "isa": backend.isa(),
            "threads": backend.get_num_threads(),
            "version": entrenar.__version__,
            "steps": self.steps,
            "seconds_per_step": median,
            "tokens_per_second": ids.size / median,
            "tokens_per_second_range": [ids.size / max(seconds), ids.size / min(seconds)],
            "tflops": flops / median / 1e12,
            "share_of_peak": flops / median / peaks[kind],
            "peaks": in_billions(peaks),
            "peak_rss_gb": peak_rss,
            "predicted_peak_gb": plan.predicted / 2**30,
            "memory_budget": self.memory_budget,
            "recomputed_layers": plan.recomputed,
            "loss": loss,
            "profiled_steps": self.around,
            "kernels": [as_json(row, self.around) for row in kernels],
        }
        return result, profile, kernels


def stepper(model: CausalLM, ids: NDArray[np.int64], training: TrainConfig) -> Callable[[], float]:
    """A function that does one step on ids (micro-batches, B, T), clipping included, and returns its loss."""
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(training, parameters)
    labels = ids[..., 1:].size

    def step() -> float:
        total = 0.0
        for part in ids:
            loss = model.loss(part, denominator=labels)
            loss.backward()
            total += loss.item()
        optimizer.step(scale=clip_scale(grad_norm(parameters.values()), training.max_grad_norm))
        optimizer.zero_grad()
        return total

    return step


def as_json(row: Kernel, steps: int) -> dict[str, Any]:
    """A kernel's row of so many steps, a step."""
    return {
        "name": row.name,
        "dtype": row.dtype,
        "calls": row.calls / steps,
        "seconds": row.seconds / steps,
        "gflops": row.gflops,
        "gb_per_s": row.gb_per_s,
        "roofline_share": row.roofline_share,
    }


def show(result: dict[str, Any], kernels: list[Kernel], seconds: float) -> None:
    low, high = result["tokens_per_second_range"]
    parts = result["gradient_accumulation_steps"]
    print(f"{result['model']}, {result['work']}, {f'{parts} x ' if parts > 1 else ''}{result['batch_size']} x "
          f"{result['seq_len']} tokens, {result['isa']}, {result['threads']} threads, loss {result['loss']:.3f}")
    print(f"{result['tokens_per_second']:,.1f} tokens/s ({low:,.1f} to {high:,.1f}), "
          f"{result['tflops']:.3f} useful TFLOP/s, {result['share_of_peak']:.1%} of the {result['arithmetic']} peak, "
          f"{result['peak_rss_gb']:.2f} GiB at most")  # fmt: skip
    print(f"this machine at most: {limits(result['peaks'])}\n")
    print(table(kernels, seconds))
