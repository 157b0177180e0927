"""llama.cpp's mixtures: most matrices in one type, those whose errors cost most in a larger one.

Source: llama_tensor_get_type_impl in llama-quant.cpp of llama.cpp (MIT), where category_is_attn_v takes q, k and v in
one matrix for a v projection. Older releases do not: their Q4_K_M has all of those in q5_K, their Q5_K_M in q6_K.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from entrenar.errors import ConfigError
from entrenar.models.spec import ModelConfig
from entrenar.nn.lora import EMBEDDING, HEAD
from entrenar.quant.qtensor import ENCODED, fitting


class Mixture(NamedTuple):
    """Types of layers' matrices.

    Attributes:
        more: of v and down projections in an eighth of the layers at both ends and every third between them.
        shared: of v in the other layers of 70B models, where eight heads share it. file_type: GGUF's general.file_type.
    """

    most: str
    more: str
    shared: str
    file_type: int


MIXTURES = {"q4_k_m": Mixture("q4_k", "q6_k", "q5_k", 15), "q5_k_m": Mixture("q5_k", "q6_k", "q5_k", 17)}
QUANTS = (*ENCODED, *MIXTURES)
_SENSITIVE = re.compile(r"model\.layers\.(\d+)\.(self_attn\.(?:v|qkv)_proj|mlp\.down_proj)\.weight")
OUTER = (f"{EMBEDDING}.weight", f"{HEAD}.weight")


def quant_named(name: str) -> str:
    """A type or a mixture by its name in any case: llama.cpp writes Q4_K_M.

    Raises:
        ConfigError: there is none of this name.
    """
    lower = str(name).lower()
    if lower not in QUANTS:
        raise ConfigError("quant", f"{name!r} is not one of {', '.join(QUANTS)}")
    return lower


def layer_type(quant: str, name: str, config: ModelConfig) -> str:
    """What `quant`, a type or a mixture, means for a layer's matrix of such a model.

    Raises:
        ConfigError: it is neither.
    """
    quant = quant_named(quant)
    mixture, match = MIXTURES.get(quant), _SENSITIVE.fullmatch(name)
    if mixture is None:
        return quant
    if match is None:
        return mixture.most
    if _takes_more(int(match[1]), config.num_hidden_layers):
        return mixture.more
    return mixture.shared if match[2].startswith("self_attn") and _is_70b(config) else mixture.most


def outer_type(quant: str, name: str, tied: bool) -> str:
    """The same for the embedding and the head of a GGUF file: more bits, as they suffer most. In a mixture an embedding
    that is not the head as well has the type of most matrices."""
    if quant in MIXTURES and name == OUTER[0] and not tied:
        return MIXTURES[quant].most
    return "q8_0" if quant == "q8_0" else "q6_k"


def in_file(quant: str, name: str, width: int, config: ModelConfig) -> str:
    """What `quant` means for a matrix of a GGUF file with rows of `width`: a type that these fill, or "f16"."""
    if name in OUTER:
        return fitting(outer_type(quant, name, config.tie_word_embeddings), width)
    return fitting(layer_type(quant, name, config), width)


def file_type(types: Mapping[str, str], config: ModelConfig) -> int | None:
    """general.file_type of a mixture, where these, of all matrices by name, are its types."""
    shapes = config.parameter_shapes()
    for quant, mixture in MIXTURES.items():
        if all(kind == in_file(quant, name, shapes[name][-1], config) for name, kind in types.items()):
            return mixture.file_type
    return None


def _is_70b(config: ModelConfig) -> bool:
    """What llama.cpp takes for a model of 70 billion parameters: Llama 2 and 3, Qwen2 of 72B."""
    grouped = config.kv_heads != config.num_attention_heads
    return config.num_hidden_layers == 80 and (grouped or config.model_type == "qwen2")


def _takes_more(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
