"""How well a model predicts given tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entrenar.data import Batch
from entrenar.errors import DataError
from entrenar.tensor import no_grad

if TYPE_CHECKING:
    from entrenar.models.causal_lm import CausalLM


@dataclass(frozen=True)
class Evaluation:
    """nll: nats a token. perplexity: its exponential. tokens: labels that were predicted, masked ones left out."""

    nll: float
    perplexity: float
    tokens: int


def evaluate(model: CausalLM, batches: Iterable[Batch]) -> Evaluation:
    """Mean negative log-likelihood of all unmasked labels: each token counts alike, whatever batch it is in.

    Sums over batches are in double. Dropout is off meanwhile; the model's mode is as before afterwards.

    Raises:
        DataError: no label counts.
    """
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        with no_grad():
            for batch in batches:
                if batch.tokens:
                    total += model.loss(batch.ids, batch.labels, starts=batch.starts).item() * batch.tokens
                    tokens += batch.tokens
    finally:
        model.train(was_training)
    if tokens == 0:
        raise DataError("evaluation: there is no label to predict; every one is masked, or there are no samples")
    nll = total / tokens
    return Evaluation(nll, math.exp(nll) if nll < 709 else math.inf if nll == nll else math.nan, tokens)
