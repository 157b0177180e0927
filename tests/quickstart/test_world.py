"""The generated texts: the same everywhere, notes that say what their records hold, nothing held out is learned."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from entrenar.quickstart import story, world

SCRIPT = """
import hashlib
from entrenar.quickstart import world
texts = [*world.corpus(7, 300), *(s["prompt"] + s["completion"] for s in world.orders(7, 300))]
print(hashlib.sha256("\\n".join(texts).encode()).hexdigest())
"""
KEYS = ["name", "item", "count", "town", "day", "price"]


@pytest.mark.tier2
def test_the_same_seed_gives_the_same_text_whatever_python_hashes_with() -> None:
    digests = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "4294967295")
    }
    assert digests == {b"950e94987ad00ab239500d298b89883064965f345d37262d04bd18cdcb7e3c20\n"}


@pytest.mark.tier1
def test_seeds_differ() -> None:
    assert list(world.corpus(0, 3)) != list(world.corpus(1, 3))
    assert world.orders(0, 3) != world.orders(1, 3)


@pytest.mark.tier1
def test_no_held_out_note_is_in_the_training_data() -> None:
    test, train = story.notes(story.HELD_OUT)
    assert len(test) >= 100
    for part in ("prompt", "completion"):
        seen = {sample[part] for sample in train}
        assert len(seen) == len(train)
        assert not seen & {sample[part] for sample in test}


@pytest.mark.tier1
def test_every_name_and_thing_of_a_held_out_note_occurs_in_training() -> None:
    """What is new in a held-out note is the combination: a model can't be asked for a word it never wrote."""
    test, train = story.notes(story.HELD_OUT)
    learned = [json.loads(sample["completion"]) for sample in train]
    for key in KEYS:
        known = {str(word) for record in learned for word in str(record[key]).split()}
        asked = {word for sample in test for word in str(json.loads(sample["completion"])[key]).split()}
        assert asked <= known


@pytest.mark.tier1
def test_a_note_says_all_that_its_record_holds() -> None:
    for sample in world.orders(3, 400):
        text, record = sample["prompt"].lower(), json.loads(sample["completion"])
        assert list(record) == KEYS
        assert world.COUNTS[record["count"] - 2] in text
        for value in (record["name"], record["item"] + "s", record["town"], record["day"], f"{record['price']} coins"):
            assert value.lower() in text


@pytest.mark.tier1
def test_the_base_never_reads_a_record() -> None:
    for text in world.corpus(0, 2000):
        assert "Note:" not in text
        assert "Record:" not in text
        assert sum(f'"{key}":' in text for key in KEYS) <= 3


@pytest.mark.tier1
def test_choices_differ_and_cover() -> None:
    dice = world.Dice(5)
    assert all(len(set(dice.some(world.DAYS, 7))) == 7 for _ in range(20))
    assert {dice.below(6) for _ in range(200)} == set(range(6))
