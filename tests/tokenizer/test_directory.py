"""Directories and exports: what is saved reads back the same, by us and as GGUF keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import spm_vocabulary
from hypothesis import given
from hypothesis import strategies as st

from entrenar.errors import TokenizerError
from entrenar.formats import gguf_read, gguf_write
from entrenar.tokenizer import Tokenizer, from_characters, from_directory, from_gguf, train_bpe

HERE = Path(__file__).parent
TEXT = "the cat sat on the mat. naïve 日本語 12345, don't\n\n  two  spaces\tHELLO World <|end|> ½\u3000"


def made() -> dict[str, Tokenizer]:
    spm = from_gguf({**spm_vocabulary.metadata(), "tokenizer.chat_template": "{{ messages[0].content }}"})
    assert spm is not None
    return {"spm": spm, "bpe": train_bpe([TEXT * 20], 300), "characters": from_characters(TEXT)}


MADE = made()


def same(a: Tokenizer, b: Tokenizer | None) -> None:
    """Every property that a model depends on."""
    assert b is not None
    for name in ("vocab_size", "bos_id", "eos_ids", "pad_id", "unk_id", "add_bos", "add_eos", "chat_template",
                 "special_ids", "strips_space"):  # fmt: skip
        assert getattr(a, name) == getattr(b, name), name
    assert [a.token(i) for i in range(a.vocab_size)] == [b.token(i) for i in range(b.vocab_size)]
    for text in (TEXT, "", " ", "ab<s>abc a", "日"):
        assert a.encode(text) == b.encode(text)
        assert a.encode_continuation(text) == b.encode_continuation(text)
        assert a.decode(a.encode(text)) == b.decode(b.encode(text))


@pytest.mark.tier1
@pytest.mark.parametrize("name", MADE)
def test_save_and_load_is_the_same(tmp_path: Path, name: str) -> None:
    MADE[name].save(tmp_path / "one")
    loaded = from_directory(tmp_path / "one")
    same(MADE[name], loaded)
    assert loaded is not None
    loaded.save(tmp_path / "two")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.tier1
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("by_directory", [False, True])
def test_gguf_and_back_is_the_same(tmp_path: Path, name: str, by_directory: bool) -> None:
    start = MADE[name]
    if by_directory:
        start.save(tmp_path)
        start = from_directory(tmp_path)  # type: ignore[assignment]
    gguf_write.write(tmp_path / "t.gguf", {"general.architecture": "llama", **start.gguf_metadata()}, [])
    metadata = dict(gguf_read.read(tmp_path / "t.gguf").metadata)
    again = from_gguf(metadata)
    same(start, again)
    assert again is not None
    gguf_write.write(tmp_path / "u.gguf", {"general.architecture": "llama", **again.gguf_metadata()}, [])
    assert {k: v if isinstance(v, str | int | bool) else list(v) for k, v in metadata.items()} == {
        k: v if isinstance(v, str | int | bool) else list(v)
        for k, v in dict(gguf_read.read(tmp_path / "u.gguf").metadata).items()
    }


@pytest.mark.tier2
def test_llama_cpp_reads_our_export_as_we_do() -> None:
    """tests/oracles/tokens.py gave these vocabularies to llama.cpp as GGUF and recorded its ids."""
    oracle = json.loads((HERE / "oracle_tokens.json").read_text())["llama.cpp"]
    text = oracle["training text"]
    for name, tokenizer in (("bpe", train_bpe([text], 400)), ("characters", from_characters(text))):
        assert len(oracle[name]) >= 40
        for sample, ids in oracle[name]:
            assert tokenizer.encode(sample) == ids, (name, sample)


@pytest.mark.parametrize("name", ["phi-3", "gpt-2", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_real_vocabularies_survive_a_directory(shared_data: Path, tmp_path: Path, name: str) -> None:
    metadata = dict(gguf_read.read(shared_data / f"tokenizers/ggml-vocab-{name}.gguf").metadata)
    first = from_gguf(metadata)
    assert first is not None
    first.save(tmp_path)
    loaded = from_directory(tmp_path)
    same(first, loaded)
    assert loaded is not None
    same(loaded, from_gguf({"general.architecture": metadata["general.architecture"], **loaded.gguf_metadata()}))
    assert first.gguf_metadata().keys() >= {k for k in metadata if k.startswith("tokenizer.")}
    assert first.gguf_metadata()["tokenizer.ggml.tokens"] == list(metadata["tokenizer.ggml.tokens"])


@pytest.mark.tier1
def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert from_directory(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(TokenizerError, match=r"only tokenizer\.json is read"):
        from_directory(tmp_path)


def directory(path: Path, **files: Any) -> Path:
    """The BPE tokenizer saved to `path`, then `files` (name without .json -> content) written over it."""
    MADE["bpe"].save(path)
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (path / f"{name}.json").write_text(text)
    return path


@pytest.mark.tier1
def test_files_beside_the_tokenizer(tmp_path: Path) -> None:
    config = {
        "eos_token": {"content": "</s>", "lstrip": False},
        "add_bos_token": False,
        "chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}],
    }
    root = directory(
        tmp_path,
        tokenizer_config=config,
        special_tokens_map={"bos_token": "<s>", "pad_token": "<unk>"},
        generation_config={"eos_token_id": [2, 1]},
    )
    tokenizer = from_directory(root)
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (2, 1), 0)
    assert not tokenizer.add_bos
    assert tokenizer.chat_template == "d"
    (root / "chat_template.jinja").write_text("j")
    assert from_directory(root).chat_template == "j"  # type: ignore[union-attr]


@pytest.mark.tier1
def test_the_engines_own_framing_counts_where_the_config_is_silent(tmp_path: Path) -> None:
    root = directory(tmp_path, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer = from_directory(root)
    assert tokenizer is not None
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, False)
    assert tokenizer.encode("the") == MADE["bpe"].encode("the")


@pytest.mark.tier1
@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer": "{"}, r"tokenizer\.json: "),
        ({"tokenizer": "{}"}, r"tokenizer\.json: "),
        ({"tokenizer": '"\\ud800'}, r"tokenizer\.json: "),
        ({"tokenizer_config": "["}, r"tokenizer_config\.json: no JSON"),
        ({"tokenizer_config": "[" * 100_000}, r"tokenizer_config\.json: no JSON"),
        ({"tokenizer_config": []}, r"tokenizer_config\.json: must be a JSON object, is list"),
        ({"tokenizer_config": {"bos_token": "<nope>"}}, r"bos_token is '<nope>', which tokenizer\.json lacks"),
        ({"tokenizer_config": {"eos_token": 3}}, "eos_token is 3"),
        ({"tokenizer_config": {"add_bos_token": "yes"}}, "add_bos_token must be true or false"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_template must be text, is int"),
        ({"generation_config": "7"}, r"generation_config\.json: must be a JSON object"),
    ],
)
def test_faults_name_the_file(tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    with pytest.raises(TokenizerError, match=reason):
        from_directory(directory(tmp_path, **files))


@pytest.mark.tier1
def test_decoders_and_splits_that_are_not_served(tmp_path: Path) -> None:
    description = json.loads(MADE["bpe"].engine.to_str())
    root = directory(
        tmp_path, tokenizer={**description, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    )
    with pytest.raises(TokenizerError, match="decoder WordPiece is not served"):
        from_directory(root)
    whitespace = {**description, "pre_tokenizer": {"type": "Whitespace"}}
    odd = from_directory(directory(tmp_path, tokenizer=whitespace))
    assert odd is not None
    with pytest.raises(TokenizerError, match="has no name in GGUF"):
        odd.gguf_metadata()


@pytest.mark.tier1
def test_what_the_engine_would_panic_on(tmp_path: Path) -> None:
    description = json.loads(MADE["bpe"].engine.to_str())
    prefixed = {**description, "model": {**description["model"], "continuing_subword_prefix": "##"}}
    with pytest.raises(TokenizerError, match="continuing_subword_prefix is not served"):
        from_directory(directory(tmp_path, tokenizer=prefixed))
    template = description["post_processor"]
    for broken in (
        {**template, "special_tokens": {}},
        {"type": "Sequence", "processors": [{**template, "special_tokens": {}}]},
    ):
        with pytest.raises(TokenizerError, match="post_processor: special_tokens lacks 'BOS'"):
            from_directory(directory(tmp_path, tokenizer={**description, "post_processor": broken}))


@pytest.mark.tier1
def test_merges_that_scores_cannot_say(tmp_path: Path) -> None:
    description = json.loads(MADE["spm"].engine.to_str())
    description["model"]["merges"] = description["model"]["merges"][1:]
    MADE["spm"].save(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = from_directory(tmp_path)
    assert tokenizer is not None
    with pytest.raises(TokenizerError, match="no merge joins"):
        tokenizer.gguf_metadata()


@pytest.mark.tier1
@given(st.text(alphabet="abcé \n日", max_size=30))
def test_scores_from_merges_join_alike(text: str) -> None:
    spm = MADE["spm"]
    bare = Tokenizer(spm.engine, bos_id=1, eos_ids=(2,), unk_id=0, add_bos=True)
    global EXPORTED
    EXPORTED = EXPORTED or from_gguf(bare.gguf_metadata())
    assert EXPORTED is not None
    assert EXPORTED.encode(text) == spm.encode(text)


EXPORTED: Tokenizer | None = None


@pytest.mark.parametrize("kind", ["trained", "characters", "read"])
def test_an_embedding_of_more_rows_has_a_token_for_each(kind: str) -> None:
    """llama.cpp counts its rows by the tokens; Qwen2.5's matrices have 271 more than its tokenizer."""
    start = {"trained": lambda: train_bpe(["so so"], 262), "characters": lambda: from_characters("so far")}
    first = start.get(kind, start["characters"])()
    if kind == "read":
        first = from_gguf({"general.architecture": "llama", **first.gguf_metadata()})
    assert first is not None
    size = first.vocab_size + 9
    metadata = first.gguf_metadata(size)
    assert {len(metadata[f"tokenizer.ggml.{name}"]) for name in ("tokens", "token_type")} == {size}
    wide = from_gguf({"general.architecture": "llama", **metadata})
    assert wide is not None
    assert wide.vocab_size == size
    assert wide.encode("so far") == first.encode("so far")
    with pytest.raises(TokenizerError, match="rows"):
        first.gguf_metadata(first.vocab_size - 1)
