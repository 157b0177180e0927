"""``entrenar train``: a model from random weights, on your own text."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from entrenar.cli.run import RunSettings
from entrenar.cli.settings import option
from entrenar.cli.tokenize import load_tokenizer
from entrenar.data.records import Record
from entrenar.errors import ConfigError
from entrenar.models.causal_lm import CausalLM
from entrenar.models.spec import ModelConfig
from entrenar.tokenizer import Tokenizer, from_characters, train_bpe
from entrenar.train.data import sources

BPE_SIZE = 4096  # entries of a vocabulary that is trained on the data, where nothing says otherwise


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model's shape, under Hugging Face's names; what is None comes from the preset."""

    preset: str | None = option(None, "a known shape, such as llama-124m or qwen2.5-0.5b")
    vocab_size: int | None = option(None, "entries of the embedding; by default what the tokenizer has")
    hidden_size: int | None = option(None, "width of the residual stream")
    intermediate_size: int | None = option(None, "width inside an MLP; by default 8/3 of hidden_size")
    num_hidden_layers: int | None = option(None, "layers")
    num_attention_heads: int | None = option(None, "query heads")
    num_key_value_heads: int | None = option(None, "key and value heads; by default as many as query heads")
    head_dim: int | None = option(None, "elements a head; by default hidden_size / heads")
    max_position_embeddings: int | None = option(None, "longest text; by default seq_len, or the preset's")
    rope_theta: float | None = option(None, "base of the rotary frequencies")
    initializer_range: float | None = option(None, "standard deviation of the random weights")
    rms_norm_eps: float | None = option(None, "added under the root of RMSNorm")
    tie_word_embeddings: bool | None = option(None, "the head is the embedding")
    sliding_window: int | None = option(None, "attention looks back this far; by default to the beginning")

    def model_config(self, tokenizer: Tokenizer, seq_len: int) -> ModelConfig:
        """The config for this tokenizer.

        Raises:
            ConfigError: a needed size is missing, or the vocabulary is smaller than the tokenizer's.
        """
        given = {f.name: getattr(self, f.name) for f in fields(Shape) if f.name != "preset"}
        values = {name: value for name, value in given.items() if value is not None}
        values.setdefault("vocab_size", tokenizer.vocab_size)
        if values["vocab_size"] < tokenizer.vocab_size:
            reason = f"{values['vocab_size']} is below the tokenizer's {tokenizer.vocab_size}"
            raise ConfigError("vocab_size", reason)
        values |= {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_ids or None,
            "pad_token_id": tokenizer.pad_id,
        }
        if self.preset is not None:
            return ModelConfig.preset(self.preset).replace(**values)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            if name not in values:
                raise ConfigError(name, "is needed where no --preset is given")
        values.setdefault("intermediate_size", -(-8 * values["hidden_size"] // 3 // 32) * 32)
        values.setdefault("max_position_embeddings", seq_len)
        return ModelConfig(**values)


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
        config = self.model_config(tokenizer, self.seq_len)
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


def texts_of(record: Record) -> list[str]:
    """All text of a record, for a vocabulary to be made of."""
    return [record.prompt or "", record.text, *(message["content"] for message in record.messages)]
