"""entrenar and the PyTorch stack on the same training step, in turn: ratios of tokens a second and of memory.

    python bench/peers.py --python PEER_PYTHON [NAME ...] [--rounds 3] [--steps 5] [--json]

PEER_PYTHON is a Python with torch, transformers and peft (CPU builds). CASES names the comparisons. Every run is a
process of its own with as many threads; a round runs both, so that whatever the machine does hits both alike. The ratio
is that of the medians, the range that of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

PEER = Path(__file__).with_name("peers") / "lora_step.py"
# holds PyTorch's libraries, oneDNN and MKL, to AVX2
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


class Case(NamedTuple):
    title: str
    preset: str
    mode: str  # of the peer
    flags: tuple[str, ...] = ()  # of `entrenar bench step`
    compiled: bool = False
    avx2: bool = False
    seq_len: int = 512


LORA = "LoRA step, rank 16 on all linear layers"
CASES: dict[str, Case] = {
    "lora-0.5b-bf16": Case(f"{LORA}, Qwen2.5-0.5B, 2 x 512 tokens, bf16", "qwen2.5-0.5b", "lora-bf16"),
    "lora-0.5b-bf16-compiled": Case(
        f"{LORA}, Qwen2.5-0.5B, 2 x 512 tokens, bf16, torch.compile", "qwen2.5-0.5b", "lora-bf16", compiled=True
    ),
    "lora-0.5b-f32": Case(
        f"{LORA}, Qwen2.5-0.5B, 2 x 512 tokens, f32", "qwen2.5-0.5b", "lora-f32", ("--dtype", "f32")
    ),
    "lora-0.5b-avx2": Case(
        f"{LORA}, Qwen2.5-0.5B, 2 x 512 tokens, AVX2 (peer: f32)", "qwen2.5-0.5b", "lora-f32", ("--dtype", "bf16"),
        avx2=True,
    ),
    "qlora-0.5b": Case(
        "QLoRA step, NF4 double quantized, Qwen2.5-0.5B, 2 x 512 tokens, bf16", "qwen2.5-0.5b", "qlora",
        ("--quant", "nf4"),
    ),
    "full-124m-bf16": Case(
        "training all weights, Llama of 124M, 2 x 512 tokens, bf16", "llama-124m", "full-bf16", ("--full",)
    ),
    "full-124m-bf16-8bit": Case(
        "training all weights, Llama of 124M, 2 x 512 tokens, moments of a byte (peer: bf16)", "llama-124m",
        "full-bf16", ("--full", "--optimizer", "adamw_8bit"),
    ),
    "lora-124m-f32": Case(
        f"{LORA}, Llama of 124M, 2 x 256 tokens, f32", "llama-124m", "lora-f32", ("--dtype", "f32"), seq_len=256
    ),
}  # fmt: skip
QUICK = ("lora-0.5b-bf16", "full-124m-bf16")


def compare(case: Case, python: str, rounds: int, steps: int) -> dict[str, Any]:
    """Both sides' medians, with ratio (entrenar by peer) and its range, for speed and memory."""
    import entrenar as en
    from entrenar.models.hf_config import config_to_hf

    threads = en.get_num_threads()
    shape = ["--batch-size", "2", "--seq-len", str(case.seq_len), "--steps", str(steps)]
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(config_to_hf(en.ModelConfig.preset(case.preset), "float32")))
        own = [sys.executable, "-m", "entrenar.cli", "bench", "step", "--preset", case.preset, *shape, *case.flags]
        peer = [python, str(PEER), case.mode, "--config", str(config), *shape, "--threads", str(threads)]
        if case.compiled:
            peer.append("--compile")
        for _ in range(rounds):
            ours.append(last_line([*own, "--json"], {"ENTRENAR_ISA": "avx2"} if case.avx2 else {}))
            theirs.append(last_line(peer, AVX2 if case.avx2 else {}))
    result: dict[str, Any] = {
        "title": case.title, "peer": f"torch {theirs[0]['torch']}", "isa": ours[0]["isa"], "threads": threads,
        "rounds": rounds,
    }  # fmt: skip
    for key in ("tokens_per_second", "peak_rss_gb"):
        a, b = ([run[key] for run in runs] for runs in (ours, theirs))
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        mine, other = statistics.median(a), statistics.median(b)
        result[key] = {"entrenar": mine, "peer": other, "ratio": mine / other, "range": [min(ratios), max(ratios)]}
    return result


def last_line(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--python", required=True, help="a Python with torch, transformers and peft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object, by name")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]}; it is one of {', '.join(CASES)}")
    results = {}
    for name in args.names or QUICK:
        results[name] = found = compare(CASES[name], args.python, args.rounds, args.steps)
        out = sys.stderr if args.json else sys.stdout
        print(f"{found['title']}; {found['isa']}, {found['threads']} threads, {found['peer']}", file=out)
        for key in ("tokens_per_second", "peak_rss_gb"):
            row = found[key]
            print(f"  {key:18s} entrenar {row['entrenar']:8.2f}  peer {row['peer']:8.2f}  "
                  f"ratio {row['ratio']:.2f} ({row['range'][0]:.2f} to {row['range'][1]:.2f})", file=out, flush=True)
    if args.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
