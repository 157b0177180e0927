"""Configurations: true parameter counts, and every absurd value refused by name."""

import pytest

from entrenar import ModelConfig
from entrenar.errors import ConfigError

pytestmark = pytest.mark.tier1

# from the models' publications
COUNTS = {
    "llama-124m": 123_685_632,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "qwen2.5-0.5b": 494_032_768,
    "phi-3-mini": 3_821_079_552,
}


@pytest.mark.parametrize("name", COUNTS)
def test_presets_have_the_published_parameter_counts(name):
    assert ModelConfig.preset(name).num_parameters() == COUNTS[name]


def test_linear_layers_of_7b():
    shapes = ModelConfig.preset("llama2-7b").parameter_shapes()
    in_layers = sum(a[0] * a[1] for n, a in shapes.items() if "_proj" in n)
    assert in_layers == 6_476_005_376


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="llama2-7b"):
        ModelConfig.preset("llama2-7")


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings"]  # fmt: skip


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("value", [0, -1, 10**12, 2**64, 3.5, "8", True])
def test_an_absurd_size_is_refused_by_name(field, value):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**{field: value})
    assert error.value.field == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor"),
        ({"attention_bias": "no"}, "attention_bias"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": (2, None)}, "eos_token_id"),
        ({"model_type": "gpt9"}, "model_type"),
        ({"rope_scaling": {"rope_type": "martian"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling.factor"),
    ],
)
def test_values_that_do_not_fit_together_name_the_field(changes, field):
    with pytest.raises(ConfigError) as error:
        ModelConfig(**changes)
    assert error.value.field == field


def test_counts_of_absurd_models_do_not_overflow():
    largest = ModelConfig(
        vocab_size=2**24, hidden_size=2**18, intermediate_size=2**20, num_hidden_layers=2**12,
        num_attention_heads=2**10,
        max_position_embeddings=2**31 - 1,
    )  # fmt: skip
    h, f, v, n = 2**18, 2**20, 2**24, 2**12
    assert largest.num_parameters() == 2 * v * h + n * (4 * h * h + 3 * h * f + 2 * h) + h
