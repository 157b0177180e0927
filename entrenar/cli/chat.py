"""``entrenar chat``: a conversation in the terminal, by the model's own chat template."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from entrenar.cli.model import ModelSettings, SamplingSettings, tokenizer_of
from entrenar.cli.output import note
from entrenar.cli.settings import option
from entrenar.errors import UsageError
from entrenar.generate import GenerationStream
from entrenar.models.causal_lm import CausalLM
from entrenar.tokenizer import Tokenizer

COMMANDS = {"/exit": "leave (Ctrl-D does too)", "/reset": "forget the conversation", "/help": "this list"}


@dataclass(frozen=True, kw_only=True)
class Command(SamplingSettings, ModelSettings):
    """Talk with a model. What you type is a message; the conversation so far is the context.

    /exit leaves, /reset starts anew, Ctrl-C stops an answer. Messages are read from standard input and
    answers go to standard output, so that a script can hold the conversation too.
    """

    system: str | None = option(None, "the system message that opens the conversation")

    def run(self) -> int:
        model = self.load()
        tokenizer = tokenizer_of(model, self.model)
        if tokenizer.chat_template is None:
            note("entrenar chat: the model has no chat template; it is asked by the plain one that training uses then")
        talk = Conversation(model, tokenizer, self)
        note(", ".join(f"{word}: {what}" for word, what in COMMANDS.items()))
        while (line := ask()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                talk.reset()
                note("the conversation is forgotten")
            elif line == "/help":
                note("\n".join(f"{word}  {what}" for word, what in COMMANDS.items()))
            elif line.startswith("/") and " " not in line:
                note(f"there is no {line}; /help lists the commands")
            elif line:
                talk.answer(line)
        return 0


def ask() -> str | None:
    """The next message without its line end, or None at the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() a history and line editing)

        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


@dataclass
class Conversation:
    """The messages so far, and the model that answers them."""

    model: CausalLM
    tokenizer: Tokenizer
    settings: Command
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        system = self.settings.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(self, text: str) -> None:
        """Print the answer as it comes; Ctrl-C ends it there, and what was said so far stays."""
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.encode_chat(asked, add_generation_prompt=True)
        try:
            pieces = self.model.generate(ids, stream=True, **self.settings.sampling())
        except UsageError as error:  # the conversation has outgrown the model's context
            note(f"{error}, or begin anew with /reset")
            return
        assert isinstance(pieces, GenerationStream)
        said = []
        try:
            for piece in pieces:
                said.append(piece)
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            note(" (stopped)")
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
