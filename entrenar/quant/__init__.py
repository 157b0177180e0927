"""Storage types of weights: one table, `QTYPES`; arrays stored in them, `QTensor`; `quantize` and `dequantize`."""

from __future__ import annotations

from entrenar.quant.qtensor import QTensor, dequantize, fitting, quantize
from entrenar.quant.qtypes import QTYPES, QType, by_id

__all__ = ["QTYPES", "QTensor", "QType", "by_id", "dequantize", "fitting", "quantize"]
