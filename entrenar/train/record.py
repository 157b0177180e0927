"""What identifies a run: its settings, model and data. Written to run.json, and compared before a run is resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from entrenar import __version__, backend
from entrenar.errors import CheckpointError
from entrenar.tensor import Tensor
from entrenar.train.config import TrainConfig
from entrenar.train.plan import Plan

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM

DERIVED = ("learning_rate",)  # settings that may follow from others and from the model: compared last
SAMPLED = 1 << 16  # bytes hashed at the start, the middle and the end of a large frozen weight


def identity(model: CausalLM, config: TrainConfig, data_digest: str) -> dict[str, Any]:
    """What must be equal for two runs to be the same run, as plain JSON."""
    settings = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config) if spec.metadata["result"]}
    if config.lr_scheduler not in ("linear", "cosine") and not config.warmup_ratio:
        # The rate at a step does not depend on the last one, so such a run may be made longer.
        del settings["max_steps"], settings["num_train_epochs"]
    whole = {
        "config": settings,
        "model": {
            "config": dataclasses.asdict(model.config),
            "trainable": {name: list(tensor.shape) for name, tensor in model.named_parameters()},
            "frozen": frozen_digest(model),
            "compute": model.compute,
            "dropout": model.adapter.lora_dropout if model.adapter is not None else 0.0,
            "scales": {path: linear.lora.scale for path, linear in model.linears() if linear.lora is not None},
        },
        "data": data_digest,
    }
    plain: dict[str, Any] = json.loads(json.dumps(whole, default=list))  # as it will come back from a file
    return plain


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError naming the first setting, or what else, differs from the saved run's."""
    for part in now["model"]:
        if saved["model"].get(part) != now["model"][part]:
            what = {
                "config": "its configuration differs",
                "trainable": "the trainable weights have other names or shapes",
                "frozen": "the frozen weights have other values",
                "compute": "it computes in another type (dtype, or another level of the CPU)",
                "dropout": "the adapter's lora_dropout differs",
                "scales": "the adapter's scales (lora_alpha, use_rslora) differ",
            }[part]
            raise CheckpointError(f"{where}: is of another model: {what}")
    for name, value in sorted(now["config"].items(), key=lambda setting: setting[0] in DERIVED):
        if saved["config"].get(name) != value:
            raise CheckpointError(
                f"{where}: {name} was {saved['config'].get(name)!r} and is {value!r} now; a resumed run must have "
                "the same settings (or start another one in another directory)"
            )
    if saved["config"].keys() - now["config"].keys():
        name = min(saved["config"].keys() - now["config"].keys())
        raise CheckpointError(f"{where}: the setting {name} counted when this checkpoint was saved, and does not now")
    if saved["data"] != now["data"]:
        raise CheckpointError(f"{where}: the training data, tokenizer or template differ from those of this checkpoint")


def frozen_digest(model: CausalLM) -> str:
    """SHA-256 over the names, shapes, types and sampled bytes of all frozen weights."""
    digest = hashlib.sha256()
    for name, weight in model.named_weights():
        if weight.requires_grad:
            continue
        kind = weight.dtype if isinstance(weight, Tensor) else weight.qtype.name
        digest.update(f"{name} {weight.shape} {kind}".encode())
        raw = weight.source_bytes()
        if len(raw) > 3 * SAMPLED:
            middle = len(raw) // 2
            raw = np.concatenate([raw[:SAMPLED], raw[middle : middle + SAMPLED], raw[-SAMPLED:]])
        digest.update(raw.tobytes())
    return digest.hexdigest()


def run_record(
    model: CausalLM,
    config: TrainConfig,
    plan: Plan,
    files: Mapping[str, str],
    total_steps: int,
    resumed_from: int | None,
) -> dict[str, Any]:
    """What run.json holds."""
    return {
        "config": dataclasses.asdict(config),
        "total_steps": total_steps,
        "resumed_from": resumed_from,
        "memory": plan.record(),
        "model": {
            "source": model.source,
            "compute": model.compute,
            "adapter": dataclasses.asdict(model.adapter) if model.adapter is not None else None,
            "trainable_parameters": sum(tensor.data.size for _, tensor in model.named_parameters()),
        },
        "data": dict(files),
        "versions": {"entrenar": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "tokenizers")},
        "cpu": {**backend.cpu_info(), "isa": backend.isa(), "threads": backend.get_num_threads()},
    }
