"""What merging an adapter costs: errors of quantization beside what the adapter changes, and which base to merge into.

An adapter trained on a quantized model was fitted to the weights that it saw, dequantized: merged into those it gives
the trained model. Merged into the 16-bit model it meets weights that differ by the base's quantization error, and loses
a part of what was learned unless that is very small beside the change ΔW (measured in docs/log.md).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import UsageError
from entrenar.models.adapters import Adapted
from entrenar.models.arch.rope import rope_spec
from entrenar.models.causal_lm import CausalLM
from entrenar.nn.lora import HEAD
from entrenar.quant import QTensor

Base = Literal["16bit", "dequantized"]
NEGLIGIBLE = 0.05  # ‖error‖/‖ΔW‖ of a base, below which the two bases do equally well
ROUNDED = 0.8  # the same of a result, from which on much is lost: 1 is all of it where the base is of the same type
COMPARED = (  # of two configs
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "rope_theta", "partial_rotary_factor", "rms_norm_eps",
)  # fmt: skip


def require_base(base: CausalLM, trained: CausalLM) -> None:
    """Refuses what can't be the model in 16 bit or f32 that `trained` was quantized from. No weight is read.

    Raises:
        UsageError: it is quantized itself, or another model.
    """
    packed = sorted({w.qtype.name for _, w in base.named_weights() if isinstance(w, QTensor)})
    if packed:
        raise UsageError(
            f"{base.source} is quantized itself, to {' and '.join(packed)}: give the model in 16 bit or f32 that "
            f"{trained.source} was made from"
        )
    where = f"{base.source} is not the model that {trained.source} was made from"
    for name in COMPARED:
        here, there = getattr(base.config, name), getattr(trained.config, name)
        if not math.isclose(here, there, rel_tol=1e-6):  # GGUF has numbers in f32
            raise UsageError(f"{where}: {name} is {here} and {there}")
    turned, as_trained = (rope_spec(model.config, partial=True).inv_freq for model in (base, trained))
    if not np.allclose(turned, as_trained, rtol=1e-4):
        raise UsageError(f"{where}: rope_scaling is {base.config.rope_scaling} and {trained.config.rope_scaling}")
    shapes, wanted = base.config.parameter_shapes(), trained.config.parameter_shapes()
    for name in sorted((shapes.keys() | wanted.keys()) - {f"{HEAD}.weight"}):  # some files repeat a tied one
        if shapes.get(name) != wanted.get(name):
            raise UsageError(f"{where}: {name} is {shapes.get(name, 'absent')} and {wanted.get(name, 'absent')}")


@dataclass(frozen=True)
class LayerError:
    """One layer: ‖ΔW‖ and, beside it, ‖W16 - dequantized W‖ and the error of what was written.

    The ratios are None where they are not known, or nothing changes.
    """

    layer: str
    change: float
    base: float | None = None
    written: float | None = None


@dataclass
class MergeReport:
    """What is known of a merge: `measured` begins it, and `written` completes it as layers are written.

    Args:
        layers: by path, in the model's order.
        quantized: whether the model's weights are. compared: whether with those in 16 bit.
        fitted: whether the adapter was trained on these weights, by its record; None without one.
    """

    layers: dict[str, LayerError]
    quantized: bool
    compared: bool
    fitted: bool | None = None

    @classmethod
    def measured(cls, trained: Adapted, base: Adapted | None) -> MergeReport:
        """Of the adapter that acts on the model it was trained on. `base`: that model in 16 bit, if it is another."""
        other = None if base is None else dict(base.adaptable())
        own = dict(trained.adaptable())
        layers = {}
        for path, factors in trained.active_factors().items():
            weight = own[path].weight.dense(np.float32)
            change = _norm(factors.merged(weight) - weight)
            ratio = None
            if other is not None and change:
                ratio = _norm(other[path].weight.dense(np.float32) - weight) / change
            layers[path] = LayerError(path, change, ratio)
        bases = [adapter.base for adapter in trained.acting()]
        fitted = None if None in bases else all(trained.quantization.unlike(base) is None for base in bases)
        return cls(layers, bool(trained.quantization), other is not None, fitted)

    def written(self, path: str, merged: NDArray[np.float32], stored: NDArray[np.float32]) -> None:
        """Takes down what a layer has become in the file."""
        layer = self.layers[path]
        if layer.change:
            self.layers[path] = replace(layer, written=_norm(stored - merged) / layer.change)

    def median(self, name: str) -> float | None:
        """Of a ratio, over the layers that change; None where it is known of none."""
        values = [value for layer in self.layers.values() if (value := getattr(layer, name)) is not None]
        return float(np.median(values)) if values else None

    def better(self) -> Base | None:
        """The base to merge into; None where there is nothing to judge by."""
        ratio = None if self.fitted is False else self.median("base")
        return None if ratio is None else "dequantized" if ratio >= NEGLIGIBLE else "16bit"

    def advice(self) -> str:
        """Which choice is better, and why."""
        words = []
        trained_here = "" if self.fitted else ", if it was trained on this model"
        if self.layers and not any(layer.change for layer in self.layers.values()):
            words.append("its factors change nothing: ΔW is 0 in every layer")
        elif (better := self.better()) is not None:
            why = (
                f", and the adapter was fitted to the dequantized weights{trained_here}"
                if better == "dequantized"
                else ", too little to count, and the 16-bit weights are the better ones apart from it"
            )
            error = f"the base's quantization error is {self.median('base'):.2g} of the change"
            words.append(f"--into {better}: {error}{why}")
        elif self.fitted is False:
            words.append("the adapter was trained on other weights than these: no base gives the trained model")
        elif self.quantized:
            compare = "" if self.compared else "; --base MODEL compares with the 16-bit model"
            words.append(f"dequantized is the trained model{trained_here}{compare}")
        written = self.median("written")
        if written:
            words.append(f"writing this type costs {written:.2g} times the change")
            if written >= ROUNDED:
                words[-1] += ": much of what was learned is rounded away"
                words.append("keep the adapter apart, or write more bits (q8_0, f16, f32)")
        return "; ".join(words) or "nothing to choose: base and result have the same precision"

    def as_dict(self) -> dict[str, Any]:
        return {
            "layers": [asdict(layer) for layer in self.layers.values()],
            "median_written": self.median("written"),
            "median_base": self.median("base"),
            "advice": self.advice(),
        }

    def table(self) -> str:
        """For people: a line a layer."""
        width = max(map(len, ("layer", *self.layers)))
        rows = [f"{'layer':{width}}  {'‖ΔW‖':>9}  {'written':>9}  {'base':>9}"]
        for path, layer in self.layers.items():
            ratios = ("" if ratio is None else f"{ratio:.3g}" for ratio in (layer.written, layer.base))
            rows.append(f"{path:{width}}  {layer.change:9.3g}  " + "  ".join(f"{ratio:>9}" for ratio in ratios))
        return "\n".join([*rows, "written, base: ‖error of rounding‖ / ‖ΔW‖, in the result and in the base"])


def _norm(matrix: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(matrix))
