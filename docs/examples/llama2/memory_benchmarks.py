"""How much memory LoRA and QLoRA need for a model: what `entrenar plan` says of several ranks and types.

    python memory_benchmarks.py --preset llama2-7b --ranks 16 64
"""

import argparse
import json
import subprocess
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama2-7b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--seq-len", default="512")
    args = parser.parse_args()

    print("rank  weights      trained  reduction  peak, GiB")
    for rank in args.ranks:
        for name, quant in (("16 bit", []), ("nf4", ["--quant", "nf4"])):
            flags = ["--preset", args.preset, "--rank", str(rank), "--batch-size", "1", "--seq-len", args.seq_len]
            command = [sys.executable, "-m", "entrenar.cli", "plan", *flags, *quant, "--json"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr.strip().replace("entrenar plan:", "error:"), file=sys.stderr)
                sys.exit(2)
            plan = json.loads(done.stdout)
            share = 1 - plan["trained"] / plan["parameters"]
            print(f"{rank:4}  {name:8} {plan['trained']:11,}  {share:8.3%}  {plan['predicted_peak_gb']:8.2f}")


if __name__ == "__main__":
    main()
