"""Memory of fine-tuning: LoRA and QLoRA on models of 124M to 13B parameters, as planned and, where asked for, measured.

    python bench/memory.py [--measure] [--most 3.0] [--json FILE] [--pictures FOLDER]

Rows: trained parameters (exact) and how much fewer they are, weights with their scales, the peak that `entrenar plan`
predicts and, with --measure, the peak RSS of `entrenar bench step` in a process of its own, for rows predicted to take
at most --most GiB. Bar charts are SVG, and PNG too where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

PRESETS = {"124M": "llama-124m", "0.5B": "qwen2.5-0.5b", "7B": "llama2-7b", "13B": "llama2-13b"}
RANKS = (16, 64)
WAYS = {"LoRA": (), "QLoRA": ("--quant", "nf4")}
STEP = ("--batch-size", "1", "--seq-len", "512")
COLOURS = {"LoRA": "#4477aa", "QLoRA": "#ee6677"}


def entrenar(command: str, *flags: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "entrenar.cli", *command.split(), *flags, "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    return dict(json.loads(done.stdout))


def row(model: str, way: str, rank: int, most: float) -> dict[str, Any]:
    """One line of the table; sizes in bytes, peaks in GiB. most: the largest prediction that is also measured."""
    flags = ["--preset", PRESETS[model], "--rank", str(rank), *WAYS[way], *STEP]
    if way == "QLoRA" or model in ("7B", "13B"):
        flags.append("--gradient-checkpointing")
    plan = entrenar("plan", *flags)
    predicted = plan["predicted_peak_gb"]
    measured = entrenar("bench step", *flags, "--steps", "1")["peak_rss_gb"] if predicted <= most else None
    return {
        "model": model,
        "way": way,
        "rank": rank,
        "parameters": plan["parameters"],
        "trained": plan["trained"],
        "reduction": 1 - plan["trained"] / plan["parameters"],
        "weights": sum(kind["bytes"] for kind in plan["weights"].values()),
        "predicted_gb": predicted,
        "measured_gb": measured,
        "flags": flags,
    }


HEAD = """\
| model | | rank | trained | reduction | weights, GB | peak planned, GiB | measured, GiB |
|---|---|---|---|---|---|---|---|"""


def line(r: dict[str, Any]) -> str:
    """A row in Markdown."""
    measured = "" if r["measured_gb"] is None else f"{r['measured_gb']:.2f}"
    return (f"| {r['model']} | {r['way']} | {r['rank']} | {r['trained']:,} | {r['reduction']:.3%} | "
            f"{r['weights'] / 1e9:.3f} | {r['predicted_gb']:.2f} | {measured} |")  # fmt: skip


def bars(rows: list[dict[str, Any]]) -> list[tuple[str, str, float]]:
    """Label, way and GiB of each bar: what was measured, or else what is planned."""
    named = ((f"{r['model']} {r['way']} r={r['rank']}", r) for r in rows)
    return [(label if r["measured_gb"] else f"{label} (planned)", r["way"], r["measured_gb"] or r["predicted_gb"])
            for label, r in named]  # fmt: skip


def svg(found: list[tuple[str, str, float]], title: str) -> str:
    """Horizontal bars."""
    left, width, height = 210, 520, 22
    longest = max(peak for _, _, peak in found)
    size = f'width="{left + width + 90}" height="{height * len(found) + 50}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">',
             f'<text x="10" y="22" font-size="15">{escape(title)}</text>']  # fmt: skip
    for i, (label, way, peak) in enumerate(found):
        y, length = 40 + i * height, width * peak / longest
        lines.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>')
        lines.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{height - 6}" fill="{COLOURS[way]}"/>')
        lines.append(f'<text x="{left + length + 6:.1f}" y="{y + 13}">{peak:.2f}</text>')
    return "\n".join([*lines, "</svg>", ""])


def png(found: list[tuple[str, str, float]], title: str, path: Path) -> None:
    """The same by matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(found) + 1), layout="constrained")
    labels, ways, sizes = zip(*reversed(found), strict=True)
    axes.bar_label(axes.barh(labels, sizes, color=[COLOURS[way] for way in ways]), fmt="%.2f")
    axes.set_title(title)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="run a step of those that are small enough")
    parser.add_argument("--most", type=float, default=3.0, help="GiB: the largest that is measured")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--pictures", type=Path, help="write memory.svg here, and memory.png where matplotlib is")
    args = parser.parse_args()
    most = args.most if args.measure else 0.0
    rows = []
    print(HEAD)
    for model in PRESETS:
        for rank in RANKS:
            for way in WAYS:
                rows.append(row(model, way, rank, most))
                print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if args.pictures:
        title = "Peak memory of a step of 1 x 512 tokens, GiB"
        (args.pictures / "memory.svg").write_text(svg(bars(rows), title), encoding="utf-8")
        if importlib.util.find_spec("matplotlib"):
            png(bars(rows), title, args.pictures / "memory.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
