"""``entrenar doctor``: what this machine offers, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import entrenar
from entrenar.cli.output import print_json
from entrenar.cli.settings import option


@dataclass(frozen=True, kw_only=True)
class Command:
    """Say what the machine offers, which versions are in use, and what is missing (then: exit code 1)."""

    json: bool = option(False, "print one JSON object")

    def run(self) -> int:
        missing = list(missing_packages())
        facts: dict[str, Any] = {
            "entrenar": entrenar.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "executable": sys.executable,
            **native(missing),
            "memory_gb": memory_gb(),
            "gpu": gpu(),
            "packages": {name: version(name) for name in needed_packages()},
            "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("ENTRENAR_")},
        }
        if self.json:
            print_json({**facts, "missing": missing})
        else:
            show(facts, missing)
        return 1 if missing else 0


def native(missing: list[str]) -> dict[str, Any]:
    """What the native core says of the CPU; a core that can't be loaded is something missing."""
    try:
        from entrenar import backend
    except ImportError as error:
        missing.append(f"the native core can't be loaded ({error}): pip install --force-reinstall entrenar")
        return {}
    cpu = backend.cpu_info()
    return {
        "cpu": cpu.get("model") or cpu.get("vendor"),
        "isa": backend.isa(),
        "available_isas": list(backend.available_isas()),
        "software_tiles": cpu.get("software_tiles"),
        "threads": backend.get_num_threads(),
        "cores": cpu.get("cores"),
        "peaks": in_billions(backend.cpu.peaks()),
    }


def in_billions(peaks: dict[str, float]) -> dict[str, float]:
    """What `cpu.peaks` gave, with units in the names."""
    units = {"f32": "f32_gflops", "bf16": "bf16_gflops", "read": "read_gb_per_s", "copy": "copy_gb_per_s"}
    return {units[name]: value / 1e9 for name, value in peaks.items()}


def limits(peaks: dict[str, float] | None) -> str:
    """In words: all threads at once, at this level, just measured; docs/performance.md says how."""
    if peaks is None:
        return "unknown"
    return (
        f"{peaks['f32_gflops']:,.0f} GFLOP/s in f32, {peaks['bf16_gflops']:,.0f} in bf16; "
        f"memory {peaks['read_gb_per_s']:.1f} GB/s read, {peaks['copy_gb_per_s']:.1f} copied"
    )


def needed_packages() -> list[str]:
    """Names of the run-time dependencies, as the installed package states them."""
    lines = metadata.requires("entrenar") or []
    return [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]


def missing_packages() -> list[str]:
    return [f"{name} is not installed: pip install {name}" for name in needed_packages() if version(name) is None]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def memory_gb() -> dict[str, float]:
    """Total and available memory, GB of 10^9 bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return {
        name: round(int(lines[key].split()[0]) * 1024 / 1e9, 1)
        for name, key in (("total", "MemTotal"), ("available", "MemAvailable"))
    }


def gpu() -> str:
    found = Path("/proc/driver/nvidia/version").exists()
    return "an NVIDIA driver is here, but this version computes on the CPU only" if found else "none"


def kernels(facts: dict[str, Any]) -> str:
    """The level in use and those there are; a build for tests that only imitates one says so."""
    note = "; a build for tests: amx by tiles made in software, slow" if facts.get("software_tiles") else ""
    return f"{facts.get('isa')} (this CPU offers {', '.join(facts.get('available_isas', ()))}{note})"


def show(facts: dict[str, Any], missing: list[str]) -> None:
    rows = {
        "entrenar": f"{facts['entrenar']}, Python {facts['python']} ({facts['executable']})",
        "system": facts["system"],
        "CPU": f"{facts.get('cpu')}, {facts.get('cores')} cores",
        "kernels": kernels(facts),
        "threads": f"{facts.get('threads')} (ENTRENAR_THREADS sets it)",
        "at most": limits(facts.get("peaks")),
        "memory": f"{facts['memory_gb']['total']} GB, {facts['memory_gb']['available']} GB available",
        "GPU": facts["gpu"],
        "packages": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        "environment": " ".join(f"{k}={v}" for k, v in facts["environment"].items()) or "ENTRENAR_… unset",
    }
    for name, value in rows.items():
        print(f"{name:<12} {value}")
    for line in missing:
        print(f"{'missing':<12} {line}")
    if not missing:
        print("nothing is missing; try: entrenar quickstart")
