"""``entrenar plan``: the memory and time of a training step, before anything is loaded, and what would make it fit."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from entrenar.backend import get_num_threads, isa
from entrenar.cli.adapter import AdapterSettings
from entrenar.cli.output import print_json
from entrenar.cli.settings import option
from entrenar.cli.shape import Shape
from entrenar.cli.step import StepSettings
from entrenar.errors import ConfigError
from entrenar.models.dtype import DTYPES, Policy, fresh, natural
from entrenar.models.flops import useful_flops
from entrenar.models.memory import available_bytes, gigabytes, parse_bytes
from entrenar.models.source import Source, open_model
from entrenar.models.storage import Plain, Quantized, kept_as, kept_from
from entrenar.models.stream import streamed_layers
from entrenar.quant import QType
from entrenar.train.advice import suggestions
from entrenar.train.config import TrainConfig
from entrenar.train.footprint import Footprint
from entrenar.train.plan import MARGIN, Plan, make_plan
from entrenar.train.speed import Rates, step_seconds
from entrenar.train.work import Work

WORDS = {
    "process": "the process without the model",
    "kernels": "kernels' room to work in",
    "adapter": "the adapter",
    "optimizer": "the optimizer's state",
    "gradients": "gradients",
    "activations": "activations kept for the way back",
    "layer": "what the place in the step itself needs",
    "logits": "logits held at once",
}
TRIED = "smaller types, batches, ranks and sequences, fewer layers with an adapter; a smaller model may fit"
PLAN_ONLY = ("fit", "json", "full")  # settings that no run has
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Command(StepSettings):
    """Say how much memory a training step will take, and about how long, before anything is loaded.

    For a file only its header is read. With --fit the settings are sought that fit into that memory, the mildest change
    first; by default into nine tenths of what is available. GB are 10^9 bytes, GiB 2^30.
    """

    batch_size: int = option(TrainConfig.batch_size, "sequences a micro-batch")
    fit: str | None = option(None, "memory that a step may take, such as 8GB; by default what is available")
    json: bool = option(False, "print one JSON object")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit is not None:
            parse_bytes("fit", self.fit)

    def run(self) -> int:
        source = None if self.model is None else open_model(self.model)
        work = self.work(source)
        self.say_lowered(work.training)
        free = available_bytes()
        limit = int(MARGIN * free) if self.fit is None else parse_bytes("fit", self.fit)
        plan = make_plan(Footprint(work), work.training, free)
        rates = Rates.measured(work.compute)
        found = []
        if plan.predicted > limit:
            found = suggestions(lambda settings: replace(self, **settings).work(source), limit)
        result = {
            "model": self.preset or self.model or "sizes",
            "parameters": work.config.num_parameters(),
            "compute": work.compute,
            "isa": isa(),
            "threads": get_num_threads(),
            "weights": by_type(work),
            **as_json(work, plan, rates),
            "limit_gb": limit / GIB,
            "fits": plan.predicted <= limit,
            "suggestions": [
                {
                    "flags": flags(s.settings),
                    "command": replace(self, **s.settings).command_line(),
                    **as_json(s.work, s.plan, rates),
                }
                for s in found
            ],
        }
        if self.json:
            print_json(result)
        else:
            self.show(work, plan, result)
        return 0

    def work(self, source: Source | None) -> Work:
        """What would be loaded or made, and trained. source: the opened model, None where one is made.

        Raises:
            ConfigError: nothing would be trained. AdapterError: the adapter does not fit the model.
        """
        kept: Mapping[str, Plain | Quantized | QType]
        if source is not None:
            config, policy = source.config, Policy.named(self.dtype)
            shapes = config.parameter_shapes()
            kept = kept_from(source.stored, shapes, policy.storage, self.quant, config)
        else:
            config, policy = self.model_config(self.seq_len), fresh(self.made_as(), self.quant)
            matrices = policy.storage or DTYPES["f32"]
            shapes = config.parameter_shapes()
            kept = {name: kept_as(name, shape, matrices, self.quant, config) for name, shape in shapes.items()}
        types = {name: kind if isinstance(kind, QType) else kind.qtype for name, kind in kept.items()}
        if self.full and self.dtype != "bf16" and any(kind.name != "f32" for kind in types.values()):
            raise ConfigError("full", "weights in 16 bit or less are frozen; --dtype f32, mixed or bf16 trains them")
        compute = policy.compute or natural(types.values())
        can_stream = self.model is not None and self.quant is None and bool(streamed_layers(types))
        if self.stream and not can_stream:
            raise ConfigError("stream", "no layer has quantized weights that could stay in the file")
        streamed = self.stream if can_stream else None
        training, tokenizer = self.training(config), source is not None
        work = Work(config, types, compute, self.adapter(), training, streamed, tokenizer)
        _ = work.trained  # an adapter that does not fit is an error here, not where its sizes are first asked for
        return work

    def command_line(self) -> str | None:
        """The command that does what is planned, with what it needs besides in capitals; None where there is none."""
        if self.full and self.model is not None:
            return None
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if self.full:
            words, others = ["entrenar", "train"], (*PLAN_ONLY, *(f.name for f in fields(AdapterSettings)))
        else:  # of a model that exists
            words, others = ["entrenar", "finetune"], (*PLAN_ONLY, *(f.name for f in fields(Shape)))
            given = {"model": "MODEL", **given}
        told = flags({name: value for name, value in given.items() if name not in others})
        return " ".join([*words, *told, "--data DATA --out RUN"])

    def show(self, work: Work, plan: Plan, result: dict[str, Any]) -> None:
        """The tables, on stdout."""
        what = "all weights" if self.full else f"an adapter of rank {self.rank}"
        steps, training = work.training.gradient_accumulation_steps, work.training
        print(f"{result['model']}: {result['parameters']:,} parameters, {result['trained']:,} trained ({what})")
        print(f"{f'{steps} x ' if steps > 1 else ''}{training.batch_size} x {training.seq_len} tokens a step, "
              f"{work.compute} at level {result['isa']}, {result['threads']} threads\n")  # fmt: skip
        if work.streamed:
            print(f"  {sum(work.resident.values()) / GIB:8.3f} GiB  of these weights in memory at once:")
        for name, row in result["weights"].items():
            print(f"  {row['bytes'] / GIB:8.3f} GiB  weights in {name} ({row['parameters']:,})")
        for part, words in WORDS.items():
            print(f"  {plan.peak.parts[part] / GIB:8.3f} GiB  {words}")
        again = f"{plan.recomputed} of {plan.layers} layers computed again" if plan.recomputed else "nothing recomputed"
        print(f"  {plan.predicted / GIB:8.3f} GiB  at the peak, {plan.peak.where}; {again}")
        print(f"\nabout {result['seconds_per_step']:.3g} s a step, {result['tokens_per_second']:,.0f} tokens/s")
        limit = "--fit" if self.fit is not None else f"{MARGIN:.0%} of what is available"
        size = gigabytes(int(result["limit_gb"] * GIB))
        if result["fits"]:
            print(f"fits into {size} ({limit})")
        elif not result["suggestions"]:
            print(f"does not fit into {size} ({limit}), nor with all that was tried together: {TRIED}")
        else:
            print(f"does not fit into {size} ({limit}); what does, the mildest change first:")
            for row in result["suggestions"]:
                instead = "entrenar finetune " if self.full and row["trained"] < result["trained"] else ""
                print(f"  {row['predicted_peak_gb']:8.3f} GiB, {row['tokens_per_second']:8,.0f} tokens/s  "
                      f"{instead}{' '.join(row['flags'])}".rstrip())  # fmt: skip
            if (command := result["suggestions"][0]["command"]) is not None:
                print(f"the first one: {command}")


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as they are given to a command, which says itself whether all weights are trained."""
    told = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            told += [] if name == "full" else [f"--{flag}" if value else f"--no-{flag}"]
        else:
            words = value if isinstance(value, tuple) else (value,)
            told.append(f"--{flag} {shlex.join(map(str, words))}")
    return told


