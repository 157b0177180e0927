"""One sample as the model will see it, for the eye: what is learned and what is only read."""

from __future__ import annotations

from itertools import groupby

from rich.markup import escape

from entrenar.data.render import IGNORE, Sample
from entrenar.tokenizer import Tokenizer


def segments(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Runs of text in order, each with whether it is learned. The first token is never learned."""
    stream = tokenizer.stream(skip_special=False)
    learned = [t > 0 and label != IGNORE for t, label in enumerate(sample.labels)]
    pieces = [(stream.push(int(i)), flag) for i, flag in zip(sample.ids, learned, strict=True)]
    pieces.append((stream.finish(), learned[-1]))
    return [("".join(text for text, _ in run), flag) for flag, run in groupby(pieces, key=lambda piece: piece[1])]


def show(sample: Sample, tokenizer: Tokenizer, markup: bool = False) -> str:
    """The sample's text with what is learned between ⟦ and ⟧, or in green as rich markup."""
    if markup:
        styles = {True: "green", False: "dim"}
        return "".join(f"[{styles[flag]}]{escape(text)}[/]" for text, flag in segments(sample, tokenizer))
    return "".join(f"⟦{text}⟧" if flag else text for text, flag in segments(sample, tokenizer))
