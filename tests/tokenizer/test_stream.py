"""Streaming: pieces together are the whole, UTF-8 is never broken, nothing waits for long."""

from __future__ import annotations

import pytest
import spm_vocabulary
from hypothesis import given
from hypothesis import strategies as st

from entrenar.tokenizer import Tokenizer, from_characters, from_gguf, train_bpe

pytestmark = pytest.mark.tier1


def make_spm() -> Tokenizer:
    tokenizer = from_gguf(spm_vocabulary.metadata())
    assert tokenizer is not None
    return tokenizer


SPM = make_spm()
BPE = train_bpe(["naïve 日本語 text 🎉 " * 20], 300)
ALL = [SPM, BPE, from_characters("abc é日")]
IDS = [SPM.token_id(f"<0x{b:02X}>") for b in "日".encode()]


@pytest.mark.parametrize("tokenizer", ALL, ids=["spm", "bpe", "characters"])
@given(data=st.data(), skip=st.booleans())
def test_pushes_and_finish_are_decode(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    stream = tokenizer.stream(skip_special=skip)
    pieces = [stream.push(i) for i in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids, skip_special=skip)


@given(st.lists(st.integers(0, 255), max_size=30))
def test_any_bytes_decode_as_utf8_with_replacement(values: list[int]) -> None:
    ids = [3 + value for value in values]  # <0x00> is id 3
    assert SPM.decode([SPM.token_id("a") or 0, *ids]) == (b"a" + bytes(values)).decode("utf-8", "replace")


@given(st.text(alphabet="aé日🎉 \n", max_size=30))
def test_pushes_of_text_never_hold_a_broken_character(text: str) -> None:
    stream = BPE.stream()
    pieces = [stream.push(i) for i in BPE.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert stream.finish() == ""


def test_incomplete_waits_and_invalid_does_not() -> None:
    stream = SPM.stream()
    first, second, third = IDS
    assert first is not None
    assert second is not None
    assert third is not None
    assert [stream.push(first), stream.push(second), stream.push(third)] == ["", "", "日"]
    assert stream.push(first) == ""
    assert stream.push(first) == "\ufffd", "a second lead byte shows that the first leads nowhere"
    a = SPM.token_id("a") or 0
    assert stream.push(a) == "\ufffda"
    assert stream.push(3 + 0xFF) == "\ufffd"
    assert [stream.push(first), stream.finish()] == ["", "\ufffd"]


def test_space_in_front() -> None:
    word, special = SPM.token_id("\u2581ab") or 0, 1
    assert SPM.decode([word, word]) == "ab ab"
    assert SPM.decode([special, word]) == "ab"
    assert SPM.decode([special, word], skip_special=False) == "<s> ab"
    assert SPM.stream().push(word) == "ab"
    assert SPM.stream([special]).push(word) == "ab"
    assert SPM.stream([special, word]).push(word) == " ab"
    assert SPM.stream([word, special]).push(word) == "ab", "after a special token the space is not text"


@given(st.text(alphabet="abc é日", max_size=12), st.text(alphabet="abc é日", max_size=12))
def test_continuation_goes_on_from_the_text_before(before: str, after: str) -> None:
    for tokenizer in ALL:
        ids = [*tokenizer.encode(before + "c"), *tokenizer.encode_continuation(after)]
        assert tokenizer.decode(ids) == before + "c" + after
