"""A tiny model, its data and its run, shared by the tests of this folder; as a program, a run that can be killed."""

from __future__ import annotations

import argparse
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np

import entrenar as en
from entrenar.data import Rows, Sample
from entrenar.observe import Event, subscribed
from entrenar.train import TrainConfig, Trainer, TrainingData, TrainResult

VOCAB = 24


def model(lora: bool = True, seed: int = 0) -> en.CausalLM:
    """Two layers of 16; with an adapter that drops inputs, so that random numbers count."""
    config = en.ModelConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    made = en.CausalLM.from_config(config, seed=seed, dtype="f32")
    if lora:
        made.add_lora(en.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear"), seed=seed)
    return made


def data(count: int = 22, seed: int = 1, valid: int = 5) -> TrainingData:
    """Sequences of 3 to 12 tokens that count up from a random one; about a third of the labels is masked."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count + valid):
        ids = (rng.integers(VOCAB) + np.arange(rng.integers(3, 13))) % VOCAB
        labels = np.where(rng.random(len(ids)) < 0.3, -100, ids)
        labels[-1] = ids[-1]
        samples.append(Sample(ids.astype(np.int32), labels.astype(np.int32), f"sample {i}"))
    rows = [Rows(part, seq_len=16) for part in (samples[:count], samples[count:])]
    return TrainingData(*rows)


def config(out: Path | None, **changes: object) -> TrainConfig:
    """14 steps of two micro-batches, over an epoch and a half or so."""
    settings = {
        "max_steps": 14, "batch_size": 2, "gradient_accumulation_steps": 2, "seq_len": 16, "learning_rate": 0.01,
        "warmup_steps": 3, "weight_decay": 0.1, "eval_every": 5, "save_every": 4, "seed": 7,
        "out": None if out is None else str(out),
    }  # fmt: skip
    return TrainConfig(**{**settings, **changes})


def weights(made: en.CausalLM) -> dict[str, bytes]:
    """The bits of everything that is trained."""
    return {name: tensor.data.tobytes() for name, tensor in made.named_parameters()}


def run(out: Path | None, lora: bool = True, **changes: object) -> tuple[dict[str, bytes], TrainResult]:
    """The weights' bits after a run, and its result."""
    made = model(lora)
    result = Trainer(made, data(), config(out, **changes)).fit()
    return weights(made), result


def main() -> None:
    """Runs in a directory, resuming what is there; kills itself at the n-th event of a name where told to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--at", nargs=2, metavar=("EVENT", "N"))
    parser.add_argument("--signals", nargs="+", default=["SIGKILL"])
    args = parser.parse_args()
    seen: Counter[str] = Counter()

    def strike(event: Event) -> None:
        seen[event.name] += 1
        if args.at and event.name == args.at[0] and seen[event.name] == int(args.at[1]):
            for name in args.signals:
                os.kill(os.getpid(), signal.Signals[name])

    with subscribed(strike):
        bits, result = run(args.out, lora=not args.full, resume=(args.out / "run.json").exists())
    for name, value in bits.items():
        (args.out / f"{name}.bits").write_bytes(value)
    print(result.stopped_by)


if __name__ == "__main__":
    main()
