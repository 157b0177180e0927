"""Train a Llama from random weights: a config of this folder, a text file, a directory for the run.

    python train.py configs/124m.toml my-text.txt run --steps 1000
"""

import argparse
import sys
import tomllib
from pathlib import Path

import entrenar as en
from entrenar.tokenizer import train_bpe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="TOML with a [model] table of ModelConfig's fields")
    parser.add_argument("text", type=Path, help="plain text to learn")
    parser.add_argument("out", type=Path, help="directory of the run")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    args = parser.parse_args()

    try:
        shape = en.ModelConfig(**tomllib.loads(args.config.read_text())["model"])
    except (KeyError, TypeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise en.errors.ConfigError(str(args.config), f"is no TOML with a [model] table: {error}") from None

    # the vocabulary: byte-level BPE of the size that the config names, learned from the text itself
    tokenizer = train_bpe([args.text.read_text(errors="replace")], shape.vocab_size)
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = shape.replace(vocab_size=tokenizer.vocab_size, **special)

    model = en.CausalLM.from_config(config, seed=0)
    model.tokenizer = tokenizer
    print(f"{en.count_parameters(model):,} parameters")

    settings = en.TrainConfig(
        out=str(args.out), max_steps=args.steps, batch_size=args.batch_size, seq_len=args.seq_len,
        random_crops=True, valid_fraction=0.1,
        learning_rate=6e-4, warmup_steps=args.steps // 20, weight_decay=0.1, adam_beta2=0.95,
    )  # fmt: skip
    result = en.Trainer(model, args.text, settings).fit()
    print(f"loss after {result.steps} steps: {result.train_loss:.3f}, on held-out text {result.eval_loss:.3f}")

    model.save(args.out / "model.gguf", dtype="f16")
    print(model.generate("The", max_new_tokens=40, temperature=0.8, top_p=0.95, seed=0).text)


if __name__ == "__main__":
    try:
        main()
    except (en.errors.EntrenarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
