"""The same LoRA step here and in PyTorch + transformers + PEFT, in turn: ratios of tokens a second and of memory.

    python bench/peers/lora_step.py --peer PEER_PYTHON [--preset llama-124m] [--batch-size 2] [--rounds 3]

PEER_PYTHON is a Python with torch, transformers and peft (CPU builds); each run is a process of its own, with as many
threads. f32 on both sides, random weights of the same shape, all linear layers, no dropout. Each round runs both; the
ratio is that of the medians, and the spread is that of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

STEP = Path(__file__).resolve().parents[1] / "step.py"

# Runs in the peer's Python; argv: config.json's fields, batch size, sequence length, rank, steps, threads.
PEER = """
import json, resource, statistics, sys, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
fields, (batch, seq, rank, steps, threads) = json.loads(sys.argv[1]), map(int, sys.argv[2:])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, task_type="CAUSAL_LM"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
ids = torch.randint(0, fields["vocab_size"], (batch, seq))
seconds = []
for _ in range(steps + 1):
    began = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - began)
print(json.dumps({
    "tokens_per_second": batch * seq / statistics.median(seconds[1:]),
    "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}))
"""


def last_line(command: list[str]) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a Python with torch, transformers and peft")
    parser.add_argument("--preset", default="llama-124m")
    for name, default in (("batch-size", 2), ("seq-len", 256), ("rank", 16), ("steps", 5), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()

    import entrenar as en
    from entrenar.models.hf_config import config_to_hf

    fields = config_to_hf(en.ModelConfig.preset(args.preset), "float32")
    numbers = [str(n) for n in (args.batch_size, args.seq_len, args.rank, args.steps)]
    names = ("--batch-size", "--seq-len", "--rank", "--steps")
    flags = [word for pair in zip(names, numbers, strict=True) for word in pair]
    ours, theirs = [], []
    for _ in range(args.rounds):
        ours.append(last_line([sys.executable, str(STEP), "--json", "--preset", args.preset, *flags]))
        peer = [args.peer, "-c", PEER, json.dumps(fields), *numbers, str(en.get_num_threads())]
        theirs.append(last_line(peer))
    shape = f"{args.batch_size}x{args.seq_len} tokens, rank {args.rank}"
    print(f"{args.preset}, {shape}, f32, {en.get_num_threads()} threads")
    for key in ("tokens_per_second", "peak_rss_gb"):
        a, b = ([run[key] for run in runs] for runs in (ours, theirs))
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        print(
            f"{key:18s} entrenar {statistics.median(a):8.2f}  peer {statistics.median(b):8.2f}  "
            f"ratio {statistics.median(a) / statistics.median(b):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
