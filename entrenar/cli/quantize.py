"""``entrenar quantize``: a model's matrices in fewer bits, as a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass

from entrenar.cli.output import note, print_json, size
from entrenar.cli.place import free_place
from entrenar.cli.settings import option, required
from entrenar.models.load import load_on_disk
from entrenar.models.save import requested


@dataclass(frozen=True, kw_only=True)
class Command:
    """Quantize a model's matrices and write a GGUF file, which llama.cpp loads as well.

    Embedding and head get q6_k (q8_0 beside q8_0; in a mixture an untied embedding has the layers' type); rows that do
    not fill a type's blocks get what llama.cpp takes then.
    """

    model: str = required("a GGUF file or a Hugging Face directory")
    out: str = required("where it goes: a name ending in .gguf")
    quant: str = required("type of the matrices: q4_k_m, q4_k, q5_k, q6_k, q8_0, q4_0, iq4_nl …")
    force: bool = option(False, "replace what is at --out")
    json: bool = option(False, "print one JSON object")

    def run(self) -> int:
        out = free_place(self.out, self.force)
        requested(out, self.quant, "auto")
        load_on_disk(self.model).save(out, quant=self.quant)
        nbytes = out.stat().st_size
        if self.json:
            print_json({"out": str(out), "model": self.model, "quant": self.quant, "bytes": nbytes})
        else:
            note(f"{size(nbytes)} in {out}")
        return 0
