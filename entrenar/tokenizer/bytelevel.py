"""Byte-level BPE (GPT-2, Qwen2, Llama 3): how text is cut into words before merging, by the name GGUF gives
it.

The expressions are those that the models' makers published; llama.cpp names each by a `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Engine

from entrenar.errors import TokenizerError
from entrenar.tokenizer.pieces import steps


class Pre(NamedTuple):
    """One way to cut text: `splits` apply in turn; a word that the vocabulary holds may skip the merges."""

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# name -> cut; of several names for one cut the first is the one that is written
PRE: dict[str, Pre] = {
    "gpt-2": Pre((_GPT2,)),
    "qwen2": Pre((_CONTRACTIONS + _WORDS % "",)),
    "llama-bpe": Pre((_CONTRACTIONS + _WORDS % "{1,3}",), ignore_merges=True, add_bos=True),
    "tekken": Pre((_TEKKEN,), ignore_merges=True, add_bos=True),
    "smollm": Pre((r"\p{N}", _GPT2)),
    "dbrx": Pre((_CONTRACTIONS + _WORDS % "{1,3}",)),
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
_ALIASES = {
    "qwen2": ("deepseek-r1-qwen", "megrez", "stablelm2"),
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "gigachat", "trillion", "roberta-bpe"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral", "lfm2"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "dbrx": ("smaug-bpe",),
}
PRE |= {alias: PRE[name] for name, aliases in _ALIASES.items() for alias in aliases}


def engine(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]], pre: Pre, unk: str | None = None) -> Engine:
    """The pipeline: split, spell as bytes, merge."""
    built = Engine(models.BPE(vocab=dict(vocab), merges=list(merges), unk_token=unk, ignore_merges=pre.ignore_merges))
    split = [pre_tokenizers.Split(Regex(s), behavior="isolated") for s in pre.splits]
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    built.decoder = decoders.ByteLevel()
    return built


def pre_name(built: Engine, ignore_merges: bool) -> str:
    """The name GGUF gives to an engine's way of cutting text; TokenizerError where we know of none."""
    splits: list[str] = []
    for step in steps(built.pre_tokenizer):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            splits.append(step["pattern"].get("Regex", step["pattern"]))
        elif step["type"] == "Digits" and step["individual_digits"]:
            splits.append(r"\p{N}")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            splits += [_GPT2] * step["use_regex"]
        else:
            break
    else:
        for name, pre in PRE.items():
            if pre.splits == tuple(splits) and pre.ignore_merges == ignore_merges:
                return name
    raise TokenizerError(f"tokenizer.json: pre_tokenizer {steps(built.pre_tokenizer)} has no name in GGUF that we know")
