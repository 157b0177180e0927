"""``entrenar convert``: a model from one format to the other, or to another type of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from entrenar.cli.merge import free_place
from entrenar.cli.output import note, print_json
from entrenar.cli.settings import option, required
from entrenar.models.load import load


@dataclass(frozen=True, kw_only=True)
class Command:
    """Convert between GGUF and a Hugging Face directory (safetensors), and between types of weights.

    Quantized weights are expanded to f16.
    """

    model: str = required("what to convert: a GGUF file or a Hugging Face directory")
    out: str = required("where it goes: a name ending in .gguf, or a directory")
    dtype: Literal["auto", "f32", "f16", "bf16"] = option("auto", "type of the matrices; auto keeps it")
    force: bool = option(False, "replace what is at --out")
    json: bool = option(False, "print one JSON object")

    def run(self) -> int:
        out = free_place(self.out, self.force)
        model = load(self.model)
        model.save(out, dtype=self.dtype)
        parameters = model.config.num_parameters()
        if self.json:
            print_json({"out": str(out), "model": self.model, "parameters": parameters, "dtype": self.dtype})
        else:
            note(f"{parameters:,} parameters saved in {out}")
        return 0
