"""Fine-tune your own model with LoRA: a GGUF file or a Hugging Face directory, and your data.

    python finetune_lora.py llama-2-7b.gguf data.jsonl run --prompt "Once upon a time"
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
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", default="")
    args = parser.parse_args()

    model = en.load(args.model)
    before = model.generate(args.prompt, max_new_tokens=40).text

    # rank 16 on every linear layer; the base stays frozen, only these matrices are trained
    model.add_lora(en.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"))
    total, trained = en.count_parameters(model, trainable_only=False), en.count_parameters(model)
    print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)")

    settings = en.TrainConfig(
        out=str(args.out),
        max_steps=args.steps,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        warmup_steps=args.steps // 20,
    )
    result = en.Trainer(model, args.data, settings).fit()
    print(f"training loss {result.train_loss:.3f}, validation loss {result.eval_loss or float('nan'):.3f}")

    model.save_adapter(args.out / "adapter")  # PEFT's format: loads there as well
    model.merge_adapter()
    model.save(args.out / "merged.gguf", dtype="f16")  # one file, for llama.cpp and for `entrenar generate`
    print("before:", before)
    print("after: ", model.generate(args.prompt, max_new_tokens=40).text)


if __name__ == "__main__":
    try:
        main()
    except (en.errors.EntrenarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
