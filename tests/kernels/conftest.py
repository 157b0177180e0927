"""Every test that asks for `isa` runs once at each level of the native kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support import need_isa

from entrenar import _native


@pytest.fixture(params=["scalar", "avx2", "avx512", "avx512_bf16", "amx"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Use this level during the test."""
    need_isa(request.param)
    before = _native.isa()
    _native._set_isa(request.param)
    yield request.param
    _native._set_isa(before)


@pytest.fixture
def same_on_any_threads() -> Iterator[Callable[..., None]]:
    """Asserts that a call gives the same bits on 1, 2, 3 and 7 threads."""
    before = _native.get_num_threads()

    def check(call: Callable[[], object]) -> None:
        results = []
        for n in (1, 2, 3, 7):
            _native.set_num_threads(n)
            result = call()
            results.append(result if isinstance(result, tuple) else (result,))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    yield check
    _native.set_num_threads(before)
