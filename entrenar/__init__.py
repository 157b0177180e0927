"""entrenar: fine-tune, train and run Llama-family models on the machine you have.

The names below are the public surface. They are imported on first use, so that ``import entrenar`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# public name -> module that defines it
_NAMES = {
    "Tensor": "entrenar.ops",  # whose import gives it its operators
    "no_grad": "entrenar.tensor",
    "checkpoint": "entrenar.tensor",
    "manual_seed": "entrenar.tensor",
    "set_num_threads": "entrenar.backend",
    "get_num_threads": "entrenar.backend",
    "LoraConfig": "entrenar.nn.lora",
    "ModelConfig": "entrenar.models.spec",
    "CausalLM": "entrenar.models.causal_lm",
    "load": "entrenar.models.load",
    "count_parameters": "entrenar.models.causal_lm",
    "Trainer": "entrenar.train",
    "TrainConfig": "entrenar.train",
}
_MODULES = (
    "errors", "ops", "nn", "optim", "quant", "formats",
    "tokenizer", "data", "models", "train", "generate", "observe",
)

__all__ = [*_NAMES, *_MODULES, "__version__"]

if TYPE_CHECKING:
    from entrenar import (
        data,
        errors,
        formats,
        generate,
        models,
        nn,
        observe,
        ops,
        optim,
        quant,
        tokenizer,
        train,
    )
    from entrenar.backend import get_num_threads, set_num_threads
    from entrenar.models.causal_lm import CausalLM, count_parameters
    from entrenar.models.load import load
    from entrenar.models.spec import ModelConfig
    from entrenar.nn.lora import LoraConfig
    from entrenar.tensor import Tensor, checkpoint, manual_seed, no_grad
    from entrenar.train import TrainConfig, Trainer


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(import_module(_NAMES[name]), name)
    elif name in _MODULES:
        value = import_module(f"entrenar.{name}")
    else:
        raise AttributeError(f"module 'entrenar' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
