"""One LoRA training step of a preset, with random weights of the real shape: tokens a second and peak memory.

    python bench/step.py --preset llama-124m --batch-size 2 --seq-len 256 --rank 16 --steps 5 [--json]

The loss is checked first: random weights must give about the logarithm of the vocabulary. The first step, which makes
the optimizer's state, is not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import time

import numpy as np

import entrenar as en
from entrenar import backend


def measure(preset: str, batch_size: int, seq_len: int, rank: int, steps: int) -> dict[str, object]:
    """Median over `steps` steps of forward, backward and optimizer."""
    config = en.ModelConfig.preset(preset)
    model = en.CausalLM.from_config(config).add_lora(
        en.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    )
    optimizer = en.optim.AdamW(model.named_parameters(), lr=1e-4)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, seq_len))
    seconds = []
    for step in range(steps + 1):
        began = time.perf_counter()
        loss = model.loss(ids)
        if step == 0 and abs(loss.item() - math.log(config.vocab_size)) > 0.5:
            raise SystemExit(f"the loss of random weights is {loss.item()}, not ln({config.vocab_size})")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[1:])
    return {
        "preset": preset,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "rank": rank,
        "isa": backend.isa(),
        "threads": backend.get_num_threads(),
        "cpu": backend.cpu_info()["model"],
        "seconds_per_step": round(median, 4),
        "tokens_per_second": round(batch_size * seq_len / median, 1),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-124m")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = measure(args.preset, args.batch_size, args.seq_len, args.rank, args.steps)
    if args.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{key:18s} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
