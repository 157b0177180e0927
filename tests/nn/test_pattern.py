"""Patterns of a downloaded adapter: matched as PEFT does, and never for long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.errors import ConfigError
from entrenar.nn.lora import LoraConfig
from entrenar.nn.pattern import MAX_LENGTH, MAX_WAYS, ways

pytestmark = pytest.mark.tier2
PATHS = [f"model.layers.{i}.{name}" for i in range(40) for name in ("self_attn.q_proj", "mlp.down_proj")]


def test_patterns_are_tried_at_the_end_from_a_dot_on() -> None:
    config = LoraConfig(
        r=8,
        rank_pattern={"layers.1.self_attn.q_proj": 1, r"layers\.(2|3)\..*": 2, "^model.layers.4.+": 3, "proj": 4},
        alpha_pattern={"q_proj": 32, ".*": 64},
    )
    ranks = [config.rank_of(path) for path in PATHS[:10]]
    assert ranks == [8, 8, 1, 8, 2, 2, 2, 2, 3, 3]
    assert config.scale_of(PATHS[0]) == 32 / 8
    assert config.scale_of(PATHS[5]) == 64 / 2


@pytest.mark.parametrize(
    "pattern",
    ["(.?)*x", "(a|a)+x", "(?:.*)*x", "(.*a){20}x", "(|a)*+x", "((.)?){60}x", ".*.*.*.*.*x", "a*?b*?c*?x", "(?=.*)x",
     "(?P<a>.)x", "(?i)q_proj", "(?#a)x", "(.|.)" * 14 + "x", "(..?)?" * 14 + "x", r"[^]\]]*\**.{1,9}x"],
)  # fmt: skip
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_what_could_take_too_long_is_refused(field: str, pattern: str) -> None:
    with pytest.raises(ConfigError, match="could take too long") as error:
        LoraConfig(**{field: {pattern: 4}})
    assert error.value.field == field


@pytest.mark.parametrize(
    "pattern",
    ["(", ")", ".?)*(x", "[", "*", "a**", "a{9}{9}", "\\", "a{99999999999999}", "(" * 900 + ")" * 900],
)
@pytest.mark.parametrize("field", ["rank_pattern", "target_modules"])
def test_what_is_no_expression_is_refused(field: str, pattern: str) -> None:
    with pytest.raises(ConfigError) as error:
        LoraConfig(**{field: {pattern: 4} if field == "rank_pattern" else pattern})
    assert error.value.field == field


def test_the_longest_patterns() -> None:
    LoraConfig(target_modules="a" * MAX_LENGTH)
    with pytest.raises(ConfigError, match="4097 characters"):
        LoraConfig(target_modules="a" * (MAX_LENGTH + 1))
    many = {f"layers.{i}.q_proj": 4 for i in range(MAX_WAYS)}
    LoraConfig(rank_pattern=many)
    with pytest.raises(ConfigError, match="too long"):
        LoraConfig(rank_pattern={**many, "one more": 4})
    with pytest.raises(ConfigError, match="too long"):
        LoraConfig(rank_pattern={f"{i:04}" * 1000: 4 for i in range(200)})


PIECES = ["a", "b", ".", "|", "(", "(?:", ")", "*", "+", "?", "{2}", "{0,3}", "[ab]", r"\.", r"\w", "$", "*?"]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_a_bounded_pattern_is_quick(pattern: str) -> None:
    """What is taken fails within a bound on the steps, on a path made for it to fail."""
    try:
        config = LoraConfig(rank_pattern={pattern: 3})
    except ConfigError:
        return
    started = time.process_time()
    assert config.rank_of("ab." * 20 + "!") in (3, 8)
    assert time.process_time() - started < 2


@given(st.lists(st.sampled_from([p for p in PIECES if p[0] not in "*+{"]), max_size=14).map("".join))
def test_ways_are_never_fewer_than_the_branches(pattern: str) -> None:
    """Without repeats, the ways are at least the alternatives written down."""
    try:
        re.compile(pattern)
    except re.error:
        return
    assert ways(pattern) >= pattern.count("|") + 1
