"""Dropout's mask is Philox4x32-10 of seed, offset and index."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.checks import BF16, FLOWS, floats
from kernels.guard import guarded

from entrenar import _native
from entrenar.errors import UsageError

WORD = 2**32


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Four words of Philox4x32-10 (Salmon et al. 2011), straight from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b // WORD ^ c[1] ^ k[0], b % WORD, a // WORD ^ c[3] ^ k[1], a % WORD]
        k = [(k[0] + 0x9E3779B9) % WORD, (k[1] + 0xBB67AE85) % WORD]
    return c


def test_the_reference_gives_the_published_words() -> None:
    """Known answers of the authors' Random123 library."""
    ones = WORD - 1
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox((ones,) * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox(pi, (0xA4093822, 0x299F31D0)) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def words(n: int, seed: int, offset: int) -> np.ndarray:
    counters = [(offset + i) % 2**64 for i in range((n + 3) // 4)]
    flat = [w for c in counters for w in philox((c % WORD, c // WORD, 0, 0), (seed % WORD, seed // WORD))]
    return np.array(flat[:n], np.uint64)


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("seed", "offset"),
    [(0, 0), (1, 5), (0xA4093822_299F31D0, 0x243F6A88), (7, WORD - 3), (2**64 - 1, 2**64 - 10)],
)
def test_elements_are_dropped_where_their_word_is_small(isa: str, seed: int, offset: int) -> None:
    for n, p in [(1, 0.5), (63, 0.1), (128, 0.9), (129, 0.5), (1001, 0.05)]:
        x = floats(n, n)
        kept = words(n, seed, offset) >= int(p * WORD)
        for dtype in FLOWS:
            want = np.where(kept, x.astype(dtype).astype(np.float32) * np.float32(1 / (1 - p)), 0).astype(dtype)
            np.testing.assert_array_equal(_native.dropout(guarded(x.astype(dtype)), p, seed, offset), want)


def test_the_mean_stays_and_the_share_is_p(isa: str) -> None:
    x = np.ones((300, 1000), np.float32)
    for p in (0.05, 0.5, 0.9):
        y = _native.dropout(x, p, 3, 0)
        assert (y == 0).mean() == pytest.approx(p, abs=0.004)
        assert y.mean() == pytest.approx(1, abs=0.02)


def test_nothing_and_everything(isa: str) -> None:
    x = floats(1, 1000)
    np.testing.assert_array_equal(_native.dropout(x, 0.0, 1, 2), x)
    assert not _native.dropout(x, 1.0, 1, 2).any()
    assert _native.dropout(np.zeros((0, 3), np.float32), 0.5, 1, 2).shape == (0, 3)
    assert np.isnan(_native.dropout(np.full(500, np.nan, np.float32), 0.5, 1, 2)).all()
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="dropout: p="):
            _native.dropout(x, p, 1, 2)


def test_results_do_not_depend_on_threads(isa: str, same_on_any_threads) -> None:
    x = floats(1, 100003)
    same_on_any_threads(lambda: _native.dropout(x, 0.3, 11, 5))
    same_on_any_threads(lambda: _native.dropout(x.astype(BF16), 0.3, 11, 5))
