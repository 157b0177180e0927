"""What a command prints: results on stdout (``--json``: one JSON object), all else on stderr."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def note(text: str) -> None:
    """A line for the person at the terminal, never part of the result."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def noted_warnings() -> Iterator[None]:
    """What the library warns of within is a note, without the line of code that Python names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        note(f"warning: {warning.message}")


def print_json(result: Mapping[str, Any]) -> None:
    """The result as one line of JSON; NaN and infinity, which JSON lacks, become null."""
    print(json.dumps(_finite(result), ensure_ascii=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def size(nbytes: int) -> str:
    """"512 bytes", "1.3 MB", "4.1 GB": decimal, as file sizes are."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes} bytes"
