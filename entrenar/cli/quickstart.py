"""``entrenar quickstart``: the main job on a tiny model and data that come with the package."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass

from entrenar.cli.output import note, print_json
from entrenar.cli.settings import option
from entrenar.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Command:
    """Fine-tune a tiny bundled model, measure what it learned, merge the adapter and export GGUF."""

    out: str = option("entrenar-quickstart", "where everything goes; a second run replaces the first")
    seed: int = option(0, "of the adapter's first values and the order of the data")
    json: bool = option(False, "print the results as one JSON object; the story goes to stderr")

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError("seed", f"{self.seed} is not a whole number from 0 to 2^63 - 1")

    def run(self) -> int:
        from rich.console import Console

        from entrenar.quickstart.story import tell

        results = tell(self.out, Console(file=sys.stderr if self.json else sys.stdout), self.seed)
        if "stopped_by" in results:
            note(f"stopped by {results['stopped_by']}; entrenar quickstart begins again")
            return 128 + signal.Signals[results["stopped_by"]].value
        if self.json:
            print_json(results)
        return 0
