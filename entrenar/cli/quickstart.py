"""``entrenar quickstart``: the whole story on bundled data, told by `entrenar.cli.quickstart_story`."""

from __future__ import annotations

from dataclasses import dataclass

from entrenar.cli.output import print_json
from entrenar.cli.settings import option


@dataclass(frozen=True, kw_only=True)
class Command:
    """Fine-tune a tiny bundled model, measure what it learned, merge the adapter and export GGUF."""

    out: str = option("entrenar-quickstart", "where everything goes; a second run replaces the first")
    json: bool = option(False, "print the results as one JSON object; the story goes to stderr")

    def run(self) -> int:
        from entrenar.cli.quickstart_story import tell

        results = tell(self.out, quiet=self.json)
        if self.json:
            print_json(results)
        return 0
