"""The peer of a training step: PyTorch + transformers + PEFT on random weights and tokens; bench/peers.py runs it.

    PEER_PYTHON bench/peers/lora_step.py lora-bf16 --config CONFIG.json [--batch-size 2] [--seq-len 512] [--rank 16]
        [--steps 5] [--threads 2] [--compile]

MODE: lora-bf16 lora-f32 full-bf16 full-f32, where the type is that of weights and arithmetic, or qlora: bitsandbytes'
NF4, double quantized, under arithmetic in bf16. CONFIG.json is a Hugging Face config. One step warms up (two with
--compile, which takes minutes). Prints JSON; speaks of nothing but PyTorch's stack, so it needs entrenar neither to run
nor to be fair.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save(config: Any, folder: str) -> None:
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def quantized(config: Any) -> Any:
    """A random model, saved by another process, whose memory is not this one's, and loaded in 4 bits."""
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        child = multiprocessing.get_context("spawn").Process(target=save, args=(config, folder))
        child.start()
        child.join()
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=nf4, dtype=torch.bfloat16, device_map="cpu", attn_implementation="sdpa"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["lora-bf16", "lora-f32", "full-bf16", "full-f32", "qlora"])
    parser.add_argument("--config", required=True, help="a config.json")
    for name, default in (("batch-size", 2), ("seq-len", 512), ("rank", 16), ("steps", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with open(args.config) as file:
        config = AutoConfig.for_model(**json.load(file))
    if args.mode == "qlora":
        model = quantized(config)
    else:
        dtype = torch.bfloat16 if args.mode.endswith("bf16") else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if "lora" in args.mode:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0.0, target_modules=LAYERS, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
    model.train()
    if args.compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, config.vocab_size, (args.batch_size, args.seq_len))
    warm_up = 2 if args.compile else 1
    seconds = []
    for _ in range(warm_up + args.steps):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    result = {
        "mode": args.mode,
        "compiled": args.compile,
        "torch": torch.__version__,
        "threads": args.threads,
        "seconds_per_step": statistics.median(seconds[warm_up:]),
        "tokens_per_second": ids.numel() / statistics.median(seconds[warm_up:]),
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
