"""Has anything become slower, or larger, than a stored result says?

    python bench/compare.py STORED.json NEW.json [--threshold 0.1] [--memory-threshold 0.05]

Speeds of steps are compared as shares of the limits that were measured in the same run, ratios to a peer as they are,
and a peer's own speed moves with the hour. A kernel is slower where its share of the limits is smaller and its median
and its fastest run are longer: a machine that clocks lower today, or lends more bandwidth than it did, is no
regression. So a machine that clocks higher may hide one, as does a single fast run. Exit code 1 where a figure of both
is worse by more than its threshold, or no number, or where a kernel or step is gone from a section that NEW has; 2
where CPU, level or threads differ, so that nothing can be said.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SAME = ("cpu", "isa", "threads")
WHOLE = ("kernels", "steps")  # sections that are run whole, peers by case


class Figure(NamedTuple):
    value: float
    less: bool = False  # is better
    seconds: tuple[float, ...] = ()  # median and fastest: where the value is worse they are longer, or a limit moved


def figures(result: Mapping[str, Any]) -> dict[str, Figure]:
    """All that is compared, by name."""
    found = {}
    for name, row in result.get("kernels", {}).items():  # results before 2026-11-29 lack the fastest run
        found[f"{name}: share of limit"] = Figure(row["share"], seconds=(row["seconds"], row.get("fastest", math.nan)))
    for name, row in result.get("steps", {}).items():
        found[f"{name}: share of peak"] = Figure(row["share_of_peak"])
        found[f"{name}: memory, GiB"] = Figure(row["peak_rss_gb"], less=True)
    for name, row in result.get("peers", {}).items():
        found[f"{name}: speed by the peer's"] = Figure(row["tokens_per_second"]["ratio"])
        found[f"{name}: memory by the peer's"] = Figure(row["peak_rss_gb"]["ratio"], less=True)
    return found


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
    before = figures(stored)
    worse = compared = 0
    for section in WHOLE:
        if section in new:
            gone = sorted(stored.get(section, {}).keys() - new[section].keys())
            worse += len(gone)
            for name in gone:
                print(f"gone   {name}: of {section}, stored but not measured")
    for name, now in figures(new).items():
        if name not in before:
            continue
        compared += 1
        then, change = before[name], now.value / before[name].value - 1
        limit = args.memory_threshold if now.less else args.threshold
        longer = all(not b <= a * (1 + limit) for a, b in zip(then.seconds, now.seconds, strict=True))  # NaN is longer
        if math.isnan(change) or (longer and (change if now.less else -change) > limit):
            worse += 1
            times = "".join(f", {a:.3g} -> {b:.3g} s" for a, b in zip(then.seconds, now.seconds, strict=True))
            print(f"worse  {name}: {then.value:.3f} -> {now.value:.3f} ({change:+.1%}){times}")
    if not compared and not worse:
        print("these can't be compared: they have no figure in common")
        return 2
    print(f"{compared} figures, {worse} gone or worse than in {args.stored} by more than the threshold")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
