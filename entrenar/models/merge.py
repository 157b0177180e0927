"""What merging an adapter costs: errors of quantization beside what the adapter changes, and which base to merge into.

An adapter trained on a quantized model was fitted to the weights that it saw, dequantized: merged into those it gives
the trained model. Merged into the 16-bit model it meets weights that differ by the base's quantization error, which is
good where that is small beside the change ΔW, and loses what was learned where it is not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.models.adapters import Adapted

LARGE = 1.0  # ‖error‖/‖ΔW‖ from which on the error outweighs what was learned


@dataclass(frozen=True)
class LayerError:
    """One layer: ‖ΔW‖, and relative to it the error of what was written, and ‖W16 - dequantized W‖ where known."""

    layer: str
    change: float
    written: float
    base: float | None


@dataclass
class MergeReport:
    """The layers of a merge, filled in as they are written.

    Args:
        target: the model merged into. other: the 16-bit model, where `target` is its quantized form, or the other way
            round; None where there is one only.
        into: "16bit" or "dequantized".
    """

    target: Adapted
    other: Adapted | None
    into: str
    layers: list[LayerError] = field(default_factory=list)

    def __call__(self, path: str, merged: NDArray[np.float32], stored: NDArray[np.float32]) -> None:
        own = dict(self.target.adaptable())[path].weight.dense(np.float32)
        change = float(np.linalg.norm(merged - own)) or float("nan")
        base = None
        if self.other is not None:
            weight = dict(self.other.adaptable())[path].weight
            base = float(np.linalg.norm(weight.dense(np.float32) - own)) / change
        self.layers.append(LayerError(path, change, float(np.linalg.norm(stored - merged)) / change, base))

    def median(self, name: str) -> float | None:
        values = [getattr(layer, name) for layer in self.layers]
        return None if not values or None in values else float(np.median(values))

    def advice(self) -> str:
        """Which choice is better, and why."""
        base, written = self.median("base"), self.median("written")
        words = []
        if base is not None:
            better = "dequantized" if base >= LARGE else "16bit"
            why = (
                "outweighs what the adapter learned; it was fitted to the dequantized weights"
                if base >= LARGE
                else "is small beside what the adapter learned; the 16-bit weights are the better ones"
            )
            words.append(f"--into {better}: the base's quantization error is {base:.2g} of the change, and {why}")
        elif self.into == "dequantized":
            words.append("dequantized is the trained model exactly; --base MODEL compares with the 16-bit model")
        if written is not None and written >= LARGE:
            words.append(
                f"writing this type costs {written:.2g} times the change: most of what was learned is rounded away; "
                "keep the adapter apart, or write more bits (q8_0, f16)"
            )
        return "; ".join(words) or "nothing to choose: base and result have the same precision"

    def as_dict(self) -> dict[str, Any]:
        return {
            "into": self.into,
            "layers": [asdict(layer) for layer in self.layers],
            "median_written": self.median("written"),
            "median_base": self.median("base"),
            "advice": self.advice(),
        }

    def table(self) -> str:
        """For people: a line a layer."""
        width = max((len(layer.layer) for layer in self.layers), default=5)
        rows = [f"{'layer':{width}}  {'‖ΔW‖':>9}  {'written':>9}  {'base':>9}"]
        for layer in self.layers:
            base = "" if layer.base is None else f"{layer.base:9.3g}"
            rows.append(f"{layer.layer:{width}}  {layer.change:9.3g}  {layer.written:9.3g}  {base:>9}")
        return "\n".join([*rows, "written, base: ‖error of quantization‖ / ‖ΔW‖, of the result and of the base"])
