"""What tests ask for when they depend on the machine: `from support import need_isa`."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def need_isa(isa: str) -> None:
    """Skip unless the CPU offers this level of the native kernels."""
    from entrenar import backend

    if isa not in backend.available_isas():
        pytest.skip(f"the CPU lacks {isa}")


def need_oracle(name: str) -> ModuleType:
    """The development-only module `name`, or skip."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"the oracle {name} is not installed")
    return importlib.import_module(name)


def need_gpu() -> None:
    """Skip unless the machine has an NVIDIA GPU and entrenar its CUDA kernels."""
    if not Path("/dev/nvidiactl").exists() or importlib.util.find_spec("entrenar._cuda") is None:
        pytest.skip("no GPU")
