"""What has to be installed, and how long importing takes: entrenar beside torch + transformers + peft.

    python bench/peers/footprint.py --peer PEER_PYTHON

Sizes are of the installed files of a distribution and everything it requires; times are medians of whole processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

# Runs in either Python; argv: the distributions. An editable install counts the package's own files.
SIZE = """
import importlib.metadata as md, importlib.util, json, pathlib, re, sys
sizes, todo = {}, list(sys.argv[1:])
while todo:
    name = re.sub(r"[-_.]+", "-", todo.pop().lower())
    if name in sizes:
        continue
    try:
        found = md.distribution(name)
    except md.PackageNotFoundError:
        continue
    files = [pathlib.Path(found.locate_file(f)) for f in found.files or []]
    if name == "entrenar":
        files = list(pathlib.Path(importlib.util.find_spec("entrenar").origin).parent.rglob("*.*"))
    sizes[name] = sum(f.stat().st_size for f in files if f.is_file())
    todo += [re.match(r"[\\w.-]+", line)[0] for line in found.requires or [] if "extra ==" not in line]
print(json.dumps([len(sizes), sum(sizes.values()) / 1e6]))
"""
SIDES = {
    "entrenar": (["entrenar"], "import entrenar as en; en.load, en.LoraConfig, en.Trainer"),
    "peer": (["torch", "transformers", "peft"], "import torch, transformers, peft; peft.LoraConfig"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a Python with torch, transformers and peft")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object: entrenar's figure, the peer's")
    args = parser.parse_args()
    figures: dict[str, list[float]] = {"installed, with all that is required": [], "import": []}
    pythons = {"entrenar": sys.executable, "peer": args.peer}
    with tempfile.TemporaryDirectory() as empty:  # neither may import from the checkout
        for side, (distributions, statement) in SIDES.items():
            size = subprocess.run(
                [pythons[side], "-c", SIZE, *distributions], capture_output=True, text=True, check=True, cwd=empty
            )
            count, megabytes = json.loads(size.stdout)
            seconds = []
            for _ in range(args.rounds + 1):
                began = time.perf_counter()
                subprocess.run([pythons[side], "-c", statement], check=True, cwd=empty, stderr=subprocess.DEVNULL,
                               env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
                seconds.append(time.perf_counter() - began)
            median = statistics.median(seconds[1:])
            for column, figure in zip(figures.values(), (megabytes, median), strict=True):
                column.append(figure)
            text = f"{side:9s} {count:3d} distributions, {megabytes:7.1f} MB installed, import {median:.2f} s"
            print(text, file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
