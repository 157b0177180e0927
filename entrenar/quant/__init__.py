"""Storage types of weights: one table, `QTYPES`."""

from __future__ import annotations

from entrenar.quant.qtypes import QTYPES, QType, by_id

__all__ = ["QTYPES", "QType", "by_id"]
