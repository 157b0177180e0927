"""Writes tests/optim/transformers_schedules.json with transformers' own schedules (development only)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import get_scheduler

rows = []
for name in ("constant", "linear", "cosine"):
    for warmup in (0, 1, 7):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
        kind = "constant_with_warmup" if name == "constant" else name
        scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=30)
        rates = []
        for _ in range(31):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        rows.append({"name": name, "lr": 3e-4, "warmup_steps": warmup, "total_steps": 30, "rates": rates})

target = Path(__file__).parent.parent / "optim/transformers_schedules.json"
target.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
