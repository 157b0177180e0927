"""``entrenar merge``: an adapter is added into its model's weights, and the result is a model of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from entrenar.cli.output import note, noted_warnings, print_json
from entrenar.cli.place import free_place
from entrenar.cli.settings import option, required
from entrenar.errors import UsageError
from entrenar.models.load import load
from entrenar.models.merge import MergeReport
from entrenar.models.save import requested
from entrenar.quant import QTensor


@dataclass(frozen=True, kw_only=True)
class Command:
    """Add an adapter into the weights. The result needs no adapter and loads everywhere the base did.

    For an adapter trained on a quantized model the report says how the errors of quantization compare with what the
    adapter changes, layer by layer, and which base to merge into.
    """

    model: str = required("the model the adapter was trained on: a GGUF file or a Hugging Face directory")
    adapter: str = required("the adapter: a directory in PEFT's format, or a GGUF file")
    out: str = required("where the model goes: a name ending in .gguf, or a directory")
    into: Literal["auto", "16bit", "dequantized"] = option(
        "auto", "16bit: into --base, or a --model that is not quantized; dequantized: into the quantized --model"
    )
    base: str | None = option(None, "the 16-bit model that the quantized --model was made from")
    quant: str | None = option(None, "quantize the result, a GGUF file: q4_k_m, q8_0 …")
    dtype: Literal["auto", "f32", "f16", "bf16"] = option("auto", "type of the matrices; auto keeps it")
    force: bool = option(False, "replace what is at --out")
    json: bool = option(False, "print one JSON object")

    def run(self) -> int:
        out = free_place(self.out, self.force, self.adapter, self.base)
        requested(out, self.quant, self.dtype)
        trained = load(self.model)
        base = None if self.base is None else load(self.base)
        packed = any(isinstance(weight, QTensor) for _, weight in trained.named_weights())
        into = self.into if self.into != "auto" else "16bit" if base is not None or not packed else "dequantized"
        if into == "16bit" and base is None and packed:
            raise UsageError(f"{self.model} is quantized: --into 16bit needs the 16-bit model as --base")
        if into == "dequantized" and not packed:
            raise UsageError(f"{self.model} is not quantized; leave out --into dequantized")
        target, other = (base, trained) if into == "16bit" and base is not None else (trained, base)
        report = MergeReport(target, other, into)
        with noted_warnings():
            target.load_adapter(self.adapter)
        target.save(out, quant=self.quant, dtype=self.dtype, merge=True, written=report)
        about = {"out": str(out), "model": self.model, "adapter": self.adapter}
        if self.json:
            print_json(about | report.as_dict())
        else:
            if packed or self.quant is not None:
                print(report.table())
                note(report.advice())
            note(f"merged into {out}; try: entrenar generate --model {out} --prompt '…'")
        return 0
