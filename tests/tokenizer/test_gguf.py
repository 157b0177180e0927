"""Tokenizers from GGUF metadata: llama.cpp's own test strings, defaults, and refusal of vocabularies that lie."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spm_vocabulary
from hypothesis import given
from hypothesis import strategies as st

from entrenar.errors import TokenizerError
from entrenar.formats import gguf_read
from entrenar.tokenizer import Tokenizer, from_gguf, train_bpe

HERE = Path(__file__).parent
BPE = train_bpe(["low lower lowest newer wider " * 9], 270).gguf_metadata()


def make(metadata: dict[str, object]) -> Tokenizer:
    tokenizer = from_gguf(metadata)
    assert tokenizer is not None
    return tokenizer


def spm(**changes: Any) -> Tokenizer:
    return make(spm_vocabulary.metadata(**changes))


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token(i) for i in tokenizer.encode(text)]


@pytest.mark.parametrize("name", ["qwen2", "phi-3", "gpt-2"])
def test_llama_cpp_vectors(shared_data: Path, name: str) -> None:
    path = shared_data / f"tokenizers/ggml-vocab-{name}.gguf"
    tokenizer = make(dict(gguf_read.read(path).metadata))
    texts = Path(f"{path}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = [list(map(int, line.split())) for line in Path(f"{path}.out").read_text().split("\n")]
    assert len(texts) == len(expected) == 47
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_special=False) == ids, repr(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.tier2
def test_sentencepiece_on_tok512(shared_data: Path) -> None:
    """tests/oracles/tokens.py made the expected ids with the sentencepiece package and llama.cpp."""
    oracle = json.loads((HERE / "oracle_tokens.json").read_text())
    tokenizer = make(dict(gguf_read.read(shared_data / "models/stories260K.gguf").metadata))
    assert len(oracle["sentencepiece"]) >= 50
    for text, ids in oracle["sentencepiece"]:
        assert tokenizer.encode(text, add_special=False) == ids, repr(text)
    for text, ids in oracle["llama.cpp"]["stories260K"]:
        assert tokenizer.encode(text) == ids, repr(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.tier2
def test_character_model(shared_data: Path) -> None:
    tokenizer = make(dict(gguf_read.read(shared_data / "models/babyllama-tok105-f32.gguf").metadata))
    ids = tokenizer.encode("Once upon a time")
    assert len(ids) == 1 + 1 + len("Once upon a time"), "BOS, the space in front, one id a character"
    assert tokenizer.decode(ids) == "Once upon a time"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (2,), None)


@pytest.mark.tier1
def test_absent_keys_have_llama_cpp_defaults() -> None:
    tokenizer = spm(bos_token_id=None, eos_token_id=None, unknown_token_id=None, token_type=None)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.unk_id) == (1, (2,), 0)
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.pad_id) == (True, False, None)
    assert pieces(tokenizer, "abc") == ["<s>", "\u2581ab", "c"]
    assert from_gguf({"general.architecture": "llama"}) is None


@pytest.mark.tier1
def test_highest_score_joins_first() -> None:
    # "bc" scores below "ab"; raising it changes what "abc" becomes inside a word
    assert pieces(spm(), "cabc") == ["<s>", "\u2581", "c", "abc"]
    scores = spm_vocabulary.metadata()["tokenizer.ggml.scores"]
    assert isinstance(scores, list)
    last = [*scores[:-4], -99.0, *scores[-3:]]  # "abc" joins last, so "ab" and "c" have joined nothing else before
    assert pieces(spm(scores=last), "cabc") == ["<s>", "\u2581", "c", "abc"]
    without = copy.copy(scores)
    without[259 + spm_vocabulary.PIECES.index("bc")] = 5.0
    assert pieces(spm(scores=without), "cabc") == ["<s>", "\u2581", "c", "abc"]
    assert pieces(spm(scores=without), "abb") == ["<s>", "\u2581ab", "b"]
    assert pieces(spm(scores=without), "abc") == ["<s>", "\u2581a", "bc"]


@pytest.mark.tier1
def test_bytes_spaces_and_user_defined_tokens() -> None:
    tokenizer = spm()
    assert pieces(tokenizer, "é日") == ["<s>", "\u2581", "é", "<0xE6>", "<0x97>", "<0xA5>"]
    assert pieces(tokenizer, "a<tool>a") == ["<s>", "\u2581a", "<tool>", "\u2581a"]
    assert tokenizer.decode(tokenizer.encode("  a  b")) == "  a  b"
    assert tokenizer.encode("") == [1]
    assert pieces(spm(add_space_prefix=False), "a") == ["<s>", "a"]
    assert tokenizer.decode(tokenizer.encode("a<tool>")) == "a<tool>", "user-defined tokens are text"
    assert tokenizer.decode([1, *tokenizer.encode("a", add_special=False), 2]) == "a"


@pytest.mark.tier1
def test_framing_and_ids() -> None:
    tokenizer = spm(add_bos_token=False, add_eos_token=True, eot_token_id=5, padding_token_id=0xFFFFFFFF)
    assert pieces(tokenizer, "a") == ["\u2581a", "</s>"]
    assert tokenizer.encode_prompt("a") == tokenizer.encode("a", add_special=False), "a prompt is not ended"
    assert tokenizer.eos_ids == (2, 5)
    assert tokenizer.pad_id is None
    assert spm(bos_token_id=np.uint32(2)).bos_id == 2
    assert spm(bos_token_id=0xFFFFFFFF).encode("a") == spm().encode("a")[1:]


@pytest.mark.tier1
def test_phi3_control_tokens_swallow_the_space_after_them() -> None:
    tokens = spm_vocabulary.metadata()["tokenizer.ggml.tokens"]
    types = spm_vocabulary.metadata()["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    metadata = spm_vocabulary.metadata(
        tokens=[*tokens, "<|end|>"], token_type=[*types, 3], scores=[-float(i) for i in range(len(tokens) + 1)]
    )
    phi = make({**metadata, "general.architecture": "phi3"})
    assert pieces(phi, "<|end|>\n a") == ["<s>", "<|end|>", "\u2581a"]
    assert pieces(make(metadata), "<|end|> a") == ["<s>", "<|end|>", "\u2581", "\u2581a"]
    assert phi.eos_ids == (2, len(tokens)), "<|end|> ends a turn whatever the file says"


TOKENS = spm_vocabulary.metadata()["tokenizer.ggml.tokens"]
COUNT = 259 + len(spm_vocabulary.PIECES)


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"model": None}, "model", "is missing"),
        ({"model": "bert"}, "model", "is 'bert'"),
        ({"model": 7}, "model", "must be str, is int"),
        ({"tokens": None}, "tokens", "is missing"),
        ({"tokens": []}, "tokens", "is empty"),
        ({"tokens": "abc"}, "tokens", "must be an array of strings, is str"),
        ({"tokens": ["a", 5]}, "tokens", "must hold strings, item 1 is 5"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "tokens", f"holds 'a' twice, at 260 and {COUNT - 1}"),  # type: ignore[index]
        ({"tokens": [*TOKENS[:-2], "x" * 300, "y"]}, "tokens", "item 270 has 300 characters"),  # type: ignore[index]
        ({"scores": None}, "scores", "is missing"),
        ({"scores": [0.0]}, "scores", f"has 1 items, tokenizer.ggml.tokens has {COUNT}"),
        ({"scores": [float("nan")] * COUNT}, "scores", "must hold numbers, item 0 is nan"),
        ({"scores": np.zeros(3, np.float32)}, "scores", "has 3 items"),
        ({"token_type": [1]}, "token_type", "has 1 items"),
        ({"token_type": [7] * COUNT}, "token_type", "item 0 is 7"),
        ({"token_type": [1.5] * COUNT}, "token_type", "must hold integers"),
        ({"bos_token_id": COUNT}, "bos_token_id", f"is {COUNT}"),
        ({"eos_token_id": -7}, "eos_token_id", "is -7"),
        ({"eot_token_id": "x"}, "eot_token_id", "must be int, is str"),
        ({"padding_token_id": True}, "padding_token_id", "must be int, is bool"),
        ({"add_bos_token": 1}, "add_bos_token", "must be bool, is int"),
        ({"add_space_prefix": "no"}, "add_space_prefix", "must be bool"),
    ],
)
def test_spm_faults_name_the_key(changes: dict[str, Any], key: str, reason: str) -> None:
    with pytest.raises(TokenizerError, match=rf"^tokenizer\.ggml\.{key} {reason}"):
        from_gguf(spm_vocabulary.metadata(**changes))


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"merges": None}, "merges", "is missing"),
        ({"merges": ["ab"]}, "merges", "item 0 is 'ab', not two tokens"),
        ({"merges": ["l ", "x"]}, "merges", "item 0 is 'l ', not two tokens"),
        ({"merges": ["l q1"]}, "merges", "item 0 .* needs 'q1', which tokenizer.ggml.tokens lacks"),
        ({"merges": ["q z"]}, "merges", "item 0 .* needs 'qz'"),
        ({"merges": [1]}, "merges", "must hold strings"),
        ({"pre": "chameleon"}, "pre", "is 'chameleon'; served are gpt-2"),
        (
            {"tokens": ["a", "b"], "token_type": None, "merges": [], "unknown_token_id": 0xFFFFFFFF},
            "tokens",
            "can't spell",
        ),
    ],
)
def test_bpe_faults_name_the_key(changes: dict[str, Any], key: str, reason: str) -> None:
    metadata = {**BPE, **{f"tokenizer.ggml.{k}": v for k, v in changes.items()}}
    kept = {k: v for k, v in metadata.items() if v is not None}
    if "tokens" in changes:
        kept = {k: v for k, v in kept.items() if not k.endswith(("bos_token_id", "eos_token_id"))}
    with pytest.raises(TokenizerError, match=rf"^tokenizer\.ggml\.{key} {reason}"):
        from_gguf(kept)


@pytest.mark.tier1
def test_template_must_be_text() -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.chat_template must be str"):
        from_gguf({**spm_vocabulary.metadata(), "tokenizer.chat_template": 5})


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 300), st.floats(), st.text(max_size=5),
    st.lists(st.one_of(st.text(max_size=4), st.integers(-3, 9), st.floats()), max_size=6),
)  # fmt: skip
KEYS = ["model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id", "unknown_token_id",
        "add_bos_token", "add_eos_token", "add_space_prefix", "padding_token_id", "eot_token_id"]  # fmt: skip


@pytest.mark.tier1
@given(st.sampled_from([BPE, spm_vocabulary.metadata()]), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_metadata_is_a_tokenizer_or_a_typed_error(base: dict[str, object], changes: dict[str, Any]) -> None:
    metadata = {**base, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    try:
        tokenizer = from_gguf({k: v for k, v in metadata.items() if v is not None})
    except TokenizerError:
        return
    assert tokenizer is not None
    assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.encode("low é\n"))
