"""New vocabularies, for a model trained from nothing."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import pre_tokenizers, trainers

from entrenar.errors import ConfigError, TokenizerError
from entrenar.tokenizer import bytelevel, sentencepiece
from entrenar.tokenizer.pieces import SPACE
from entrenar.tokenizer.tokenizer import Tokenizer, framed

SPECIALS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as in Llama
PRE = "qwen2"  # digits stand alone, which small models count better with


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with `vocab_size` ids, or fewer where the texts have no more pairs to join.

    The same texts give the same vocabulary, whatever the number of threads. Raises ConfigError for a size
    that can't hold the 256 bytes and the special tokens.
    """
    least = 256 + len(SPECIALS)
    if not least <= vocab_size <= 1 << 24:
        raise ConfigError("vocab_size", f"is {vocab_size}; byte-level BPE takes {least} to {1 << 24}")
    engine = bytelevel.engine({}, [], bytelevel.PRE[PRE])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    return framed(engine, unk_id=0, bos_id=1, eos_ids=[2], add_bos=True)


def from_characters(text: str) -> Tokenizer:
    """One id for each character of `text`, in code point order after the special tokens.

    A character that `text` lacks becomes ``<unk>``. A space and U+2581, which stands for it, are the same.
    """
    characters = sorted(set(text.replace(" ", SPACE)))
    if not characters:
        raise TokenizerError("a character vocabulary needs text, this one is empty")
    vocab = {token: i for i, token in enumerate([*SPECIALS, *characters])}
    engine = sentencepiece.engine(vocab, [], SPECIALS[0], add_space_prefix=False)
    engine.add_special_tokens(list(SPECIALS))
    return framed(engine, unk_id=0, bos_id=1, eos_ids=[2], add_bos=True)
