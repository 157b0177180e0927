"""Sums of products with their epilogue against float64: every type, tail, layout, term, threads, memory."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from kernels.checks import floats, wide

from entrenar.backend import cpu
from entrenar.errors import DTypeError, ShapeError, UsageError

BF16 = ml_dtypes.bfloat16


def operands(terms):
    """Terms as (a, b, n0) in float64: as the kernel sees them, rounded to bf16 where it multiplies bf16."""
    rounds = terms[0][0].dtype == BF16 and cpu.fast_bf16()
    seen = [(wide(a.astype(BF16)), wide(b.astype(BF16))) if rounds else (wide(a), wide(b)) for a, b, *_ in terms]
    return [(a, b, term[2] if len(term) > 2 else 0) for (a, b), term in zip(seen, terms, strict=True)]


def assert_product(got, terms, bias=None, residual=None, before=None):
    """Within a few f32 ulp of the sum of the terms' sizes, and half an ulp of bf16 where out is that."""
    want, size = np.zeros(got.shape), np.zeros(got.shape)
    for a, b, n0 in operands(terms):
        want[:, n0 : n0 + b.shape[1]] += a @ b
        size[:, n0 : n0 + b.shape[1]] += np.abs(a) @ np.abs(b)
    for more in (bias, residual, before):
        if more is not None:
            want += wide(more)
            size += np.abs(wide(more))
    bound = 2e-6 * size + 1e-37
    if got.dtype == BF16:
        bound += np.abs(want) * 2**-8
    assert (np.abs(wide(got) - want) <= bound).all()


@pytest.mark.parametrize("out_type", [np.float32, BF16])
@pytest.mark.parametrize("type_", [np.float32, BF16])
def test_terms_bias_and_residual_are_one_sum(isa, type_, out_type):
    m, k, n = 37, 70, 90
    x, w = floats(1, m, k).astype(type_), floats(2, n, k).astype(type_)
    low, b = floats(3, m, 16).astype(type_), floats(4, 40, 16)
    terms = [(x, w.T), (low, b.T, 30)]
    bias, residual = floats(5, n), floats(6, m, n).astype(out_type)
    out = np.full((m, n), np.nan, out_type)
    assert cpu.product(terms, out, bias=bias, residual=residual) is out
    assert_product(out, terms, bias, residual)
    before = out.copy()
    cpu.product(terms, out, accumulate=True)
    assert_product(out, terms, before=before)


@pytest.mark.tier1
def test_what_does_not_fit_is_named():
    a, out = np.zeros((3, 4), np.float32), np.zeros((3, 5), np.float32)
    with pytest.raises(ShapeError, match=r"term 0 is \(3, 4\) times \(3, 4\)"):
        cpu.product([(a, a)], out)
    with pytest.raises(ShapeError, match="at column 2"):
        cpu.product([(a, np.zeros((4, 4), np.float32), 2)], out)
    with pytest.raises(ShapeError, match="bias"):
        cpu.product([(a, np.zeros((4, 5), np.float32))], out, bias=np.zeros(3, np.float32))
    with pytest.raises(ShapeError, match="residual"):
        cpu.product([(a, np.zeros((4, 5), np.float32))], out, residual=a)
    with pytest.raises(DTypeError, match="out must be float32 or bfloat16"):
        cpu.product([(a, np.zeros((4, 5), np.float32))], out.astype(np.float64))
    with pytest.raises(UsageError, match="0 terms"):
        cpu.product([], out)
