"""``entrenar train``: a model from random weights, on your own text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from entrenar.cli.run import RunSettings
from entrenar.cli.settings import option
from entrenar.cli.shape import Shape
from entrenar.cli.tokenize import load_tokenizer
from entrenar.data.records import Record
from entrenar.errors import ConfigError
from entrenar.models.causal_lm import CausalLM
from entrenar.models.spec import ModelConfig
from entrenar.tokenizer import Tokenizer, from_characters, train_bpe
from entrenar.train.data import sources

BPE_SIZE = 4096  # entries of a vocabulary that is trained on the data, where nothing says otherwise


@dataclass(frozen=True, kw_only=True)
class Command(RunSettings, Shape):
    """Train a model from random weights.

    Give a --preset or a shape (hidden_size, num_hidden_layers, num_attention_heads). The run's directory gets
    checkpoints, metrics.jsonl, a loss curve and, in model/, the model as a Hugging Face directory.
    """

    tokenizer: str | None = option(
        None, "char (the data's characters), a GGUF file or a directory; by default BPE is trained on the data"
    )
    dtype: Literal["auto", "f32", "mixed", "bf16"] = option(
        "auto", "f32: exact; mixed: weights f32, bf16 between layers; bf16: weights too; auto: what the CPU is best at"
    )
    valid_fraction: float = option(0.1, "share of the data held out where it has no valid file")

    def build(self) -> CausalLM:
        tokenizer = self.make_tokenizer()
        config = self.model_config(self.seq_len, vocabulary(self.vocab_size, tokenizer))
        model = CausalLM.from_config(config, seed=self.seed, dtype=self.dtype)
        model.tokenizer = tokenizer
        return model

    def make_tokenizer(self) -> Tokenizer:
        """A tokenizer that is given, or one made from the training split alone."""
        if self.tokenizer not in (None, "char"):
            return load_tokenizer(str(self.tokenizer))
        source, _ = sources(self.data_paths(), self.valid_fraction)
        texts = [text for record in source.records for text in texts_of(record)]
        if self.tokenizer == "char":
            return from_characters("".join(texts))
        preset = ModelConfig.preset(self.preset).vocab_size if self.preset else BPE_SIZE
        return train_bpe(texts, self.vocab_size or preset)

    def save(self, model: CausalLM, out: Path) -> Path:
        model.save(out / "model")
        return out / "model"


def vocabulary(size: int | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the tokenizer says of a model's config.

    Raises:
        ConfigError: `size` is below the tokenizer's.
    """
    if size is not None and size < tokenizer.vocab_size:
        raise ConfigError("vocab_size", f"{size} is below the tokenizer's {tokenizer.vocab_size}")
    return {
        "vocab_size": size or tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_ids or None,
        "pad_token_id": tokenizer.pad_id,
    }


def texts_of(record: Record) -> list[str]:
    """All text of a record, for a vocabulary to be made of."""
    return [record.prompt or "", record.text, *(message["content"] for message in record.messages)]
