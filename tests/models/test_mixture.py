"""llama.cpp's mixtures of types."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import tiny_models as tiny

import entrenar
from entrenar import ModelConfig
from entrenar.errors import ConfigError
from entrenar.formats import gguf_read
from entrenar.models.mixture import OUTER, layer_type, outer_type
from entrenar.quant import QTYPES, QTensor

pytestmark = pytest.mark.tier1


def types_of(config, quant):
    """Types of an untied model's matrices by name."""
    names = [name for name, shape in config.parameter_shapes().items() if len(shape) == 2]
    return {n: outer_type(quant, n, False) if n in OUTER else layer_type(quant, n, config) for n in names}


@pytest.mark.parametrize(("quant", "most", "gigabytes"), [("q4_k_m", "q4_k", 4.08), ("q5_k_m", "q5_k", 4.78)])
def test_llama2_7b_has_the_types_and_the_size_of_the_files_that_people_share(quant, most, gigabytes):
    """llama.cpp prints 193 tensors of the one and 33 of q6_K for llama-2-7b; the files are listed with these sizes."""
    config = ModelConfig.preset("llama2-7b")
    types = types_of(config, quant)
    assert Counter(types.values()) == {most: 193, "q6_k": 33}
    assert types["lm_head.weight"] == "q6_k"
    assert types["model.embed_tokens.weight"] == most
    shapes = config.parameter_shapes()
    size = sum(QTYPES[kind].nbytes(int(np.prod(shapes[name]))) for name, kind in types.items())
    assert round(size / 1e9, 2) == gigabytes


def test_other_types_are_themselves_and_unknown_ones_are_named():
    config = ModelConfig.preset("llama2-7b")
    assert layer_type("q4_k", "model.layers.0.mlp.down_proj.weight", config) == "q4_k"
    assert outer_type("q4_k_m", "model.embed_tokens.weight", tied=True) == "q6_k"
    assert outer_type("q8_0", "lm_head.weight", tied=False) == "q8_0"
    with pytest.raises(ConfigError, match=r"'q4_k_x' is not one of .*q4_k_m, q5_k_m"):
        layer_type("q4_k_x", "model.layers.0.mlp.down_proj.weight", config)


@pytest.mark.parametrize(("quant", "most"), [("q4_k_m", "q4_k"), ("q5_k_m", "q5_k")])
def test_q_k_and_v_in_one_matrix_count_as_v(quant, most):
    """As llama-quant.cpp's category_is_attn_v has it; of Phi-3's 32 layers, 16 take more bits."""
    config = ModelConfig.preset("phi-3-mini")
    fused = [layer_type(quant, f"model.layers.{layer}.self_attn.qkv_proj.weight", config) for layer in range(32)]
    v = [layer_type(quant, f"model.layers.{layer}.self_attn.v_proj.weight", config) for layer in range(32)]
    assert fused == v
    assert Counter(fused) == {most: 16, "q6_k": 16}


def test_v_of_70b_models_has_five_bits_where_others_have_four():
    """Llama-2-70B's Q4_K_M as llama.cpp prints it: 441 tensors of q4_K, 40 of q5_K, 81 of q6_K."""
    config = ModelConfig.preset("llama2-70b")
    assert Counter(types_of(config, "q4_k_m").values()) == {"q4_k": 441, "q5_k": 40, "q6_k": 81}
    middle = "model.layers.10.self_attn.v_proj.weight"
    assert layer_type("q4_k_m", middle, config) == "q5_k"
    assert layer_type("q4_k_m", middle, config.replace(num_key_value_heads=64)) == "q4_k"  # 65B of Llama 1
    assert layer_type("q4_k_m", middle, config.replace(num_key_value_heads=64, model_type="qwen2")) == "q5_k"
    assert layer_type("q5_k_m", middle, config) == "q5_k"


def test_a_mixture_is_written_and_kept(tmp_path):
    config = ModelConfig(vocab_size=300, hidden_size=256, intermediate_size=512, num_hidden_layers=8,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    model = entrenar.CausalLM.from_config(config, dtype="f32")
    path = tmp_path / "m.gguf"
    model.save(path, quant="q4_k_m")
    file = gguf_read.read(path)
    assert file.metadata["general.file_type"] == 15
    more = [0, 3, 6, 7]  # of eight: the first, the last, and between them every third
    entrenar.load(path).save(tmp_path / "again.gguf")
    assert gguf_read.read(tmp_path / "again.gguf").metadata["general.file_type"] == 15
    stored = dict(entrenar.load(path).named_weights())
    made = dict(entrenar.CausalLM.from_config(config, quant="q4_k_m").named_weights())
    for layer in range(8):
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
            kind = "q6_k" if layer in more and name in ("self_attn.v_proj", "mlp.down_proj") else "q4_k"
            for weights in (stored, made):
                assert weights[f"model.layers.{layer}.{name}.weight"].qtype.name == kind
    assert stored["lm_head.weight"].qtype.name == "q6_k"
    assert not isinstance(made["lm_head.weight"], QTensor)
    tiny_rows = tiny.model("llama")  # 24 wide: no blocks fit
    tiny_rows.save(tmp_path / "t.gguf", quant="q4_k_m")
    loaded = entrenar.load(tmp_path / "t.gguf")
    assert {weight.dtype for _, weight in loaded.named_weights() if weight.ndim == 2} == {np.dtype(np.float16)}


def test_names_are_taken_in_any_case(tmp_path):
    """As llama.cpp writes them."""
    made = entrenar.CausalLM.from_config(tiny.CONFIGS["llama"], quant="NF4")
    assert {w.qtype.name for _, w in made.named_weights() if isinstance(w, QTensor)} == {"nf4"}
    wide = ModelConfig(vocab_size=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
                       num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    model = entrenar.CausalLM.from_config(wide, dtype="f32")
    for name in ("Q4_K_M", "q4_k_m"):
        (tmp_path / name).mkdir()
        model.save(tmp_path / name / "m.gguf", quant=name)
    assert (tmp_path / "Q4_K_M/m.gguf").read_bytes() == (tmp_path / "q4_k_m/m.gguf").read_bytes()
    model.save(tmp_path / "hf")
    loaded = entrenar.load(tmp_path / "hf", quant="Q8_0")
    assert {w.qtype.name for _, w in loaded.named_weights() if isinstance(w, QTensor)} == {"q8_0"}
