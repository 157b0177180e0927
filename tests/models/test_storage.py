"""Weights of one product lie in one array, from wherever they come, and stay there whatever is done to them."""

import itertools

import numpy as np
import pytest
import tiny_models as tiny

import entrenar
from entrenar import CausalLM, LoraConfig
from entrenar.models.storage import ALIGNMENT, Rows, aligned
from entrenar.optim import AdamW

LORA = LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")
GROUPS = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]


def assert_grouped(model):
    weights = {name: weight.data for name, weight in model.named_weights()}
    for layer in range(model.config.num_hidden_layers):
        for group in GROUPS:
            for kind in ("weight", "bias"):
                arrays = [weights.get(f"model.layers.{layer}.{name}.{kind}") for name in group]
                if arrays[0] is None:
                    continue
                assert arrays[0].ctypes.data % ALIGNMENT == 0
                for above, below in itertools.pairwise(arrays):
                    assert above.flags.c_contiguous
                    assert below.ctypes.data == above.ctypes.data + above.nbytes


@pytest.mark.tier1
@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2"])
def test_grouped_weights_are_rows_of_one_array(tmp_path, name):
    model = tiny.model(name)
    assert_grouped(model)
    for path, dtype in (("m.gguf", "f16"), ("m.gguf", "bf16"), ("dir", "auto")):
        model.save(tmp_path / path, dtype=dtype)
        assert_grouped(entrenar.load(tmp_path / path))
    assert_grouped(CausalLM.from_config(tiny.CONFIGS[name], dtype="bf16"))


def test_merging_and_training_write_in_place():
    model = tiny.model(lora=LORA)
    before = tiny.arrays(model)["model.layers.0.self_attn.k_proj.weight"]
    old = before.copy()
    model.merge_adapter()
    after = tiny.arrays(model)["model.layers.0.self_attn.k_proj.weight"]
    assert np.shares_memory(before, after)
    assert not np.array_equal(old, after)
    assert_grouped(model)
    model = tiny.model("qwen2")
    model.loss(np.arange(9)[None]).backward()
    AdamW(model.named_parameters(), lr=1e-2).step()
    assert_grouped(model)


def test_a_weight_of_another_type_lies_elsewhere():
    f32, f16 = np.dtype(np.float32), np.dtype(np.float16)
    rows = Rows(7, 5)
    a, b, c = (rows.place(begin, n)(dtype) for begin, n, dtype in ((0, 2, f32), (2, 4, f16), (6, 1, f32)))
    assert (a.shape, b.shape, c.shape) == ((2, 5), (4, 5), (1, 5))
    assert np.shares_memory(a.base, c.base)
    assert c.ctypes.data == a.ctypes.data + 6 * 5 * 4
    assert not np.shares_memory(a.base, b.base)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (129, 7)])
def test_memory_is_aligned_and_whole(shape):
    for dtype in (np.dtype(np.float32), np.dtype(np.float16)):
        array = aligned(shape, dtype)
        array.fill(1)
        assert (array.shape, array.dtype) == (shape, dtype)
        assert array.ctypes.data % ALIGNMENT == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable
