"""Every exception that a user of entrenar may want to catch.

Each says what is wrong, where, and what to do. All derive from `EntrenarError` and, where the standard
library has a fitting class, from that as well, so that ``except ValueError`` does what a caller expects.
"""

from __future__ import annotations

from os import PathLike


class EntrenarError(Exception):
    """Base class of all errors below."""


class UsageError(EntrenarError, ValueError):
    """A call, flag or environment variable that can't mean anything. The command line exits with 2 on it."""


class ConfigError(UsageError):
    """A configuration whose `field` has an impossible value.

    Attributes:
        field: name of the offending field, as the user wrote it.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class ShapeError(EntrenarError, ValueError):
    """Arrays whose shapes don't fit together; the message names the operation and both shapes."""


class DTypeError(EntrenarError, TypeError):
    """An array of a type that the operation does not take."""


class GraphError(EntrenarError, RuntimeError):
    """A backward pass that can't be run: its graph was freed, or nothing in it requires a gradient."""


class FormatError(EntrenarError, ValueError):
    """A file that is not what it claims to be, or is damaged.

    Attributes:
        path: the file; where: byte offset, field or tensor at fault; reason: what is wrong.
    """

    def __init__(self, path: str | PathLike[str], where: str, reason: str) -> None:
        super().__init__(f"{path}: {where}: {reason}" if where else f"{path}: {reason}")
        self.path = str(path)
        self.where = where
        self.reason = reason


class UnsupportedError(FormatError):
    """A well-formed file that asks for what entrenar does not serve (architecture, type, config key)."""


class TokenizerError(EntrenarError, ValueError):
    """A vocabulary, merge list or chat template that can't be used."""


class DataError(EntrenarError, ValueError):
    """Training or evaluation data that can't be used; the message names the file and the line or sample."""


class AdapterError(EntrenarError, ValueError):
    """An adapter that does not fit the model, or an adapter operation that has no meaning now."""


class CheckpointError(EntrenarError, RuntimeError):
    """A checkpoint that is incomplete, damaged or of another run."""


class MemoryLimitError(EntrenarError, MemoryError):
    """Something that would not fit into memory; the message gives the predicted and the available size."""


class NonFiniteError(EntrenarError, ArithmeticError):
    """NaN or infinity where training can't go on."""


class BackendError(EntrenarError, RuntimeError):
    """The native core or a device failed, or the requested instruction set or device is not here."""
