"""The architectures served: one small file each, found by Hugging Face's ``model_type`` or GGUF's architecture."""

from __future__ import annotations

from entrenar.errors import ConfigError
from entrenar.models.arch import llama, mistral, phi3, qwen2
from entrenar.models.arch.base import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    arch.model_type: arch for arch in (llama.ARCH, mistral.ARCH, qwen2.ARCH, phi3.ARCH)
}
# GGUF has one name for llama and mistral; the first architecture that uses a name reads it
GGUF_ARCHITECTURES: dict[str, Architecture] = {}
for _arch in ARCHITECTURES.values():
    GGUF_ARCHITECTURES.setdefault(_arch.gguf_name, _arch)


def architecture(model_type: str) -> Architecture:
    """The architecture of a Hugging Face ``model_type``.

    Raises:
        ConfigError: it is not served; the error lists those that are.
    """
    if model_type not in ARCHITECTURES:
        raise ConfigError("model_type", f"{model_type!r} is not served (served: {', '.join(ARCHITECTURES)})")
    return ARCHITECTURES[model_type]
