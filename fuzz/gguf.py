"""Fuzz the GGUF reader: any bytes give a file whose values and tensors can be taken, or a FormatError."""

from __future__ import annotations

from contextlib import suppress

import _common
import atheris

with atheris.instrument_imports(include=["entrenar"]):
    from entrenar.errors import FormatError
    from entrenar.formats import gguf_read


def one_input(data: bytes) -> None:
    try:
        model = gguf_read.parse(data)
    except FormatError:
        return
    for key in model.metadata:
        with suppress(FormatError):  # text that is not UTF-8
            model.metadata[key]
    for name, info in model.tensors.items():
        if info.qtype.served and not model.problems():
            assert model.array(name).shape == info.shape
        else:
            with suppress(FormatError):
                model.array(name)
                raise AssertionError(f"{name} of type {info.qtype.name} was given")


if __name__ == "__main__":
    _common.run(one_input, _common.ggufs)