def by_type(work: Work) -> dict[str, dict[str, int]]:
    """Parameters and bytes of each type of weights, the largest first."""
    parameters, nbytes = Counter[str](), Counter[str]()
    for name, kind in work.types.items():
        parameters[kind.name] += work.elements[name]
        nbytes[kind.name] += work.weights[name]
    return {name: {"parameters": parameters[name], "bytes": size} for name, size in nbytes.most_common()}


def as_json(work: Work, plan: Plan, rates: Rates) -> dict[str, Any]:
    """A plan and its time as plain numbers."""
    training = work.training
    steps, seconds = training.gradient_accumulation_steps, step_seconds(work, plan, rates)
    flops = useful_flops(work.config, work.trained, training.batch_size, training.seq_len)
    return {
        "trained": sum(work.trained.values()),
        "batch_size": training.batch_size,
        "gradient_accumulation_steps": steps,
        "seq_len": training.seq_len,
        "recomputed_layers": plan.recomputed,
        "layers": plan.layers,
        "logits_rows": plan.rows,
        "where": plan.peak.where,
        "bytes": dict(plan.peak.parts),
        "predicted_peak_gb": plan.predicted / GIB,
        "tflop": steps * flops / 1e12,
        "seconds_per_step": seconds,
        "tokens_per_second": steps * work.tokens / seconds,
    }
