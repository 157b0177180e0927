"""The command line: `main` finds the command in a table and turns every error into one line and an exit code.

Only the chosen command's module is imported, so that ``entrenar --help`` answers at once.
"""

from __future__ import annotations

import difflib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from types import FrameType, MappingProxyType
from typing import NoReturn

from entrenar.errors import EntrenarError, UsageError

# command -> (module with `Command`, a frozen dataclass of settings whose `run` does the work; help)
COMMANDS = MappingProxyType(
    {
        "quickstart": ("entrenar.cli.quickstart", "the whole story on bundled data in about a minute"),
        "train": ("entrenar.cli.train", "train a model from random weights"),
        "finetune": ("entrenar.cli.finetune", "teach a model you have: LoRA on your own data"),
        "generate": ("entrenar.cli.generate", "continue a prompt"),
        "chat": ("entrenar.cli.chat", "talk with a model in the terminal"),
        "eval": ("entrenar.cli.evaluate", "how well a model predicts a text: nll, perplexity, tokens"),
        "tokenize": ("entrenar.cli.tokenize", "a text as the model's tokens"),
        "inspect": ("entrenar.cli.inspect", "what a file or directory holds, and is it well formed"),
        "merge": ("entrenar.cli.merge", "add an adapter into the weights and save the model"),
        "convert": ("entrenar.cli.convert", "between GGUF and Hugging Face directories, and between types"),
        "plan": ("entrenar.cli.plan", "how much memory a training step will take, and what would make it fit"),
        "quantize": ("entrenar.cli.quantize", "a model's matrices in fewer bits, as GGUF"),
        "bench": ("entrenar.cli.bench", "training steps: speed, memory, and where the time goes"),
        "doctor": ("entrenar.cli.doctor", "CPU level, threads, GPU, versions; what is missing"),
    }
)

LEVELS = ("debug", "info", "warning", "error")  # values of ENTRENAR_LOG
OK, FAILURE, USAGE = 0, 1, 2
STREAMS = (("stdin", "r", "surrogateescape"), ("stdout", "w", "replace"), ("stderr", "w", "replace"))
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # as a shell reports the signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 a failure, 2 wrong usage."""
    args = list(sys.argv[1:] if argv is None else argv)
    name = args[0] if args and args[0] in COMMANDS else ""
    prog = f"entrenar {name}".rstrip()
    _prepare_streams()
    if argv is None:
        signal.signal(signal.SIGTERM, _terminated)
    try:
        code = _dispatch(name, args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail(prog, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader is gone; a null device in its place keeps the interpreter's last flush from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except UsageError as error:
        return _fail(prog, str(error), USAGE)
    except EntrenarError as error:
        return _fail(prog, str(error), FAILURE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(prog, f"{where}{error.strerror or error}", FAILURE)
    except MemoryError as error:
        return _fail(prog, f"out of memory {error}".rstrip(), FAILURE)
    except Exception as error:  # the last line of defence: whatever arrives here is a fault of this program
        what = f"internal error: {type(error).__name__}: {error}; ENTRENAR_LOG=debug shows where"
        return _fail(prog, what, FAILURE)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """Ends in order, so that half-written files are taken away."""
    sys.exit(TERMINATED)


def _prepare_streams() -> None:
    """A closed stream becomes the null device; a character that can't be shown or read is no reason to stop."""
    for name, mode, errors in STREAMS:
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the end)
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)


def _dispatch(name: str, args: list[str]) -> int:
    level = os.environ.get("ENTRENAR_LOG") or "warning"
    if level not in LEVELS:
        raise UsageError(f"ENTRENAR_LOG is {level!r}; it may be {', '.join(LEVELS)}")
    if name:
        from entrenar.cli.settings import parse

        command = import_module(COMMANDS[name][0]).Command
        settings = parse(command, args[1:], f"entrenar {name}")
        return OK if settings is None else int(settings.run())
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return OK if args else USAGE
    if args[0] == "--version":
        from entrenar import __version__

        print(f"entrenar {__version__}")
        return OK
    near = difflib.get_close_matches(args[0], COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "entrenar --help lists them"
    raise UsageError(f"there is no command {args[0]!r}; {hint}")


def overview() -> str:
    """What ``entrenar --help`` prints."""
    width = max(map(len, COMMANDS)) + 2
    rows = (f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items())
    return "\n".join(
        [
            "usage: entrenar COMMAND [flags] [key=value …]",
            "",
            "Fine-tune, train and run Llama-family models on the machine you have.",
            "",
            *rows,
            "",
            "entrenar COMMAND --help lists a command's flags; --config F.toml reads them from a file.",
            "Environment: ENTRENAR_ISA (scalar | avx2 | avx512 | avx512_bf16 | amx), ENTRENAR_THREADS, ENTRENAR_LOG",
            "(debug shows where an error came from). Exit codes: 0 done, 1 a failure, 2 wrong usage.",
        ]
    )


def _fail(prog: str, message: str, code: int) -> int:
    """One line on stderr, and the traceback before it where it was asked for."""
    if os.environ.get("ENTRENAR_LOG") == "debug":
        traceback.print_exc()
    line = " ".join(message.split())
    print(f"{prog}: {line}", file=sys.stderr)
    return code
