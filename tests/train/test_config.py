"""TrainConfig: its limits, its spellings, and errors that name the field."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from entrenar.errors import ConfigError
from entrenar.train import TrainConfig
from entrenar.train.config import ALIASES

pytestmark = pytest.mark.tier1


def test_every_field_has_help_and_every_alias_a_field() -> None:
    names = {spec.name for spec in dataclasses.fields(TrainConfig)}
    assert all(spec.metadata["help"] for spec in dataclasses.fields(TrainConfig))
    assert set(ALIASES.values()) <= names
    assert not set(ALIASES) & names


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("max_steps", 0),
        ("max_steps", 2.0),
        ("num_train_epochs", 0.0),
        ("batch_size", 0),
        ("batch_size", None),
        ("seq_len", 1),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("adam_epsilon", -1e-9),
        ("max_grad_norm", -1.0),
        ("warmup_ratio", 1.0),
        ("lr_min_ratio", 1.1),
        ("lr_gamma", 2.0),
        ("valid_fraction", 1.0),
        ("optimizer", "lion"),
        ("lr_scheduler", "cosine_with_restarts"),
        ("seed", -1),
        ("packing", 1),
        ("keep_checkpoints", 0),
        ("out", 3),
    ],
)
def test_an_impossible_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{field: value})
    assert caught.value.field == field


def test_limits_themselves_are_allowed() -> None:
    config = TrainConfig(lr_min_ratio=1, lr_gamma=1.0, adam_beta1=0, max_grad_norm=0, seq_len=2)
    assert config.lr_min_ratio == 1.0
    assert type(config.lr_min_ratio) is float


def test_a_path_serves_as_a_directory(tmp_path: Path) -> None:
    assert TrainConfig(out=tmp_path).out == str(tmp_path)


def test_other_programs_spellings() -> None:
    config = TrainConfig.from_dict(
        {"micro_batch_size": 3, "sequence_len": 64, "num_epochs": 2, "optim": "sgd", "output_dir": "run"}
    )
    assert (config.batch_size, config.seq_len, config.num_train_epochs) == (3, 64, 2.0)
    assert (config.optimizer, config.out) == ("sgd", "run")
    for name in ("adamw_8bit", "adamw8bit", "adamw_bnb_8bit"):
        assert TrainConfig.from_dict({"optim": name}).optimizer == "adamw_8bit"
    assert TrainConfig.from_dict({"optim": "adamw_torch"}).optimizer == "adamw"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rat": 1e-3}, "learning_rate"),
        ({"micro_batch_sise": 1}, "micro_batch_size"),
        ({"batch_size": 1, "micro_batch_size": 2}, "batch_size, which is given as well"),
        ({"zzz": 1}, "is no setting"),
        ({"optim": ["adamw"]}, "is not one of adamw"),
    ],
)
def test_unknown_and_doubled_keys(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TrainConfig.from_dict(values)
