"""The sampler: what is kept, with which chances, and that the seed decides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.errors import ConfigError, NonFiniteError
from entrenar.generate import SamplingConfig
from entrenar.generate.sample import Sampler

pytestmark = pytest.mark.tier1
LOGITS = np.log(np.array([0.05, 0.4, 0.3, 0.05, 0.2], np.float32))


def drawn(config, logits=LOGITS, n=400):
    """How often each token comes."""
    sampler = Sampler(config)
    return np.bincount([sampler(logits, []) for _ in range(n)], minlength=len(logits)) / n


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.65}, {1, 2}),
        ({"top_p": 0.75}, {1, 2, 4}),
        ({"min_p": 0.45}, {1, 2, 4}),
        ({"min_p": 0.6, "top_k": 4}, {1, 2}),
        ({"top_k": 1}, {1}),
        ({"top_p": 1e-9}, {1}),
    ],
)
def test_the_filters_keep_just_what_they_say(settings, kept):
    freq = drawn(SamplingConfig(temperature=1.0, seed=0, **settings))
    assert set(np.flatnonzero(freq)) == kept
    p = np.exp(LOGITS) * [i in kept for i in range(5)]
    assert np.abs(freq - p / p.sum()).max() < 0.08  # 400 draws: three standard deviations


def test_temperature_divides_the_logits():
    freq = drawn(SamplingConfig(temperature=0.5, seed=1), n=2000)
    p = np.exp(LOGITS) ** 2
    assert np.abs(freq - p / p.sum()).max() < 0.04


def test_zero_temperature_takes_the_likeliest():
    assert drawn(SamplingConfig())[1] == 1.0


def test_the_penalty_acts_on_seen_tokens_of_either_sign():
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    sampler = Sampler(SamplingConfig(repetition_penalty=1.2))
    assert sampler(logits, []) == 0
    assert sampler(logits, [0, 0]) == 1
    negative = np.array([-1.0, -1.1, -9.0], np.float32)
    assert sampler(negative, [0]) == 1


@given(st.integers(0, 2**63 - 1))
def test_the_seed_decides(seed):
    config = SamplingConfig(temperature=1.0, seed=seed)
    a, b = Sampler(config), Sampler(config)
    assert [a(LOGITS, []) for _ in range(20)] == [b(LOGITS, []) for _ in range(20)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_logits_are_an_error(bad):
    with pytest.raises(NonFiniteError):
        Sampler(SamplingConfig())(np.array([0.0, bad], np.float32), [])


def test_masked_logits_are_never_drawn():
    freq = drawn(SamplingConfig(temperature=2.0, seed=3), np.array([0.0, -np.inf, 0.0], np.float32))
    assert freq[1] == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1),
        ("min_p", 1.0), ("repetition_penalty", 0.0), ("seed", -1),
    ],
)  # fmt: skip
def test_impossible_settings_name_the_field(field, value):
    with pytest.raises(ConfigError) as error:
        SamplingConfig(**{field: value})
    assert error.value.field == field


def test_an_unknown_setting_lists_the_known():
    with pytest.raises(ConfigError, match="temperature"):
        SamplingConfig.of({"temprature": 1.0})


def test_the_smallest_temperature_is_greedy():
    assert drawn(SamplingConfig(temperature=1e-310, seed=0), n=20)[1] == 1


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", ["hot", None, True])
def test_what_is_no_number_names_the_setting(name, value):
    with pytest.raises(ConfigError) as error:
        SamplingConfig(**{name: value})
    assert error.value.field == name
