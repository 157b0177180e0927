"""``entrenar tokenize``: the ids and pieces that a model's tokenizer makes of a text. No weights are read."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from entrenar.cli.inspect import printable
from entrenar.cli.output import print_json
from entrenar.cli.settings import option, positional, required
from entrenar.errors import FormatError, UsageError
from entrenar.formats import gguf_read
from entrenar.tokenizer import Tokenizer, from_directory, from_gguf


@dataclass(frozen=True, kw_only=True)
class Command:
    """Show how a model's tokenizer splits a text: one line a token, its id and its piece."""

    model: str = required("a GGUF file, or a directory with a tokenizer.json")
    text: str = positional("the text; - reads it from standard input", empty=True)
    special: bool = option(True, "frame the text with begin and end tokens, as the model wants them")
    json: bool = option(False, "print one JSON object: ids and pieces")

    def run(self) -> int:
        tokenizer = load_tokenizer(self.model)
        ids = tokenizer.encode(sys.stdin.read() if self.text == "-" else self.text, add_special=self.special)
        pieces = [tokenizer.token(i) for i in ids]
        if self.json:
            print_json({"ids": ids, "pieces": pieces, "count": len(ids)})
        else:
            width = len(str(max(ids, default=0)))
            for i, piece in zip(ids, pieces, strict=True):
                print(f"{i:>{width}}  {printable(piece)}")
        return 0


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a GGUF file or a directory, without the weights."""
    path = Path(model)
    if path.is_dir():
        tokenizer = from_directory(path)
    elif path.is_file():
        tokenizer = from_gguf(gguf_read.read(path).metadata)
    else:
        raise FormatError(path, "", "no such file or directory")
    if tokenizer is None:
        raise UsageError(f"{path} has no tokenizer")
    return tokenizer
