"""How fast packed weights are decoded into the panels of products: 10⁹ weights a second and core, both ways (decode.c).

    python bench/decode.py [--isa avx512_bf16 ...] [--types nf4 q4_k ...] [--rounds 3] [--json]

The packing of a product alone, into a buffer in L2, each value checked first; forward is x·Wᵀ, input g·W. In the type
that the level multiplies in: bf16 where it has an engine for that, else f32. The best of all rounds counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
TYPES = ("nf4", "nf4-f32", "fp4", "fp4-f32", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q4_k", "q5_k", "q6_k")
# level -> what the compiler is told, as in CMakeLists.txt, and the type of its products
LEVELS = {
    "avx2": ("-march=x86-64-v3", "f32"),
    "avx512": ("-march=x86-64-v4 -mprefer-vector-width=512", "f32"),
    "avx512_bf16": ("-march=x86-64-v4 -mprefer-vector-width=512 -mavx512bf16", "bf16"),
    "amx": ("-march=x86-64-v4 -mprefer-vector-width=512 -mavx512bf16 -mamx-tile -mamx-bf16", "bf16"),
}
WAYS = ("forward", "input")


def build(isa: str, folder: Path) -> Path:
    """decode.c with the level's kernels in it, and what these stand on."""
    program = folder / f"decode-{isa}"
    core = [CSRC / f"{name}.c" for name in ("threads", "cores", "memory", "blocks", "profile")]
    flags = f"-O3 -std=gnu11 -ffp-contract=off -fno-math-errno {LEVELS[isa][0]}".split()
    level = f'-DLEVEL="{CSRC / "isa" / isa}.c"'
    command = [os.environ.get("CC", "cc"), *flags, level, "-I", CSRC, "-o", program, HERE / "decode.c", *core,
               *sorted((CSRC / "quant").glob("*.c")), "-pthread", "-lm"]  # fmt: skip
    subprocess.run(command, check=True)
    return program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", choices=LEVELS)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a type and way in a round")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    from entrenar import backend

    rates: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for isa in args.isa or [isa for isa in LEVELS if isa in backend.available_isas()]:
            program, kind = build(isa, Path(folder)), LEVELS[isa][1]
            rows = rates[isa] = {name: dict.fromkeys(WAYS, 0.0) for name in args.types}
            for _ in range(args.rounds):
                for name, row in rows.items():
                    for way in WAYS:
                        command = [program, name, kind, way, str(args.seconds)]
                        found = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                        row[way] = max(row[way], found / 1e9)
            if not args.json:
                print(f"{isa}, {kind}: 10⁹ weights a second, one core")
                for name, row in rows.items():
                    print(f"  {name:8} forward {row['forward']:6.1f}   input {row['input']:6.1f}", flush=True)
    if args.json:
        print(json.dumps(rates))


if __name__ == "__main__":
    sys.exit(main())
