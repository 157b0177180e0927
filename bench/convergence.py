"""Does QLoRA learn as LoRA does? A model is trained here, then adapters on it as it is and quantized.

    python bench/convergence.py --base TEXT --tune DATA --out FOLDER [--types nf4 q4_0 q4_k_m q8_0] [--seeds 0 1 2]
                                [--steps 600] [--epochs 2] [--json]

Everything by the commands that a user types: `entrenar train` on TEXT (JSONL or plain text; kept in FOLDER/base if it
is there already) makes a Llama of 26 million parameters, `entrenar finetune` an adapter of rank 16 on DATA, first on
the model as saved, then with each of --types. Losses are nats a token on DATA's held-out part; a ratio is that of the
types' mean over the seeds to LoRA's. Exit code 1 where one is above 1.02.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

SHAPE = {"hidden-size": 512, "intermediate-size": 1536, "num-hidden-layers": 8, "num-attention-heads": 8,
         "num-key-value-heads": 4, "seq-len": 256, "batch-size": 16}  # fmt: skip
RATE = {"learning-rate": 1e-3, "warmup-ratio": 0.05}
MOST = 1.02


def entrenar(command: str, **flags: Any) -> dict[str, Any]:
    """What a command prints with --json."""
    words = [sys.executable, "-m", "entrenar.cli", command, "--json"]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}")
    return dict(json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="what the model is trained on")
    parser.add_argument("--tune", required=True, help="what the adapters are trained on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["nf4", "q4_0", "q4_k_m", "q8_0"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--steps", type=int, default=600, help="of the model")
    parser.add_argument("--epochs", type=float, default=2, help="of the adapters")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    base = args.out / "base"
    if not (base / "model").exists():
        entrenar("train", data=args.base, out=base, max_steps=args.steps, **RATE, **SHAPE)
    model = base / "model"
    before = entrenar("eval", model=model, data=args.tune)
    rows: list[dict[str, Any]] = []
    for name in [None, *args.types]:
        losses = []
        for seed in args.seeds:
            flags = {} if name is None else {"quant": name}
            run = args.out / f"{name or 'lora'}-{seed}"
            made = entrenar("finetune", model=model, data=args.tune, out=run, num_train_epochs=args.epochs, seed=seed,
                            **flags)  # fmt: skip
            losses.append(made["eval_loss"])
        mean = statistics.mean(losses)
        ratio = mean / rows[0]["mean"] if rows else 1.0
        rows.append({"type": name or "as saved", "losses": losses, "mean": mean, "ratio": ratio})
        if not args.json:
            print(f"{name or 'as saved':8}  {' '.join(f'{loss:.4f}' for loss in losses)}  {ratio:.4f}", flush=True)
    if args.json:
        print(json.dumps({"before": before, "rows": rows}))
    return int(any(row["ratio"] > MOST for row in rows))


if __name__ == "__main__":
    sys.exit(main())
