"""Vocabularies trained on text: sizes, determinism, round trips."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.errors import ConfigError, TokenizerError
from entrenar.tokenizer import Tokenizer, from_characters, train_bpe

TEXTS = [
    f"the {a} {b} sat on {n} mats, naïve—日本 {n * 37}.\n"
    for n in range(40)
    for a, b in (("old", "cat"), ("new", "hat"))
]
BPE = train_bpe(TEXTS, 280)
CHARACTERS = from_characters("".join(TEXTS))


@pytest.mark.tier1
@given(st.text())
def test_bpe_loses_nothing(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text.replace("<unk>", "").replace("<s>", "").replace("</s>", "")


@pytest.mark.tier1
@given(st.text(alphabet=sorted(set("".join(TEXTS)))))
def test_characters_lose_nothing(text: str) -> None:
    ids = CHARACTERS.encode(text)
    assert ids[0] == CHARACTERS.bos_id
    assert len(ids) == 1 + len(text)
    assert CHARACTERS.decode(ids) == text


@pytest.mark.tier1
def test_unknown_character_is_unk() -> None:
    assert CHARACTERS.encode("aZ", add_special=False) == [CHARACTERS.token_id("a"), CHARACTERS.unk_id]


@pytest.mark.tier1
def test_bpe_framing_and_size() -> None:
    assert BPE.vocab_size == 280
    assert BPE.encode("the")[0] == BPE.bos_id
    assert len(BPE.encode("the old cat", add_special=False)) < len("the old cat")
    assert [BPE.token(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    assert BPE.eos_id == 2


def test_bpe_is_the_same_in_every_process() -> None:
    """One thread and four, another hash seed: the same merges in the same order."""
    script = (
        "import sys, hashlib\n"
        "from entrenar.tokenizer import train_bpe\n"
        "text = ''.join(chr(97 + (i * i) % 7) + ' ' * (i % 3 == 0) for i in range(20000))\n"
        "print(hashlib.sha256(train_bpe([text], 400).engine.to_str().encode()).hexdigest())"
    )
    digests = set()
    for threads, seed in (("1", "0"), ("4", "1"), ("3", "2")):
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True, timeout=60
        )
        digests.add(run.stdout.strip())
    assert len(digests) == 1
    assert len(digests.pop()) == 64


@pytest.mark.tier1
@pytest.mark.parametrize("size", [-1, 0, 258, 1 << 40])
def test_impossible_size(size: int) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        train_bpe(["text"], size)


@pytest.mark.tier1
def test_empty_text_has_no_characters() -> None:
    with pytest.raises(TokenizerError, match="empty"):
        from_characters("")


@pytest.mark.tier1
@pytest.mark.parametrize("tokenizer", [BPE, CHARACTERS], ids=["bpe", "characters"])
def test_refuses_what_is_no_text_or_no_id(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(TokenizerError, match="negative"):
        tokenizer.decode([-1])
    with pytest.raises(TokenizerError, match="outside the vocabulary"):
        tokenizer.token(tokenizer.vocab_size)
    assert tokenizer.decode([tokenizer.vocab_size]) == "\ufffd"
