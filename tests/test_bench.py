"""What bench/ says of stored results: README's table is made of one; a regression is seen, or honestly not judged."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from entrenar.backend import cpu

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
RESULT: dict[str, Any] = {
    "machine": {"cpu": "X", "isa": "avx2", "threads": 2, "version": "1", "date": "2026-01-01"},
    "kernels": {"product": {"share": 0.8, "seconds": 1.1, "fastest": 1.0}},
    "steps": {"lora": {"share_of_peak": 0.5, "peak_rss_gb": 2.0}},
    "peers": {"lora": {"tokens_per_second": {"ratio": 7.0}, "peak_rss_gb": {"ratio": 0.3}}},
}


def kernel(share: float, seconds: float, **fastest: float) -> dict[str, float]:
    return {"share": share, "seconds": seconds, **fastest}


def script(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(BENCH / name), *args], capture_output=True, text=True, timeout=120)


@pytest.mark.tier1
def test_the_readme_has_the_table_of_the_stored_result() -> None:
    assert "<!-- bench: " in (ROOT / "README.md").read_text()
    assert script("table.py", "--check").returncode == 0, "python bench/table.py writes it"


@pytest.mark.tier1
def test_stored_results_say_where_they_come_from() -> None:
    stored = list((BENCH / "results").glob("*.json"))
    assert stored
    for path in stored:
        result = json.loads(path.read_text())
        assert {"cpu", "isa", "threads", "version", "date"} <= result["machine"].keys(), path.name


@pytest.mark.tier2
@pytest.mark.parametrize(
    ("where", "value", "code", "line"),
    [
        ((), None, 0, "5 figures, 0 gone or worse"),
        (("kernels", "product"), kernel(0.73, 1.3, fastest=1.2), 0, "5 figures, 0 gone or worse"),
        (("kernels", "product"), kernel(0.7, 1.3, fastest=1.2), 1,
         "worse  product: share of limit: 0.800 -> 0.700 (-12.5%), 1.1 -> 1.3 s, 1 -> 1.2 s"),
        (("kernels", "product"), kernel(0.7, 1.2, fastest=1.2), 0, "5 figures, 0 gone or worse"),
        (("kernels", "product"), kernel(0.7, 1.3, fastest=1.05), 0, "5 figures, 0 gone or worse"),
        (("kernels", "product"), kernel(0.8, 1.3, fastest=1.2), 0, "5 figures, 0 gone or worse"),
        (("kernels", "product"), kernel(0.7, 1.3), 1, "worse  product: share of limit"),
        (("kernels", "product"), kernel(0.7, 1.3, fastest=float("nan")), 1, "worse  product: share of limit"),
        (("kernels", "product"), kernel(1.5, 0.5, fastest=0.5), 0, "5 figures, 0 gone or worse"),
        (("steps", "lora", "share_of_peak"), 0.4, 1, "worse  lora: share of peak"),
        (("steps", "lora", "peak_rss_gb"), 2.2, 1, "worse  lora: memory, GiB: 2.000 -> 2.200 (+10.0%)"),
        (("steps", "lora", "peak_rss_gb"), 1.0, 0, "5 figures, 0 gone or worse"),
        (("peers", "lora", "tokens_per_second", "ratio"), 6.0, 1, "worse  lora: speed by the peer's"),
        (("peers", "lora", "peak_rss_gb", "ratio"), 0.33, 1, "worse  lora: memory by the peer's: 0.300 -> 0.330"),
        (("kernels", "product", "share"), float("nan"), 1, "worse  product: share of limit: 0.800 -> nan"),
        (("steps", "lora", "peak_rss_gb"), float("nan"), 1, "worse  lora: memory, GiB: 2.000 -> nan"),
        (("kernels",), {}, 1, "gone   product: of kernels"),
        (("steps",), {"other": RESULT["steps"]["lora"]}, 1, "gone   lora: of steps"),
        (("peers",), {}, 0, "3 figures, 0 gone or worse"),
        (("machine", "isa"), "avx512", 2, "these can't be compared: isa was avx2, is avx512"),
        (("machine", "version"), "2", 0, "5 figures, 0 gone or worse"),
    ],
)
def test_regressions_are_seen(
    where: tuple[str, ...], value: object, code: int, line: str, tmp_path: Path
) -> None:
    new = copy.deepcopy(RESULT)
    if where:
        inner = new
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = value
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    (tmp_path / "b.json").write_text(json.dumps(new))
    done = script("compare.py", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert (done.returncode, line in done.stdout) == (code, True), done.stdout + done.stderr


@pytest.mark.tier2
def test_a_section_that_was_not_run_is_not_missed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    (tmp_path / "b.json").write_text(json.dumps({key: RESULT[key] for key in ("machine", "kernels")}))
    done = script("compare.py", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert (done.returncode, "1 figures, 0 gone or worse" in done.stdout) == (0, True), done.stdout + done.stderr


@pytest.mark.tier2
def test_results_without_a_common_figure_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    (tmp_path / "b.json").write_text(json.dumps({"machine": RESULT["machine"]}))
    assert script("compare.py", str(tmp_path / "a.json"), str(tmp_path / "b.json")).returncode == 2


def test_every_kernel_has_a_benchmark() -> None:
    others = {"available_isas", "buffer", "codecs", "cpu_info", "fast_bf16", "flat_parts", "get_num_threads", "isa",
              "joined", "kept_bytes", "packed_bytes", "peak", "peaks", "profile_start", "profile_stop", "rope",
              "set_num_threads", "trim"}  # fmt: skip
    found = {name for name, value in vars(cpu).items() if callable(value) and not isinstance(value, type)}
    text = "".join(path.read_text() for path in BENCH.glob("kernel_*.py"))
    missing = {name for name in found - others if name[0] != "_" and f"cpu.{name}(" not in text}
    assert not missing


def test_a_benchmark_of_a_kernel_runs() -> None:
    done = script("kernels.py", "--only", "rms_norm-f32", "--debug-single-value")
    assert done.returncode == 0, done.stderr
    assert "rms_norm-f32:" in done.stdout


def test_a_benchmark_with_a_wrong_result_is_not_timed() -> None:
    wrong = (
        "import sys; sys.path.insert(0, sys.argv[1]); import kernels, kernel_layers as layers\n"
        "kernels.KERNELS['rms_norm-f32'] = 'f32', lambda: layers.rms_norm('f32', True)._replace("
        "want=lambda: (layers.rms_norm('f32', True).want()[0], kernels.np.ones(layers.HIDDEN)))\n"
        "kernels.seconds_of(1, 'rms_norm-f32')"
    )
    done = subprocess.run([sys.executable, "-c", wrong, str(BENCH)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("rms_norm-f32: the largest error is")


@pytest.mark.tier2
def test_a_streamed_model_is_made_planned_and_measured(tmp_path: Path) -> None:
    """The 124M Llama instead of the 70B one: 85 million weights of layers in mixed types, two layers in memory."""
    file = tmp_path / "m.gguf"
    words = ["--preset", "llama-124m", "--seq-len", "32", "--rank", "4", "--memory-budget", "1GB", "--json"]
    done = script("stream.py", "--file", str(file), *words)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert file.stat().st_size > 70e6
    assert row["peak_gib"] < 1.15 * row["planned_gib"]
