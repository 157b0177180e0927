"""`TrainConfig`: every setting of a training run, with its default, its limits and its help, in one place."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from os import PathLike, fspath
from typing import Any, Literal, get_args, get_origin, get_type_hints

from entrenar.errors import ConfigError
from entrenar.models.memory import parse_bytes


def _setting(
    default: Any, help: str, *, low: float = 0, below: float = math.inf, above: float = -math.inf, result: bool = True
) -> Any:
    """A field with its help; a number lies in [low, below) and above `above`. result: it may change the weights."""
    limits = {"low": low, "below": below, "above": above}
    return field(default=default, metadata={"help": help, "result": result, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run. Names follow Hugging Face's TrainingArguments; `from_dict` also takes Axolotl's.

    Each field's ``metadata["help"]`` is its description. Raises ConfigError that names the field.
    """

    # length
    max_steps: int | None = _setting(None, "number of optimizer steps; overrides num_train_epochs", low=1)
    num_train_epochs: float = _setting(1.0, "passes over the training data", low=0, above=0)
    # batches
    batch_size: int = _setting(4, "sequences a micro-batch", low=1)
    gradient_accumulation_steps: int = _setting(1, "micro-batches an optimizer step", low=1)
    seq_len: int = _setting(
        512, "longest sequence in tokens, at most the model's context; longer samples are cut", low=2
    )
    packing: bool = _setting(True, "several short samples share a sequence, without seeing each other")
    mask_prompt: bool = _setting(False, "learn from completions only, not from prompts")
    random_crops: bool = _setting(False, "plain text: draw windows anywhere in it instead of one after another")
    valid_fraction: float = _setting(
        0.0, "share of the data, from its end, held out for evaluation where there is no valid file", below=1
    )
    # optimizer
    optimizer: Literal["adamw", "adamw_8bit", "adam", "sgd"] = _setting(
        "adamw", "optimizer; adamw_8bit keeps Adam's moments in a byte each: 2 bytes a parameter instead of 8"
    )
    learning_rate: float | None = _setting(
        None, "peak learning rate; by default what suits the model's width (docs/training.md)", above=0
    )
    loraplus_lr_ratio: float | None = _setting(
        None, "LoRA+: an adapter's B (and DoRA's magnitude) learns this many times as fast, 16 for example", above=0
    )
    loraplus_lr_embedding: float | None = _setting(
        None, "LoRA+: learning rate of an embedding's adapter (default: 1e-6)", above=0
    )
    weight_decay: float = _setting(0.0, "decoupled for adamw and adamw_8bit, L2 for adam and sgd")
    adam_beta1: float = _setting(0.9, "decay of Adam's first moment", below=1)
    adam_beta2: float = _setting(0.999, "decay of Adam's second moment", below=1)
    adam_epsilon: float = _setting(1e-8, "added to the root of Adam's second moment")
    momentum: float = _setting(0.0, "momentum of sgd", below=1)
    max_grad_norm: float = _setting(1.0, "gradients are scaled down to this global norm; 0 turns it off")
    # schedule
    lr_scheduler: Literal["constant", "linear", "cosine", "step", "exponential"] = _setting(
        "cosine", "course of the learning rate after the warm-up"
    )
    warmup_steps: int = _setting(0, "steps over which the learning rate rises from 0; overrides warmup_ratio")
    warmup_ratio: float = _setting(0.0, "the same as a share of all steps", below=1)
    lr_min_ratio: float = _setting(0.0, "cosine ends at this share of the peak", below=math.nextafter(1, 2))
    lr_gamma: float = _setting(0.9, "factor of the step and exponential schedules", below=math.nextafter(1, 2))
    lr_step_size: int = _setting(100, "steps between two factors of the step schedule", low=1)
    # numbers
    seed: int = _setting(0, "of data order and dropout", below=2**63)
    gradient_checkpointing: bool = _setting(
        False, "compute activations again in the backward pass: less memory, about a third more time", result=False
    )
    memory_budget: str | None = _setting(
        None, "memory that a step may take, such as 2GB, or auto for what is free: as few layers as that needs are "
        "computed again", result=False
    )  # fmt: skip
    max_skipped_steps: int = _setting(
        5, "steps in a row, or all, of NaN or infinite loss or gradient, at which training stops", low=1, result=False
    )
    # what is said and kept
    out: str | None = _setting(None, "directory of the run: checkpoints, metrics, result", result=False)
    resume: bool = _setting(False, "go on from the newest checkpoint in out, bit for bit", result=False)
    log_every: int = _setting(1, "steps between two lines of metrics.jsonl", low=1, result=False)
    eval_every: int | None = _setting(None, "steps between two evaluations; one always comes at the end", low=1,
                                      result=False)  # fmt: skip
    eval_batches: int | None = _setting(None, "batches an evaluation uses at most (default: all)", low=1, result=False)
    save_every: int = _setting(250, "steps between two checkpoints; one always comes at the end", low=1, result=False)
    keep_checkpoints: int = _setting(2, "newest checkpoints that are kept", low=1, result=False)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for spec in fields(self):
            value = _typed(spec.name, getattr(self, spec.name), hints[spec.name])
            if isinstance(value, int | float) and not isinstance(value, bool):
                _bounded(spec.name, value, spec.metadata)
            object.__setattr__(self, spec.name, value)
        if self.memory_budget not in (None, "auto"):
            parse_bytes("memory_budget", self.memory_budget)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A config from a file's keys, which may be spelled as Axolotl, Hugging Face or mlx-lm do (see ALIASES).

        Raises:
            ConfigError: a key is unknown (the nearest known one is named) or given twice under two spellings, or
                a value is impossible.
        """
        known = [spec.name for spec in fields(cls)]
        settings: dict[str, Any] = {}
        for key, value in values.items():
            name = ALIASES.get(key, key)
            if name not in known:
                near = difflib.get_close_matches(key, [*known, *ALIASES], 1)
                raise ConfigError(key, f"is no setting{f'; did you mean {near[0]}?' if near else ''}")
            if name in settings:
                raise ConfigError(key, f"is another spelling of {name}, which is given as well")
            if name == "optimizer" and isinstance(value, str):
                value = OPTIMIZER_ALIASES.get(value, value)
            settings[name] = value
        return cls(**settings)


# other programs' spellings -> ours
ALIASES: Mapping[str, str] = {
    # Hugging Face
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "output_dir": "out",
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "max_seq_length": "seq_len",
    "max_length": "seq_len",
    "completion_only_loss": "mask_prompt",
    # Axolotl
    "micro_batch_size": "batch_size",
    "sequence_len": "seq_len",
    "num_epochs": "num_train_epochs",
    "sample_packing": "packing",
    "val_set_size": "valid_fraction",
    "lr": "learning_rate",
    "cosine_min_lr_ratio": "lr_min_ratio",
    # mlx-lm and llama.cpp
    "iters": "max_steps",
    "steps_per_report": "log_every",
    "steps_per_eval": "eval_every",
    "val_batches": "eval_batches",
    "grad_checkpoint": "gradient_checkpointing",
    "epochs": "num_train_epochs",
}

# the same of optimizers
OPTIMIZER_ALIASES: Mapping[str, str] = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
}


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type says; a whole number serves as a float."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise ConfigError(name, f"{value!r} is not one of {', '.join(choices)}")
        return value
    options = get_args(hint) or (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, PathLike):
        return fspath(value)
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ConfigError(name, f"{value!r} is not {words[kind]}")
    return value


def _bounded(name: str, value: float, limits: Mapping[str, Any]) -> None:
    if not math.isfinite(value):
        raise ConfigError(name, f"{value!r} is not a finite number")
    low, below, above = limits["low"], limits["below"], limits["above"]
    if value < low or value <= above:
        raise ConfigError(name, f"{value:g} must be {'above' if above >= low else 'at least'} {max(low, above):g}")
    if value >= below:
        top = "at most 1" if below == math.nextafter(1, 2) else f"below {below:g}"
        raise ConfigError(name, f"{value:g} must be {top}")
