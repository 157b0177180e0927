"""From settings to an optimizer and a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from entrenar.models.spec import ModelConfig
from entrenar.nn.lora import LoraConfig
from entrenar.optim import SGD, Adam, AdamW, AdamW8bit, Optimizer, schedule
from entrenar.tensor import Tensor
from entrenar.train.config import TrainConfig

# Peak rate of an adapter at width 2000, and how it falls with the width; all weights together take a tenth of it.
# Fitted to Llama models by Schulman et al., "LoRA Without Regret" (Thinking Machines Lab, 2025).
ADAPTER_RATE, FULL_RATE, WIDTH, POWER = 5e-4, 5e-5, 2000, 0.781
EMBEDDING_RATE = 1e-6  # of an embedding's adapter with LoRA+; PEFT's default

OPTIMIZERS: Mapping[str, Callable[[TrainConfig, Mapping[str, Tensor]], Optimizer]] = {
    "sgd": lambda c, p: SGD(p.items(), _rate(c), c.momentum, c.weight_decay),
    "adam": lambda c, p: _adam(Adam, c, p),
    "adamw": lambda c, p: _adam(AdamW, c, p),
    "adamw_8bit": lambda c, p: _adam(AdamW8bit, c, p),
}

SCHEDULES: Mapping[str, Callable[[TrainConfig, int, int], schedule.Schedule]] = {
    "constant": lambda c, total, warmup: schedule.constant(_rate(c), warmup),
    "linear": lambda c, total, warmup: schedule.linear(_rate(c), total, warmup),
    "cosine": lambda c, total, warmup: schedule.cosine(_rate(c), total, warmup, c.lr_min_ratio),
    "step": lambda c, total, warmup: schedule.step(_rate(c), c.lr_step_size, c.lr_gamma, warmup),
    "exponential": lambda c, total, warmup: schedule.exponential(_rate(c), c.lr_gamma, warmup),
}


def resolved(config: TrainConfig, model: ModelConfig, adapter: LoraConfig | None) -> TrainConfig:
    """The settings with what depends on the model: a learning rate, and sequences that fit into its context."""
    config = replace(config, seq_len=min(config.seq_len, model.max_position_embeddings))
    if config.learning_rate is not None:
        return config
    at_width = FULL_RATE if adapter is None else ADAPTER_RATE / _speed(config, adapter)
    return replace(config, learning_rate=at_width * (WIDTH / model.hidden_size) ** POWER)


def _speed(config: TrainConfig, adapter: LoraConfig) -> float:
    """How many times as far as plain LoRA's one rate moves what the adapter adds: with LoRA+ B's own rate is that many
    times as high, and rsLoRA counts alpha/√r where the rate was fitted to alpha/r."""
    ratio = max(1.0, config.loraplus_lr_ratio or 1.0)  # below 1 it is A that learns at the full rate
    return ratio * (math.sqrt(adapter.r) if adapter.use_rslora else 1.0)


def _rate(config: TrainConfig) -> float:
    assert config.learning_rate is not None  # resolved
    return config.learning_rate


def _adam(kind: type[Adam], c: TrainConfig, parameters: Mapping[str, Tensor]) -> Optimizer:
    return kind(parameters.items(), _rate(c), (c.adam_beta1, c.adam_beta2), c.adam_epsilon, c.weight_decay)


def make_optimizer(config: TrainConfig, parameters: Mapping[str, Tensor]) -> Optimizer:
    optimizer = OPTIMIZERS[config.optimizer](config, parameters)
    if config.loraplus_lr_ratio is not None:
        optimizer.set_factors(_loraplus(config, parameters, config.loraplus_lr_ratio))
    return optimizer


def _loraplus(config: TrainConfig, parameters: Mapping[str, Tensor], ratio: float) -> dict[str, float]:
    """LoRA+ (arXiv 2402.12354): B and vectors learn faster, an embedding's factors at their own rate, as in PEFT."""
    embedding = (config.loraplus_lr_embedding or EMBEDDING_RATE) / _rate(config)
    factors = {name: ratio for name, tensor in parameters.items() if ".lora_B." in name or tensor.ndim == 1}
    return factors | {name: embedding for name in parameters if ".lora_embedding_" in name}


def make_schedule(config: TrainConfig, total_steps: int) -> schedule.Schedule:
    """Warm-up: `warmup_steps`, or else `warmup_ratio` of all steps, rounded up as in transformers."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    return SCHEDULES[config.lr_scheduler](config, total_steps, warmup)
