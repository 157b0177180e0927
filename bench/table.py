"""README's table of comparisons, made from a stored result.

    python bench/table.py [--check]

README.md names the result between its markers, `<!-- bench: bench/results/FILE.json -->` and `<!-- /bench -->`; what
stands between them is replaced. With --check nothing is written, and the exit code is 1 where it would change.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- bench: (\S+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


def rows(result: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, entrenar, the PyTorch stack, ratio)"""
    lines = []
    for case in result.get("peers", {}).values():
        for key, what, unit, digits in (
            ("tokens_per_second", case["title"], "tokens/s", ",.0f"),
            ("peak_rss_gb", "peak memory of that run", "GiB", ".2f"),
        ):
            row = case[key]
            low, high = row["range"]
            spread = "" if f"{low:.2f}" == f"{high:.2f}" else f" ({low:.2f} to {high:.2f})"
            sides = [f"{row[side]:{digits}} {unit}" for side in ("entrenar", "peer")]
            lines.append((what, *sides, f"{row['ratio']:.2f}{spread}"))
    for what, unit, digits in (("installed, with all that is required", "MB", ",.0f"), ("import", "s", ".2f")):
        pair = result.get("footprint", {}).get(what)
        if pair:
            mine, other = pair
            lines.append((what, f"{mine:{digits}} {unit}", f"{other:{digits}} {unit}", f"{mine / other:.2f}"))
    return lines


def table(result: Mapping[str, Any]) -> str:
    """The lines between the markers."""
    about = result["machine"]
    peer = next((case["peer"] for case in result.get("peers", {}).values()), "torch")
    lines = [
        f"{about['threads']} threads of {about['cpu']}, level `{about['isa']}`, entrenar {about['version']} beside "
        f"{peer}, {about['date']}; ratios of medians of runs in turn, with their range:",
        "",
        "| | entrenar | PyTorch stack | ratio |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows(result)),
    ]
    steps = result.get("steps", {})
    if steps:
        lines += ["", "| a step alone | tokens/s | share of peak | peak memory |", "|---|---|---|---|"]
        for name, row in steps.items():
            lines.append(f"| {name} ({row['isa']}, threads: {row['threads']}) | {row['tokens_per_second']:,.0f} | "
                         f"{row['share_of_peak']:.0%} | {row['peak_rss_gb']:.2f} GiB |")  # fmt: skip
    return "\n".join([*lines, ""])


def renewed(text: str) -> str:
    """A page with the table of the result that it names."""
    return MARKED.sub(lambda m: m[1] + table(json.loads((ROOT / m[2]).read_text(encoding="utf-8"))) + m[4], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = ROOT / "README.md"
    old = page.read_text(encoding="utf-8")
    new = renewed(old)
    if args.check:
        return int(new != old)
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
