"""Has anything become slower, or larger, than a stored result says?

    python bench/compare.py STORED.json NEW.json [--threshold 0.1] [--memory-threshold 0.05]

Speeds are compared as shares of the limits that were measured in the same run, ratios to a peer as they are: a machine
that clocks lower today is no regression. Exit code 1 where a figure of both is worse by more than its threshold, or no
number, or where a kernel or step is gone from a section that NEW has; 2 where CPU, level or threads differ, so that
nothing can be said.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SAME = ("cpu", "isa", "threads")
WHOLE = ("kernels", "steps")  # sections that are run whole, peers by case


def figures(result: Mapping[str, Any]) -> Iterator[tuple[str, float, bool]]:
    """(name, value, is less better) of all that is compared."""
    for name, row in result.get("kernels", {}).items():
        yield f"{name}: share of limit", row["share"], False
    for name, row in result.get("steps", {}).items():
        yield f"{name}: share of peak", row["share_of_peak"], False
        yield f"{name}: memory, GiB", row["peak_rss_gb"], True
    for name, row in result.get("peers", {}).items():
        yield f"{name}: speed by the peer's", row["tokens_per_second"]["ratio"], False
        yield f"{name}: memory by the peer's", row["peak_rss_gb"]["ratio"], True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stored", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=0.1, help="of speeds")
    parser.add_argument("--memory-threshold", type=float, default=0.05)
    args = parser.parse_args()
    stored, new = (json.loads(path.read_text(encoding="utf-8")) for path in (args.stored, args.new))
    for key in SAME:
        a, b = stored["machine"][key], new["machine"][key]
        if a != b:
            print(f"these can't be compared: {key} was {a}, is {b}")
            return 2
    before = {name: value for name, value, _ in figures(stored)}
    worse = compared = 0
    for section in WHOLE:
        if section in new:
            gone = sorted(stored.get(section, {}).keys() - new[section].keys())
            worse += len(gone)
            for name in gone:
                print(f"gone   {name}: of {section}, stored but not measured")
    for name, value, less in figures(new):
        if name not in before:
            continue
        compared += 1
        change = value / before[name] - 1
        limit = args.memory_threshold if less else args.threshold
        if not (change if less else -change) <= limit:  # NaN is worse
            worse += 1
            print(f"worse  {name}: {before[name]:.3f} -> {value:.3f} ({change:+.1%})")
    if not compared and not worse:
        print("these can't be compared: they have no figure in common")
        return 2
    print(f"{compared} figures, {worse} gone or worse than in {args.stored} by more than the threshold")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
