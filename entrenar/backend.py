"""Devices and their kernels: the one module that imports native code.

`cpu` is the module of kernels for the CPU; a Tensor carries its backend, so an op writes
``x.backend.rms_norm(...)`` and serves every device that has a module of the same names.
"""

from __future__ import annotations

from types import ModuleType

from entrenar import _native as cpu
from entrenar._native import available_isas, cpu_info, get_num_threads, isa, set_num_threads

__all__ = ["available_isas", "cpu", "cpu_info", "get_num_threads", "isa", "native", "set_num_threads"]

# device name -> its module of kernels
native: dict[str, ModuleType] = {"cpu": cpu}
