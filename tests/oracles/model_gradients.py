"""Development only: loss and every gradient of two-layer models with LoRA against transformers and PEFT in float64.

Needs torch, transformers and peft beside entrenar:

    python tests/oracles/model_gradients.py

Prints, for each served shape, the relative error of the loss and the worst of all gradients (largest difference over
the largest element), and fails above 1e-4.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import entrenar as en

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_models

LIMIT = 1e-4
LORA = en.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")


def compare(name: str, folder: Path) -> tuple[float, float]:
    """Relative errors of the loss and of the worst gradient."""
    tiny_models.model(name).save(folder / "base")
    model = tiny_models.model(name, lora=LORA)
    model.save_adapter(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).double()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 13))
    labels = np.where(np.random.default_rng(1).random(ids.shape) < 0.3, -100, ids)
    ours = model.loss(ids, labels)
    ours.backward()
    loss = theirs(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss
    loss.backward()
    gradients = {k.replace(".default.", "."): p.grad for k, p in theirs.named_parameters() if p.requires_grad}
    worst = 0.0
    for path, parameter in model.named_parameters():
        want = gradients.pop(f"base_model.model.{path}").numpy()
        worst = max(worst, np.abs(parameter.grad.numpy() - want).max() / np.abs(want).max())
    assert not gradients, f"PEFT trains more: {sorted(gradients)}"
    return abs(ours.item() / loss.item() - 1), worst


def main() -> None:
    failed = False
    for name in tiny_models.CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            loss, gradient = compare(name, Path(folder))
        print(f"{name:22s} loss {loss:.1e}  worst gradient {gradient:.1e}")
        failed |= max(loss, gradient) > LIMIT
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
