"""``entrenar merge``: an adapter is added into its model's weights, and the result is a model of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from entrenar.cli.model import loading_quant
from entrenar.cli.output import note, noted_warnings, print_json
from entrenar.cli.place import free_place
from entrenar.cli.settings import option, required
from entrenar.errors import ConfigError, UsageError
from entrenar.models.causal_lm import CausalLM
from entrenar.models.load import load_on_disk
from entrenar.models.merge import MergeReport, require_base
from entrenar.models.quantization import recorded
from entrenar.models.save import requested


@dataclass(frozen=True, kw_only=True)
class Command:
    """Add an adapter into the weights. The result needs no adapter and loads everywhere the base did.

    The report says how the error of what is written compares with what the adapter changes, layer by layer, and for an
    adapter trained on a quantized model which base to merge into.
    """

    model: str = required("the model the adapter was trained on: a GGUF file or a Hugging Face directory")
    adapter: str = required("the adapter: a directory in PEFT's format, or a GGUF file")
    out: str = required("where the model goes: a name ending in .gguf, or a directory")
    into: Literal["auto", "16bit", "dequantized"] = option(
        "auto", "16bit: the weights before they were quantized; dequantized: after; auto: what the report advises"
    )
    model_quant: str = option(
        "auto", "what --model was quantized to while it was loaded: nf4, q4_0 …; none; auto: as the adapter was trained"
    )
    base: str | None = option(None, "the 16-bit model that a --model which is a quantized file was made from")
    quant: str | None = option(None, "quantize the result, a GGUF file: q4_k_m, q8_0 …")
    dtype: Literal["auto", "f32", "f16", "bf16"] = option("auto", "type of the matrices; auto keeps it")
    force: bool = option(False, "replace what is at --out")
    json: bool = option(False, "print one JSON object")

    def run(self) -> int:
        out = free_place(self.out, self.force, self.adapter, self.base)
        requested(out, self.quant, self.dtype)
        with noted_warnings():
            trained, base = self.models()
            trained.load_adapter(self.adapter)
        report = MergeReport.measured(trained, base)
        into = self.into
        if into == "auto":
            into = report.better() or ("dequantized" if report.quantized else "16bit")
        target = trained
        if into == "16bit" and base is not None:
            target = base
            target.attach(trained.adapters["default"])
        target.save(out, quant=self.quant, dtype=self.dtype, merge=True, written=report.written)
        about = {"out": str(out), "model": self.model, "adapter": self.adapter, "into": into}
        if self.json:
            print_json(about | report.as_dict())
            return 0
        print(report.table())
        note(report.advice())
        what = f" ({into})" if report.quantized else ""
        note(f"merged into {out}{what}; try: entrenar generate --model {out} --prompt '…'")
        return 0

    def models(self) -> tuple[CausalLM, CausalLM | None]:
        """The model as the adapter was trained on it and, where that is quantized, in 16 bit, if it is known.

        Raises:
            UsageError: the flags ask for what these are not.
        """
        quant = loading_quant("--model-quant", self.model_quant, self.model, self.adapter)
        try:
            trained = load_on_disk(self.model, quant)
        except ConfigError as error:
            raise ConfigError("model_quant", error.reason) from None
        if not trained.quantization:
            if self.base is not None or self.into == "dequantized":
                flag = "--base" if self.base is not None else "--into dequantized"
                unlike = trained.quantization.unlike(recorded(self.adapter))
                hint = "" if unlike is None else f"; the adapter {unlike}"
                raise UsageError(f"{self.model} is not quantized, so there is one base only, without {flag}{hint}")
            return trained, None
        if quant is not None:
            if self.base is not None:
                reason = f"is itself the 16-bit model, quantized to {quant} while it is loaded: leave out --base"
                raise UsageError(f"{self.model} {reason}")
            return trained, load_on_disk(self.model)
        if self.base is None:
            if self.into == "16bit":
                raise UsageError(f"{self.model} is quantized: --into 16bit needs the 16-bit model as --base")
            return trained, None
        base = load_on_disk(self.base)
        require_base(base, trained)
        return trained, base
