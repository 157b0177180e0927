"""What headers mean: rotary scaling against the published formulas, Qwen2's window, transforms that undo each other."""

import math

import numpy as np
import pytest
import tiny_models as tiny
from hypothesis import given
from hypothesis import strategies as st

import entrenar
from entrenar import CausalLM, ModelConfig
from entrenar.errors import ConfigError, FormatError, UnsupportedError
from entrenar.models.arch.base import permute_heads
from entrenar.models.arch.rope import llama3_scaling, rope_spec
from entrenar.models.gguf_config import config_from_gguf, gguf_metadata
from entrenar.models.hf_config import config_from_hf, config_to_hf

pytestmark = pytest.mark.tier1
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_permuting_heads_is_undone_and_interleaves_the_halves(heads, half, width):
    rows = heads * 2 * half
    w = np.arange(rows * width).reshape(rows, width)
    transform = permute_heads(heads)
    there = transform.to_gguf(w)
    assert np.array_equal(transform.from_gguf(there), w)
    for head in range(heads):
        for i in range(half):  # row 2i of a head is its i-th, row 2i + 1 its partner in the second half
            at = head * 2 * half
            assert np.array_equal(there[at + 2 * i], w[at + i])
            assert np.array_equal(there[at + 2 * i + 1], w[at + half + i])


def test_llama3_scaling_follows_its_published_rule():
    config = ModelConfig(head_dim=128, rope_theta=500000.0, rope_scaling=LLAMA3)
    plain = [500000.0 ** (-2 * i / 128) for i in range(64)]
    want = []
    for f in plain:
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4.0:
            want.append(f)
        elif wavelength > 8192 / 1.0:
            want.append(f / 8.0)
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            want.append((1 - smooth) * f / 8.0 + smooth * f)
    got = rope_spec(config).inv_freq
    assert np.allclose(got, want, rtol=1e-12)
    assert got[0] == plain[0]
    assert got[-1] == pytest.approx(plain[-1] / 8)


def test_divisors_that_are_not_llama3s_are_not_guessed_at():
    config = ModelConfig(head_dim=128, rope_theta=500000.0)
    assert llama3_scaling(np.linspace(1, 8, 64, dtype=np.float32), config) is None
    assert llama3_scaling(np.ones(7, np.float32), config) is None


@pytest.mark.parametrize(
    ("scaling", "field"),
    [
        ({**LLAMA3, "low_freq_factor": 4.0}, "rope_scaling.high_freq_factor"),
        ({**LLAMA3, "factor": float("nan")}, "rope_scaling.factor"),
        ({"type": "yarn"}, "rope_scaling"),
    ],
)
def test_impossible_scalings_name_the_field(scaling, field):
    with pytest.raises(ConfigError) as error:
        ModelConfig(rope_scaling=scaling)
    assert error.value.field == field


def test_part_of_a_head_may_turn_but_an_even_part():
    phi = ModelConfig(model_type="phi3", partial_rotary_factor=0.5)
    assert rope_spec(phi, partial=True).rotary_dim == 64
    with pytest.raises(ConfigError, match="even"):
        phi.replace(hidden_size=32 * 6, head_dim=6)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_only_phi3_turns_a_part_of_a_head(model_type):
    """transformers and llama.cpp rotate whole heads of the others, whatever the file says."""
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        ModelConfig(model_type=model_type, partial_rotary_factor=0.5)
    with pytest.raises(UnsupportedError, match="dimension_count"):
        config_from_gguf(*header(**{"llama.rope.dimension_count": 4}), "m.gguf")


def test_llama_has_no_window_and_ignores_one_in_a_file():
    """As transformers and llama.cpp do; only Mistral, Qwen2 and Phi-3 slide."""
    with pytest.raises(ConfigError, match="sliding_window"):
        ModelConfig(sliding_window=7)
    raw = config_to_hf(tiny.CONFIGS["llama"], "float32") | {"sliding_window": 7}
    assert config_from_hf(raw, "config.json").sliding_window is None
    assert config_from_gguf(*header(**{"llama.attention.sliding_window": 7}), "m.gguf").sliding_window is None


def qwen(**changes):
    return config_to_hf(tiny.CONFIGS["qwen2"], "float32") | changes


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 7}, None),
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, None),  # no layer is left to slide
        ({"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, 7),
    ],
)
def test_qwen2_slides_only_where_it_says(keys, window):
    assert config_from_hf(qwen(**keys), "config.json").sliding_window == window


