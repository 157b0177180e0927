"""A model larger than memory: plans and measures a QLoRA step whose layers are read from the file as they are needed.

    python bench/stream.py --file FILE.gguf [--preset llama2-70b] [--quant q4_k_m] [--rank 16] [--seq-len 512]
                           [--memory-budget 10GB] [--steps 1] [--json]

Where FILE isn't there it is made: the preset's shape with blocks of random weights, written tensor by tensor (the same
16 million values, rolled, so that this takes as long as the disk does). Prints what `entrenar plan --stream` predicts
and what `entrenar bench step --stream` takes.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

POOL = 1 << 24  # values


@cache
def pool(kind: str) -> np.ndarray:
    """Random weights' bytes, a row a block."""
    from entrenar.quant import QTYPES, quantize

    values = np.random.default_rng(0).standard_normal(POOL, np.float32) * np.float32(0.02)
    return quantize(values.reshape(-1, 4096), kind).bytes.reshape(-1, QTYPES[kind].bytes)


def blocks(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    from entrenar.quant import QTYPES

    some = np.roll(pool(kind), seed * 7919, 0).reshape(-1)
    return np.resize(some, QTYPES[kind].nbytes(math.prod(shape)))


def make(path: Path, preset: str, quant: str) -> None:
    """The file, complete or not at all."""
    from entrenar import ModelConfig
    from entrenar.formats import gguf_write
    from entrenar.models.arch import architecture
    from entrenar.models.gguf_config import gguf_metadata
    from entrenar.models.mixture import OUTER, layer_type, outer_type
    from entrenar.quant import QTYPES

    config = ModelConfig.preset(preset)
    shapes = config.parameter_shapes()
    tensors: list[Any] = []
    for seed, weight in enumerate(architecture(config.model_type).weight_names(config)):
        name, shape = weight.hf, shapes[weight.hf]
        if len(shape) == 1:
            tensors.append((weight.gguf, np.ones(shape, np.float32)))
            continue
        wanted = outer_type(quant, name, False) if name in OUTER else layer_type(quant, name, config)
        make_blocks = partial(blocks, wanted, shape, seed)
        tensors.append((weight.gguf, gguf_write.LazyBlocks(shape, QTYPES[wanted], make_blocks)))
    gguf_write.write(path, gguf_metadata(config), tensors)


def entrenar(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "entrenar.cli", *words, "--json"]
    return dict(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--preset", default="llama2-70b")
    parser.add_argument("--quant", default="q4_k_m")
    parser.add_argument("--rank", default="16")
    parser.add_argument("--seq-len", default="512")
    parser.add_argument("--memory-budget", default="10GB")
    parser.add_argument("--steps", default="1")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    if not args.file.exists():
        print(f"making {args.file}", file=sys.stderr)
        make(args.file, args.preset, args.quant)
    flags = ["--model", str(args.file), "--stream", "--rank", args.rank, "--batch-size", "1", "--seq-len", args.seq_len,
             "--memory-budget", args.memory_budget]  # fmt: skip
    plan = entrenar("plan", *flags)
    step = entrenar("bench", "step", *flags, "--steps", args.steps)
    row = {
        "file_gb": args.file.stat().st_size / 1e9,
        "flags": flags[2:],
        "planned_gib": plan["predicted_peak_gb"],
        "peak_gib": step["peak_rss_gb"],
        "recomputed_layers": step["recomputed_layers"],
        "seconds_per_step": step["seconds_per_step"],
        "tokens_per_second": step["tokens_per_second"],
        "planned_seconds": plan["seconds_per_step"],
    }
    print(json.dumps(row) if args.json else "\n".join(f"{key:18} {value}" for key, value in row.items()))


if __name__ == "__main__":
    sys.exit(main())
