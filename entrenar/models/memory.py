"""What a model will take in memory, and what there is: asked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from entrenar.backend import cpu
from entrenar.errors import ConfigError, MemoryLimitError

UNITS = {"": 1} | {f"{prefix}B": 1000**i for i, prefix in enumerate(("", "K", "M", "G", "T"))}
UNITS |= {f"{prefix}iB": 1024**i for i, prefix in enumerate(("", "K", "M", "G", "T"))}


def available_bytes() -> int:
    """Bytes that can still be allocated: the system's estimate, or what the control group leaves if that is less, and
    the freed results that the kernels keep for later ones."""
    info = Path("/proc/meminfo").read_text()
    free = next(int(line.split()[1]) * 1024 for line in info.splitlines() if line.startswith("MemAvailable"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            text = Path(limit).read_text().strip()
            if text != "max":
                free = min(free, int(text) - int(Path(used).read_text()))
        except OSError:
            continue  # this control group version is not mounted
    return max(free, 0) + cpu.kept_bytes()


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, without what its kernels keep for later results."""
    return max(_status("VmRSS") - cpu.kept_bytes(), 0)


def peak_resident_bytes() -> int:
    """The most memory that this process had in RAM at once, mapped files included."""
    return _status("VmHWM")  # getrusage would count the process that started this one as well


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))


def require(sizes: Mapping[str, int], what: str) -> None:
    """Refuses what does not fit.

    Args:
        sizes: weight -> bytes it will take; what: names the model in the message.

    Raises:
        MemoryLimitError: the weights need more than is available; the message gives both numbers.
    """
    needed, free = sum(sizes.values()), available_bytes()
    if needed > free:
        raise MemoryLimitError(
            f"{what} needs {gigabytes(needed)} for its weights alone and {gigabytes(free)} are available; "
            "close other programs, or use a smaller model or a 16-bit type"
        )


def gigabytes(size: int) -> str:
    """Bytes as text, in units of 10^9, below 0.01 of 10^6."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"


def parse_bytes(field: str, text: str) -> int:
    """Bytes from a text such as ``"1.3GB"`` (10^9) or ``"800 MiB"`` (2^20).

    Raises:
        ConfigError: it is none; the error names `field`.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ConfigError(field, f"{text!r} is no size such as 1.3GB or 800MB")
    return int(float(match[1]) * units[match[2].lower()])
