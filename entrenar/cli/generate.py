"""``entrenar generate``: a model continues a prompt on stdout.

Stdout holds the new text byte for byte, and a newline after it only where stdout is a terminal.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from entrenar.cli.model import ModelSettings, SamplingSettings, tokenizer_of
from entrenar.cli.output import print_json
from entrenar.cli.settings import option, required
from entrenar.generate import Generation, GenerationStream


@dataclass(frozen=True, kw_only=True)
class Command(SamplingSettings, ModelSettings):
    """Continue a prompt.

    Prints the new text as it comes, exactly; a newline follows only in a terminal.
    """

    prompt: str = required("the text to continue; - reads it from standard input", empty=True)
    json: bool = option(False, "print one JSON object instead: text, ids, finish_reason, timing")

    def run(self) -> int:
        model = self.load()
        tokenizer_of(model, self.model)
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        start = time.perf_counter()
        pieces = model.generate(prompt, stream=True, **self.sampling())
        assert isinstance(pieces, GenerationStream)
        if self.json:
            print_json(report(pieces.drain(), time.perf_counter() - start))
            return 0
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        if sys.stdout.isatty():
            sys.stdout.write("\n")
        return 0


def report(result: Generation, seconds: float) -> dict[str, object]:
    return {
        "text": result.text,
        "ids": result.ids,
        "prompt_tokens": len(result.prompt_ids),
        "new_tokens": len(result.ids),
        "finish_reason": result.finish_reason,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(len(result.ids) / seconds, 2),
    }
