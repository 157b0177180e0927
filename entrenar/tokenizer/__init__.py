"""Tokenizers: from a GGUF file, from a Hugging Face directory, or trained on text."""

from entrenar.tokenizer.directory import from_directory
from entrenar.tokenizer.gguf import from_gguf
from entrenar.tokenizer.tokenizer import Stream, Tokenizer
from entrenar.tokenizer.train import from_characters, train_bpe

__all__ = ["Stream", "Tokenizer", "from_characters", "from_directory", "from_gguf", "train_bpe"]
