"""The base model that ships, and the recipe that made it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import need_isa

from entrenar.cli.settings import read_file, settings_of
from entrenar.cli.train import Command
from entrenar.models.load import load
from entrenar.quickstart import recipe, story, world


@pytest.mark.tier1
def test_it_is_small_and_f16() -> None:
    assert story.BASE.stat().st_size <= 2_000_000
    model = load(story.BASE)
    assert model.config.num_parameters() <= 1_000_000
    assert {weight.dtype for name, weight in model.named_weights() if weight.ndim == 2} == {np.dtype(np.float16)}


@pytest.mark.tier1
def test_it_reads_again_what_it_has_read() -> None:
    """What the fine-tune stands on: looking back and copying."""
    read = "Nora wrote a list: red lamp, Lima, Hugo, Friday. On the way Nora read it again:"
    again = load(story.BASE).generate(read, 20, temperature=0.0).text
    assert again.replace('"', "") == " red lamp, Lima, Hugo, Friday."


@pytest.mark.tier1
def test_it_answers_questions_like_those_it_has_read() -> None:
    answer = load(story.BASE).generate(story.ASKED, 4, stop=".", temperature=0.0).text
    assert answer.replace('"', "") == " Carla"


@pytest.mark.tier1
def test_the_settings_of_its_training_are_those_of_train() -> None:
    words = read_file(settings_of(Command), recipe.SETTINGS)
    config = load(story.BASE).config
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert words[name] == [str(getattr(config, name))]


@pytest.mark.tier1
def test_its_tokenizer_has_whole_words_for_the_world() -> None:
    tokenizer = load(story.BASE).tokenizer
    assert tokenizer is not None
    for word in (*world.NAMES, *world.TOWNS, *world.DAYS):
        assert len(tokenizer.encode(f" {word}", add_special=False)) == 1


@pytest.mark.tier2
def test_the_kernels_still_compute_what_the_base_was_made_with(tmp_path: Path) -> None:
    """Where this fails, the base is to be made again: docs/quickstart.md says how."""
    need_isa("avx2")
    assert recipe.first_digest(tmp_path) == recipe.FIRST_DIGEST
