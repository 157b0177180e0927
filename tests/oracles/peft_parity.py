"""Development only: a LoRA fine-tune here and in PEFT, on the same weights, adapter, data order and schedule.

Needs torch, transformers and peft beside entrenar:

    python tests/oracles/peft_parity.py ../shared/data/models/stories260K.gguf ../shared/data/text/wikisql --steps 300

Prints both validation losses and their ratio, and how far the logits of the two programs lie apart for the adapter
that was trained here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import entrenar as en
from entrenar.data import Sampler, batches
from entrenar.train.data import prepare
from entrenar.train.setup import make_schedule

LORA = en.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def torch_loss(model, batch, total):
    """Cross-entropy of the unmasked labels after the shift, divided by `total`."""
    logits = model(input_ids=torch.from_numpy(batch.ids)).logits[:, :-1]
    labels = torch.from_numpy(batch.labels)[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return torch.nn.functional.cross_entropy(flat, labels.reshape(-1), ignore_index=-100, reduction="sum") / total


def peft_run(base, adapter, data, config, steps):
    """Validation loss (nats a token) after training in PEFT."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter, is_trainable=True
    )
    weights = [p for p in model.parameters() if p.requires_grad]
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(
        weights, lr=0.0, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    schedule = make_schedule(config, steps)
    sampler = Sampler(len(data.train), config.batch_size, config.seed, replacement=False)
    for step in range(steps):
        batch = data.train.batch(next(sampler))
        torch_loss(model, batch, batch.tokens).backward()
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
    total = nats = 0.0
    with torch.no_grad():
        for batch in batches(data.valid, config.batch_size):
            nats += torch_loss(model, batch, 1).item()
            total += batch.tokens
    return nats / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = en.load(args.model)
        model.save(folder / "base")
        model.add_lora(LORA, seed=0)
        model.save_adapter(folder / "start")
        config = en.TrainConfig(
            max_steps=args.steps, batch_size=8, seq_len=256, packing=False, learning_rate=args.learning_rate,
            warmup_steps=20, seed=0,
        )  # fmt: skip
        data = prepare(args.data, model.tokenizer, config)
        ours = en.Trainer(model, data, config).fit().eval_loss
        model.save_adapter(folder / "trained")
        theirs = peft_run(folder / "base", folder / "start", data, config, args.steps)
        print(f"validation loss: entrenar {ours:.4f}, PEFT {theirs:.4f}, ratio {ours / theirs:.4f}")
        peft = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), folder / "trained"
        ).eval()
        ids = data.valid.batch(range(4)).ids
        with torch.no_grad(), en.no_grad():
            apart = np.abs(model.eval()(ids).numpy() - peft(input_ids=torch.from_numpy(ids)).logits.numpy()).max()
        print(f"largest difference of logits for the adapter trained here: {apart:.2e}")


if __name__ == "__main__":
    main()
