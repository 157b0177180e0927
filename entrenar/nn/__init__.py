"""Layers of the decoder, and the adapters that extend them."""

from entrenar.nn.lora import LoraConfig

__all__ = ["LoraConfig"]
