"""``entrenar convert``: a model from one format to the other, or to another type of weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

from entrenar.cli.output import note, print_json
from entrenar.cli.place import free_place
from entrenar.cli.settings import option, required
from entrenar.errors import UsageError
from entrenar.models.load import load_on_disk
from entrenar.models.save import requested


@dataclass(frozen=True, kw_only=True)
class Command:
    """Convert between GGUF and a Hugging Face directory (safetensors), and between types of weights.

    With --adapter it is the adapter that is converted, between PEFT's directory and llama.cpp's GGUF.

    Quantized weights stay as they are from GGUF to GGUF; in a directory they become f16.
    """

    model: str = required("what to convert: a GGUF file or a Hugging Face directory")
    out: str = required("where it goes: a name ending in .gguf, or a directory")
    dtype: Literal["auto", "f32", "f16", "bf16"] = option("auto", "type of the matrices; auto keeps it")
    quant: str | None = option(None, "quantize the matrices of a GGUF file: q4_k_m, q8_0 …")
    adapter: str | None = option(None, "an adapter of the model: a PEFT directory or a GGUF file, to be converted")
    force: bool = option(False, "replace what is at --out")
    json: bool = option(False, "print one JSON object")

    def run(self) -> int:
        if self.adapter is not None:
            return self._convert_adapter(self.adapter)
        out = free_place(self.out, self.force)
        requested(out, self.quant, self.dtype)
        model = load_on_disk(self.model)
        model.save(out, quant=self.quant, dtype=self.dtype)
        parameters = model.config.num_parameters()
        if self.json:
            print_json({"out": str(out), "model": self.model, "parameters": parameters, "dtype": self.dtype})
        else:
            note(f"{parameters:,} parameters saved in {out}")
        return 0

    def _convert_adapter(self, adapter: str) -> int:
        for flag, given in (("--quant", self.quant is not None), ("--dtype", self.dtype != "auto")):
            if given:
                raise UsageError(f"{flag} is of a model's matrices; an adapter's factors stay f32: leave it out")
        out = free_place(self.out, self.force, self.model, adapter)
        model = load_on_disk(self.model)
        with warnings.catch_warnings(action="ignore"):  # of how the model is quantized: its shapes are all that counts
            model.load_adapter(adapter)
        model.save_adapter(out)
        if self.json:
            print_json({"out": str(out), "model": self.model, "adapter": adapter})
        else:
            note(f"adapter saved in {out}")
        return 0
