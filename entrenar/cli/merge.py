"""``entrenar merge``: an adapter is added into its model's weights, and the result is a model of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from entrenar.cli.output import note, print_json
from entrenar.cli.settings import option, required
from entrenar.errors import UsageError
from entrenar.models.load import load


@dataclass(frozen=True, kw_only=True)
class Command:
    """Add an adapter into the weights. The result needs no adapter and loads everywhere the base did."""

    model: str = required("the base: a GGUF file or a Hugging Face directory")
    adapter: str = required("the adapter: a directory in PEFT's format")
    out: str = required("where the model goes: a name ending in .gguf, or a directory")
    dtype: Literal["auto", "f32", "f16", "bf16"] = option("auto", "type of the matrices; auto keeps it")
    force: bool = option(False, "replace what is at --out")
    json: bool = option(False, "print one JSON object")

    def run(self) -> int:
        out = free_place(self.out, self.force)
        model = load(self.model)
        model.load_adapter(self.adapter)
        model.merge_adapter()
        model.save(out, dtype=self.dtype)
        if self.json:
            print_json({"out": str(out), "model": self.model, "adapter": self.adapter})
        else:
            note(f"merged into {out}; try: entrenar generate --model {out} --prompt '…'")
        return 0


def free_place(out: str, force: bool) -> Path:
    """The path to write to, refused where something would be lost without the user's word."""
    path = Path(out)
    occupied = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if occupied and not force:
        raise UsageError(f"{path} exists; --force replaces it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: the directory {path.absolute().parent} does not exist")
    return path
