"""Fuzz the safetensors reader: any bytes give a file whose tensors can be taken, or a FormatError."""

from __future__ import annotations

import _common
import atheris

with atheris.instrument_imports(include=["entrenar"]):
    from entrenar.errors import FormatError, UnsupportedError
    from entrenar.formats import safetensors


def one_input(data: bytes) -> None:
    try:
        weights = safetensors.parse(data)
    except FormatError:
        return
    assert sum(info.nbytes for info in weights.tensors.values()) <= len(data)
    for name, info in weights.tensors.items():
        try:
            assert weights[name].shape == info.shape
        except UnsupportedError:
            assert safetensors.DTYPES[info.dtype][1] is None


if __name__ == "__main__":
    _common.run(one_input, _common.weights)
