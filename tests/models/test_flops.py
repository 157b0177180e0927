"""The count of a step's arithmetic against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

import entrenar as en
from entrenar.models.flops import step_flops, visible_pairs

pytestmark = pytest.mark.tier1

SIZES = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}  # fmt: skip
LAYER = 8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 12  # q, k and v, o, the MLP's three
PAIR = 2 * 2 * 7 * 2 * 4  # layers, heads, products, FLOPs a multiply-add, head size


@pytest.mark.parametrize("tied", [True, False])
def test_full_and_lora_steps(tied: bool) -> None:
    model = en.CausalLM.from_config(en.ModelConfig(tie_word_embeddings=tied, **SIZES))
    pairs = 5 * 6 // 2
    assert step_flops(model, 3, 5) == 3 * (5 * 6 * (2 * LAYER + 11 * 8) + pairs * PAIR)
    model.add_lora(en.LoraConfig(r=2, target_modules=("q_proj", "down_proj")))
    low_rank = 2 * 2 * ((8 + 8) + (12 + 8))
    assert step_flops(model, 3, 5) == 3 * (5 * (4 * (2 * LAYER + 11 * 8) + 6 * low_rank) + pairs * PAIR)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 100])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_pairs_are_those_of_the_mask(length: int, window: int | None) -> None:
    query, key = np.mgrid[:length, :length]
    assert visible_pairs(length, window) == ((key <= query) & (query - key < (window or length))).sum()
