"""How a model's layers are quantized, and the record of it that an adapter keeps: factors are fitted to those weights.

Beside PEFT's two files the record is a third, which PEFT does not read; in a GGUF adapter it is a key of the header.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path

from entrenar.errors import FormatError
from entrenar.formats import files, gguf_read
from entrenar.models.mixture import QUANTS
from entrenar.models.storage import Plain, Quantized
from entrenar.models.stream import layer_of
from entrenar.quant import QTYPES, QType

FILE, KEY = "base_quantization.json", "entrenar.base_quantization"


@dataclass(frozen=True)
class Quantization:
    """Of a model; false where the matrices of its layers are plain numbers.

    Attributes:
        types: quantized type -> how many of the layers' matrices have it.
        quant: what they were quantized to while the model was loaded, by name; None where its file has them so.
    """

    types: Mapping[str, int] = field(default_factory=dict)
    quant: str | None = None

    @classmethod
    def of(
        cls, kept: Mapping[str, Plain | Quantized | QType], quant: str | None, stored: Mapping[str, QType]
    ) -> Quantization:
        """Of weights by name that are `kept` so in memory, and `stored` so in the file: an expanded one has the values
        of its quantized type."""
        types = Counter[str]()
        for name, now in kept.items():
            was = stored.get(name)
            kind = was if was is not None and was.decodes else now if isinstance(now, QType) else now.qtype
            if kind.decodes and layer_of(name) is not None:
                types[kind.name] += 1
        return cls(dict(types), quant if types else None)

    def __bool__(self) -> bool:
        return bool(self.types)

    def __str__(self) -> str:
        return f"quantized to {self.quant or ' and '.join(sorted(self.types))}" if self else "not quantized"

    def unlike(self, base: Quantization | None) -> str | None:
        """What to say of an adapter that meets this and was trained on `base`; None where all is well."""
        if not base or base.types == self.types:
            return None
        if base.quant is None:
            cure = "load the file that it was trained on"
        elif self and self.quant is None:
            cure = f"load the 16-bit model instead, quantized to {base.quant} while loading"
        else:
            cure = f"quantize it to {base.quant} while loading"
        return f"was trained on a model {base}, and this one is {self}: it meets other weights; {cure}"


def write(directory: Path, base: Quantization | None) -> None:
    """Leaves the record beside an adapter in PEFT's format, or takes an earlier one away."""
    if base:
        files.write_json(directory / FILE, asdict(base))
    else:
        (directory / FILE).unlink(missing_ok=True)


def header(base: Quantization | None) -> dict[str, str]:
    """The record as a key of a GGUF adapter."""
    return {KEY: json.dumps(asdict(base))} if base else {}


def recorded(adapter: str | PathLike[str]) -> Quantization | None:
    """How the base of an adapter, a directory or a GGUF file, was quantized; None where there is no record.

    Raises:
        FormatError: the record, or the GGUF file, is damaged.
    """
    path = Path(adapter)
    if path.is_file():
        text = gguf_read.read(path).metadata.expect(KEY, "str", None)
        return None if text is None else _parsed(_json(text, path), path)
    return _parsed(files.read_json(path / FILE), path / FILE) if (path / FILE).exists() else None


def _json(text: str, path: Path) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, or an endless integer
        raise FormatError(path, f"key {KEY!r}", f"is not valid JSON: {error}") from error


def _parsed(raw: object, path: Path) -> Quantization:
    types = raw.get("types") if isinstance(raw, dict) else None
    if not isinstance(raw, dict) or not isinstance(types, dict) or not types:
        raise FormatError(path, "types", "is no table of types, and how many of the base's weights had them")
    for name, count in types.items():
        if name not in QTYPES or not QTYPES[name].decodes or type(count) is not int or count < 1:
            what = f"{name!r:.80} is no quantized type, or {count!r:.80} no number of weights"
            raise FormatError(path, "types", what)
    if raw.get("quant") not in (None, *QUANTS):
        raise FormatError(path, "quant", f"{raw['quant']!r:.80} is nothing that weights can be quantized to")
    return Quantization(types, raw.get("quant"))
