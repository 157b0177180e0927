"""Mistral: Llama with a sliding attention window and no biases."""

from __future__ import annotations

from entrenar.models.arch import llama
from entrenar.models.arch.base import Architecture

ARCH = Architecture(
    model_type="mistral", gguf_name="llama", hf_class="MistralForCausalLM", spec=llama.split_spec, permuted=True
)
