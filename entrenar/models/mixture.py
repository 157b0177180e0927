"""llama.cpp's mixtures: most matrices in one type, those whose errors cost most in a larger one.

Source: llama_tensor_get_type in llama-quant.cpp of llama.cpp (MIT).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from entrenar.errors import ConfigError
from entrenar.nn.lora import EMBEDDING, HEAD
from entrenar.quant.qtensor import ENCODED


class Mixture(NamedTuple):
    """Types of layers' matrices.

    Attributes:
        more: of v and down projections in an eighth of the layers at both ends and every third between them.
        fused: of q, k and v in one matrix. file_type: GGUF's general.file_type.
    """

    most: str
    more: str
    fused: str
    file_type: int


MIXTURES = {"q4_k_m": Mixture("q4_k", "q6_k", "q5_k", 15), "q5_k_m": Mixture("q5_k", "q6_k", "q6_k", 17)}
QUANTS = (*ENCODED, *MIXTURES)
_SENSITIVE = re.compile(r"model\.layers\.(\d+)\.(self_attn\.v_proj|mlp\.down_proj)\.weight")
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


def layer_type(quant: str, name: str, layers: int) -> str:
    """What `quant`, a type or a mixture, means for a layer's matrix of a model of so many layers.

    Raises:
        ConfigError: it is neither.
    """
    quant = quant_named(quant)
    mixture = MIXTURES.get(quant)
    if mixture is None:
        return quant
    if name.endswith("qkv_proj.weight"):
        return mixture.fused
    match = _SENSITIVE.fullmatch(name)
    return mixture.more if match and _takes_more(int(match[1]), layers) else mixture.most


def outer_type(quant: str, name: str, tied: bool) -> str:
    """The same for the embedding and the head of a GGUF file: more bits, as they suffer most. In a mixture an embedding
    that is not the head as well has the type of most matrices."""
    if quant in MIXTURES and name == OUTER[0] and not tied:
        return MIXTURES[quant].most
    return "q8_0" if quant == "q8_0" else "q6_k"


def _takes_more(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
