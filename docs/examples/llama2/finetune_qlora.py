"""QLoRA: fine-tune a model whose weights stay in 4 bit. A quantized GGUF is trained as it is.

    python finetune_qlora.py llama-2-7b.Q4_K_M.gguf data.jsonl run
    python finetune_qlora.py llama-2-7b-hf data.jsonl run --quant nf4
"""

import argparse
import sys
from pathlib import Path

import entrenar as en


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file or a Hugging Face directory")
    parser.add_argument("data", help="text, JSONL, or a directory with train.jsonl and valid.jsonl")
    parser.add_argument("out", type=Path, help="directory of the run")
    parser.add_argument("--quant", help="nf4, q4_0 and so on, for a model in 16 bit")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory-budget", default="auto", help="such as 6GB; layers are recomputed to keep to it")
    args = parser.parse_args()

    model = en.load(args.model, quant=args.quant)
    model.add_lora(en.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"))
    print(f"{en.count_parameters(model):,} parameters are trained")

    settings = en.TrainConfig(
        out=str(args.out),
        max_steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        memory_budget=args.memory_budget,
    )
    trainer = en.Trainer(model, args.data, settings)
    print(f"{trainer.plan.predicted / 2**30:.2f} GiB at the peak, {trainer.plan.recomputed} layers computed again")
    print(f"training loss {trainer.fit().train_loss:.3f}")
    model.save_adapter(args.out / "adapter")


if __name__ == "__main__":
    try:
        main()
    except (en.errors.EntrenarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