def test_a_window_on_some_layers_only_is_not_served():
    with pytest.raises(UnsupportedError, match="max_window_layers"):
        config_from_hf(qwen(use_sliding_window=True, sliding_window=7, max_window_layers=1), "config.json")
    with pytest.raises(UnsupportedError, match="layer_types"):
        config_from_hf(qwen(layer_types=["full_attention", "sliding_attention"]), "config.json")


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        ([], "object"),
        ({**config_to_hf(tiny.CONFIGS["llama"], "float32"), "vocab_size": None}, "vocab_size|None"),
        ({**config_to_hf(tiny.CONFIGS["llama"], "float32"), "rope_parameters": 3}, "rope_parameters"),
        ({**config_to_hf(tiny.CONFIGS["llama"], "float32"), "rms_norm_eps": "small"}, "rms_norm_eps"),
        ({**config_to_hf(tiny.CONFIGS["mistral-window"], "float32"), "sliding_window": "wide"}, "sliding_window"),
        ({**config_to_hf(tiny.CONFIGS["llama"], "float32"), "rope_parameters": {"rope_theta": "x"}}, "rope_theta"),
    ],
)
def test_a_config_json_of_the_wrong_kind_is_a_format_error(raw, where):
    if isinstance(raw, dict) and raw.get("vocab_size", 1) is None:
        raw.pop("vocab_size")
    with pytest.raises(FormatError, match=where):
        config_from_hf(raw, "config.json")


@pytest.mark.parametrize("key", ["model_type", "layer_types"])
@pytest.mark.parametrize("value", [["x"], {"a": 1}, 3, True])
def test_a_name_that_is_no_name_is_not_served(key, value):
    with pytest.raises(UnsupportedError, match=key):
        config_from_hf({**config_to_hf(tiny.CONFIGS["llama"], "float32"), key: value}, "config.json")


def test_several_end_tokens_stay_several():
    raw = config_to_hf(tiny.CONFIGS["llama"].replace(eos_token_id=(2, 7)), "float32")
    assert raw["eos_token_id"] == [2, 7]
    assert config_from_hf(raw, "config.json").eos_token_ids == (2, 7)


def header(**changes):
    metadata = gguf_metadata(tiny.CONFIGS["llama"]) | changes
    shapes = {"token_embd.weight": (37, 24), "output.weight": (37, 24)}
    return {k: v for k, v in metadata.items() if v is not None}, shapes


@pytest.mark.parametrize(
    ("changes", "error", "where"),
    [
        ({"llama.attention.head_count": None}, FormatError, "head_count"),
        ({"llama.rope.dimension_count": 99}, FormatError, "dimension_count"),
        ({"llama.rope.dimension_count": "6"}, FormatError, "dimension_count"),
        ({"llama.attention.value_length": 12}, UnsupportedError, "value_length"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, FormatError, "layer_norm_rms_epsilon"),
    ],
)
def test_gguf_headers_that_can_not_be_are_named(changes, error, where):
    with pytest.raises(error, match=where):
        config_from_gguf(*header(**changes), "m.gguf")


def test_absent_gguf_keys_have_the_formats_defaults():
    drop = {f"llama.{k}": None for k in ("rope.freq_base", "attention.head_count_kv", "attention.key_length",
                                         "attention.value_length", "rope.dimension_count")}  # fmt: skip
    config = config_from_gguf(*header(**drop, **{"tokenizer.ggml.bos_token_id": 4294967295}), "m.gguf")
    assert (config.rope_theta, config.kv_heads, config.head_size) == (10000.0, 4, 6)
    assert config.bos_token_id is None


def test_windows_and_half_a_rotation_of_phi3_are_read(tmp_path):
    model = CausalLM.from_config(tiny.CONFIGS["phi3"].replace(head_dim=8, partial_rotary_factor=0.5))
    model.save(tmp_path / "m.gguf")
    config = entrenar.load(tmp_path / "m.gguf").config
    assert (config.sliding_window, config.partial_rotary_factor) == (9, 0.5)
    assert config_from_gguf(*header(**{"llama.attention.sliding_window": 0}), "m.gguf").sliding_window is None


def test_an_embedding_of_the_wrong_rank_is_an_error():
    metadata, _ = header()
    for shapes in ({}, {"token_embd.weight": (37,)}):
        with pytest.raises(FormatError, match="token_embd"):
            config_from_gguf(metadata, shapes, "m.gguf")


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),  # llama.cpp takes "linear" for granted
        ({"rope.scale_linear": 4.0}, 4.0),  # the older name
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.factor": 0.0}, None),
    ],
)
def test_linear_scaling_is_read_as_llama_cpp_reads_it(keys, factor):
    scaling = config_from_gguf(*header(**{f"llama.{k}": v for k, v in keys.items()}), "m.gguf").rope_scaling
    assert (scaling and scaling["factor"]) == factor
