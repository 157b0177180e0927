"""Evaluation against a float64 reference computed from the logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny

from entrenar.data import batches
from entrenar.errors import DataError
from entrenar.train import evaluate

pytestmark = pytest.mark.tier1


def test_every_label_counts_alike() -> None:
    model, rows = tiny.model(), tiny.data().train
    total, count = 0.0, 0
    model.eval()
    for sample in rows.samples:
        logits = model(sample.ids[None].astype(np.int64)).data[0].astype(np.float64)
        log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        for t in range(1, len(sample.ids)):
            if sample.labels[t] != -100:
                total += log_z[t - 1] - logits[t - 1, sample.labels[t]]
                count += 1
    model.train()
    for size in (1, 3, 100):
        result = evaluate(model, batches(rows, size))
        assert result.tokens == count
        assert result.nll == pytest.approx(total / count, rel=1e-6)
        assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert model.training


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    model, rows = tiny.model(), tiny.data().train
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.data[...] = 1.0
    first = evaluate(model, batches(rows, 4))
    assert evaluate(model, batches(rows, 4)) == first
    model.eval()
    evaluate(model, batches(rows, 4))
    assert not model.training


def test_nothing_to_predict() -> None:
    with pytest.raises(DataError, match="no label"):
        evaluate(tiny.model(), [])
