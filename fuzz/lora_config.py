"""Any adapter_config.json is a LoraConfig that answers for every layer, or an EntrenarError."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["entrenar"]):
    from entrenar.errors import EntrenarError
    from entrenar.models.adapter import read_config

from seeds import formats

LAYER = "layers.0.q_proj"  # short: patterns come from the file, and a hostile one takes time exponential in this
FILE = Path(tempfile.mkdtemp()) / "adapter_config.json"


def one_input(data: bytes) -> None:
    FILE.write_bytes(data)
    try:
        config = read_config(FILE)
    except EntrenarError:
        return
    assert 1 <= config.rank_of(LAYER) <= 512
    assert config.scale_of(LAYER) > 0
    config.selects(LAYER)


if __name__ == "__main__":
    formats.plant(formats.adapter_configs)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
