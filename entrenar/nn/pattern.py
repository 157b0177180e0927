"""Regular expressions by which an adapter's settings name layers.

`re` backtracks: ``(.?)*x`` on a module path of forty letters would outlast us all. The patterns of rank_pattern and
alpha_pattern come with downloaded adapters and are tried while one is loaded, so what they may cost is bounded here.
Those of target_modules and exclude_modules may be any; beyond the bound, only whoever gave them tries them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TypeAlias

from entrenar.errors import ConfigError

MAX_LENGTH = 4096  # characters; case-insensitive classes take milliseconds each to compile
MAX_WAYS = 8192  # of all patterns of a field together, see `ways`
PATH_LENGTH = 64  # a module path is hardly longer

_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?:?|.", re.DOTALL)


Endings: TypeAlias = list[tuple[re.Pattern[str], float]]


def compiled(field: str, pattern: str) -> re.Pattern[str]:
    """The pattern, or a ConfigError that names the field."""
    if len(pattern) > MAX_LENGTH:
        raise ConfigError(field, f"a pattern of {len(pattern)} characters; at most {MAX_LENGTH} are taken")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(field, f"{pattern!r} is not a regular expression: {error}") from error


def endings(field: str, values: Mapping[str, float]) -> Endings:
    """Patterns that match where a key matches the end of a path, from a dot on, as PEFT has it; with their values."""
    total = 0.0
    for key in values:
        compiled(field, key)  # alone, or "a)*(b" would get past `ways`
        total += max(ways(key), len(key) / PATH_LENGTH)
        if total > MAX_WAYS:
            raise ConfigError(field, f"{key[:80]!r} could take too long; repeat no group, have at most two of * + {{}}")
    return [(compiled(field, rf"(.*\.)?({key})$"), value) for key, value in values.items()]


def bounded(pattern: str) -> bool:
    """Whether a pattern can be tried on paths by somebody who did not write it."""
    return ways(pattern) <= MAX_WAYS


def ways(pattern: str) -> float:
    """In how many ways, at most, a matcher that backtracks can try the pattern at one place of a path.

    Alternatives add up, what follows each other multiplies, a repeated character counts PATH_LENGTH; infinite for a
    repeated group and for what begins with (? other than (?:.
    """
    outer: list[tuple[float, float]] = []  # of the groups around: closed alternatives, and the open one so far
    closed, open_, last, group = 0.0, 1.0, 1.0, False  # `last`: the piece that a quantifier would repeat
    for piece in _PIECE.findall(pattern):
        if piece == "(?":
            return math.inf
        if piece in ("(", "(?:"):
            outer.append((closed, open_ * last))
            closed, open_, last = 0.0, 1.0, 1.0
        elif piece == ")" and outer:
            last, group = closed + open_ * last, True
            closed, open_ = outer.pop()
        elif piece == "|":
            closed, open_, last, group = closed + open_ * last, 1.0, 1.0, False
        elif piece == "?":
            last += 1
        elif piece in "*+{":
            last = math.inf if group else last * PATH_LENGTH
        else:
            open_, last, group = open_ * last, 1.0, False
    return closed + open_ * last
