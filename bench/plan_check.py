"""Is a step's peak memory what `entrenar plan` says? Configurations drawn from a seed, each measured by itself.

    python bench/plan_check.py [--seed N] [--count 20] [--first 0] [--json]

Draws models of different depth, width and vocabulary, adapters (LoRA, DoRA, dropout, whole modules) and full training,
types, batches, micro-batches, optimizers and budgets; asks `entrenar plan` and runs `entrenar bench step`, each in a
process of its own. Exit code 1 where the worst prediction is off by more than a tenth. Without --seed a new one is
drawn, and said. Runs of the same seed are the same, so that --first and --count cut a long one into pieces.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import subprocess
import sys
from typing import Any

ALLOWED = 0.1
LARGEST, SMALLEST = 2.5, 0.25  # GiB; in the smallest the interpreter would be all there is
TARGETS = (
    ("all-linear",),
    ("q_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("q_proj", "v_proj", "lm_head"),
    ("down_proj", "embed_tokens"),
)
WHOLE = ((), (), ("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head"), ("norm",))


def draw(rng: random.Random) -> list[str]:
    """Flags of a step: a shape, and what is done with it."""
    head_dim = rng.choice((32, 64, 64, 128))
    kv_heads = rng.choice((1, 2, 4))
    heads = kv_heads * rng.choice((1, 2, 4))
    hidden = rng.choice((256, 384, 512, 640, 768, 1024))
    flags = {
        "vocab-size": rng.choice((2000, 8000, 32000, 50257, 100000)),
        "hidden-size": hidden,
        "intermediate-size": int(hidden * rng.choice((2, 2.7, 4))) // 32 * 32,
        "num-hidden-layers": rng.choice((2, 4, 6, 8, 12, 16)),
        "num-attention-heads": heads,
        "num-key-value-heads": kv_heads,
        "head-dim": head_dim,
        "seq-len": rng.choice((64, 128, 256, 512, 1024)),
        "batch-size": rng.choice((1, 2, 3, 4, 8)),
        "optimizer": rng.choice(("adamw", "adamw", "adamw_8bit", "adam", "sgd")),
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += rng.choice(([], ["--tie-word-embeddings"]))
    if rng.random() < 0.4:
        words += ["--full", f"--dtype={rng.choice(('auto', 'f32', 'mixed', 'bf16'))}"]
    else:
        quant = rng.choice((None, None, "nf4", "nf4-f32", "q4_0", "q8_0", "q4_k"))
        types = ("auto", "f32", "f16", "bf16") if quant is None else ("auto", "bf16")
        words += [f"--rank={rng.choice((4, 8, 16, 64))}", f"--dtype={rng.choice(types)}"]
        words += [] if quant is None else [f"--quant={quant}"]
        target = rng.choice(TARGETS)
        words += ["--target", *target]
        dora = rng.choice(([], ["--dora"]))
        words += [] if "embed_tokens" in target else dora  # of linear layers only
        words += rng.choice(([], [], ["--dropout=0.1"]))
        whole = [name for name in rng.choice(WHOLE) if name not in target]
        words += ["--modules-to-save", *whole] if whole else []
    words += rng.choice(([], [], ["--gradient-accumulation-steps=2"]))
    return words + rng.choice(([], [], ["--gradient-checkpointing"], ["budget"]))


def plan(flags: list[str]) -> dict[str, Any]:
    return said([sys.executable, "-m", "entrenar.cli", "plan", *flags, "--json"])


def configurations(seed: int) -> Any:
    """Flags and the plan for them, without end: those of a size worth measuring."""
    rng = random.Random(seed)
    while True:
        flags = draw(rng)
        budgeted = "budget" in flags
        flags = [flag for flag in flags if flag != "budget"]
        found = plan(flags)
        if not SMALLEST <= found["predicted_peak_gb"] <= LARGEST or found["tflop"] > 6:
            continue
        if budgeted:  # between what all layers recomputed take, and none
            least = plan([*flags, "--gradient-checkpointing"])["predicted_peak_gb"]
            budget = 1.05 * least + rng.random() * (found["predicted_peak_gb"] - least)
            flags.append(f"--memory-budget={budget:.3f}GiB")
            found = plan(flags)
        yield flags, found


def said(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return dict(json.loads(done.stdout))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first configuration of the seed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    out = sys.stderr if args.json else sys.stdout
    print(f"seed {seed}", file=out)
    rows = []
    for number, (flags, found) in enumerate(configurations(seed)):
        if number < args.first:
            continue
        if number == args.first + args.count:
            break
        run = said([sys.executable, "-m", "entrenar.cli", "bench", "step", *flags, "--steps", "1", "--json"])
        error = found["predicted_peak_gb"] / run["peak_rss_gb"] - 1
        rows.append(
            {
                "flags": flags, "predicted": found["predicted_peak_gb"], "measured": run["peak_rss_gb"], "error": error,
                "seconds_predicted": found["seconds_per_step"], "seconds": run["seconds_per_step"],
            }
        )  # fmt: skip
        print(f"{number:3} {found['predicted_peak_gb']:6.3f} GiB predicted, {run['peak_rss_gb']:6.3f} measured, "
              f"{error:+6.1%}; {found['seconds_per_step']:6.3f} s a step predicted, {run['seconds_per_step']:6.3f} "
              f"measured: {' '.join(flags)}", file=out, flush=True)  # fmt: skip
    worst = max(rows, key=lambda row: abs(row["error"]))
    print(f"worst of {len(rows)}: {worst['error']:+.1%}", file=out)
    if args.json:
        print(json.dumps({"seed": seed, "worst": worst["error"], "rows": rows}))
    return 0 if abs(worst["error"]) <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
