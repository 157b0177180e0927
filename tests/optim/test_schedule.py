"""Schedules against closed forms worked out by hand and against the numbers of transformers 5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.errors import ConfigError
from entrenar.optim import schedule

pytestmark = pytest.mark.tier1

REFERENCE = json.loads(Path(__file__).with_name("transformers_schedules.json").read_text())


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: f"{case['name']}-{case['warmup_steps']}")
def test_equals_transformers(case: dict) -> None:
    kwargs = {} if case["name"] == "constant" else {"total_steps": case["total_steps"]}
    rate = getattr(schedule, case["name"])(case["lr"], warmup_steps=case["warmup_steps"], **kwargs)
    assert [rate(s) for s in range(len(case["rates"]))] == pytest.approx(case["rates"], rel=1e-12, abs=1e-18)


@given(st.integers(0, 20), st.integers(0, 60))
def test_step_and_exponential(warmup: int, s: int) -> None:
    stepped = schedule.step(0.5, step_size=7, gamma=0.25, warmup_steps=warmup)(s)
    falling = schedule.exponential(0.5, gamma=0.9, warmup_steps=warmup)(s)
    if s < warmup:
        assert stepped == falling == pytest.approx(0.5 * s / warmup)
    else:
        halvings = 2 * len(range(7, s - warmup + 1, 7))  # a quarter is two halvings
        assert stepped == pytest.approx(0.5 / 2**halvings)
        product = 0.5
        for _ in range(s - warmup):
            product *= 0.9
        assert falling == pytest.approx(product)


def test_cosine_ends_at_its_minimum_and_stays_there() -> None:
    rate = schedule.cosine(1.0, total_steps=10, warmup_steps=2, min_ratio=0.1)
    assert rate(2) == 1.0
    assert rate(6) == pytest.approx(0.55)
    assert rate(10) == rate(1000) == pytest.approx(0.1)


def test_a_run_that_is_all_warm_up() -> None:
    assert schedule.linear(1.0, total_steps=4, warmup_steps=4)(3) == 0.75
    assert schedule.cosine(1.0, total_steps=4, warmup_steps=9)(3) == pytest.approx(3 / 9)


@pytest.mark.parametrize(
    ("name", "arguments", "field"),
    [
        ("constant", {"lr": -1.0}, "lr"),
        ("constant", {"lr": float("nan")}, "lr"),
        ("constant", {"lr": 1.0, "warmup_steps": -1}, "warmup_steps"),
        ("constant", {"lr": 1.0, "warmup_steps": 1.5}, "warmup_steps"),
        ("linear", {"lr": 1.0, "total_steps": 0}, "total_steps"),
        ("cosine", {"lr": 1.0, "total_steps": 5, "min_ratio": 1.5}, "min_ratio"),
        ("step", {"lr": 1.0, "step_size": 0}, "step_size"),
        ("step", {"lr": 1.0, "step_size": True}, "step_size"),
        ("exponential", {"lr": 1.0, "gamma": 1.01}, "gamma"),
    ],
)
def test_absurd_arguments(name: str, arguments: dict, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        getattr(schedule, name)(**arguments)
    assert caught.value.field == field


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="negative"):
        schedule.constant(1.0)(-1)
