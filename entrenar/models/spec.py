"""What a model is: `ModelConfig` holds the values (named as Hugging Face names them), `ModelSpec` what they mean.

`ModelConfig` checks every value on its own and against the others, so that later code can multiply sizes without
looking. `arch/<model_type>.py` turns a config into a `ModelSpec`, the only thing that `build.py` reads.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from entrenar.errors import ConfigError

# field -> (smallest, largest) sensible value; the upper bounds keep every product of sizes below 2**63 bytes
LIMITS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "vocab_size": (1, 2**24),
        "hidden_size": (1, 2**18),
        "intermediate_size": (1, 2**20),
        "num_hidden_layers": (1, 2**12),
        "num_attention_heads": (1, 2**14),
        "num_key_value_heads": (1, 2**14),
        "head_dim": (2, 2**12),
        "max_position_embeddings": (1, 2**31 - 1),
    }
)


@dataclass(frozen=True)
class ModelConfig:
    """The values that define a model's shape and arithmetic, under Hugging Face's names.

    Args that are None take a value from the others: ``num_key_value_heads`` the number of heads, ``head_dim`` the
    hidden size divided by the heads. `from_dict` reads a ``config.json``, `preset` a known model.

    Raises:
        ConfigError: a value is impossible, on its own or beside another; the error names the field.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
        heads = self.num_attention_heads
        for name in LIMITS:
            if name not in ("num_key_value_heads", "head_dim"):
                _check_int(name, getattr(self, name))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ConfigError(
                    "num_attention_heads", f"{heads} heads do not divide hidden_size {self.hidden_size}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        _check_int("num_key_value_heads", self.num_key_value_heads)
        _check_int("head_dim", self.head_dim)
        assert self.num_key_value_heads is not None
        assert self.head_dim is not None
        if heads % self.num_key_value_heads:
            raise ConfigError(
                "num_key_value_heads",
                f"{self.num_key_value_heads} does not divide num_attention_heads {heads}",
            )
        if self.head_dim % 2:
            raise ConfigError("head_dim", f"{self.head_dim} is odd; rotary embeddings need an even head size")
        if self.hidden_act not in ("silu", "swish"):
            raise ConfigError("hidden_act", f"{self.hidden_act!r} is not served; the decoder computes SwiGLU (silu)")
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(name, f"{value!r} is not a positive number")
        if not 0 < self.partial_rotary_factor <= 1:
            raise ConfigError("partial_rotary_factor", f"{self.partial_rotary_factor!r} is not in (0, 1]")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError("sliding_window", f"{self.sliding_window} is not a positive number of tokens")
        spec_of(self)  # the architecture checks what only it knows, such as the kinds of RoPE scaling

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads (``num_key_value_heads`` once resolved)."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_size(self) -> int:
        """Elements a head (``head_dim`` once resolved)."""
        assert self.head_dim is not None
        return self.head_dim

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A known model's configuration by name; see `PRESETS`.

        Raises:
            ConfigError: no preset has this name; the error lists them.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError("preset", f"no preset {name!r}{hint} (known: {', '.join(PRESETS)})")
        return cls(**PRESETS[name])

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face parameter name -> shape of every weight, a tied head counted once."""
        from entrenar.models.build import parameter_shapes

        return parameter_shapes(spec_of(self))

    def num_parameters(self) -> int:
        """Exact number of weights, a tied head counted once. Arithmetic on Python integers cannot overflow."""
        layer = other = 0
        one_layer = self.replace(num_hidden_layers=1)
        for name, shape in one_layer.parameter_shapes().items():
            size = 1
            for dim in shape:
                size *= dim
            if name.startswith("model.layers."):
                layer += size
            else:
                other += size
        return layer * self.num_hidden_layers + other


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: rotated elements a head and their angular frequencies (rotary_dim/2,) in float64."""

    rotary_dim: int
    inv_freq: NDArray[np.float64]


@dataclass(frozen=True)
class ModelSpec:
    """What the architecture table makes of a config: sizes and strategies, with no model's name in it."""

    config: ModelConfig
    rope: RopeSpec
    fused_qkv: bool = False
    fused_gate_up: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    window: int = 0


def spec_of(config: ModelConfig) -> ModelSpec:
    """The spec of a config, by its ``model_type``.

    Raises:
        ConfigError: the architecture is not served, or can't take one of the values.
    """
    from entrenar.models.arch import architecture

    return architecture(config.model_type).spec(config)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


# annotation of a field -> what it takes
_TYPES: Mapping[str, tuple[Callable[[Any], bool], str]] = MappingProxyType(
    {
        "str": (lambda v: isinstance(v, str), "text"),
        "bool": (lambda v: isinstance(v, bool), "true or false"),
        "int": (_is_int, "a whole number"),
        "int | None": (lambda v: v is None or _is_int(v), "a whole number"),
        "int | tuple[int, ...] | None": (
            lambda v: v is None or _is_int(v) or (isinstance(v, tuple) and all(map(_is_int, v))),
            "a token id, or several",
        ),
        "float": (_is_number, "a finite number"),
        "Mapping[str, Any] | None": (lambda v: v is None or isinstance(v, Mapping), "a table of settings"),
    }
)


def _check_type(name: str, value: object, annotation: str) -> None:
    fits, words = _TYPES[annotation]
    if not fits(value):
        raise ConfigError(name, f"{value!r:.80} is not {words}")


def _check_int(name: str, value: int | None) -> None:
    low, high = LIMITS[name]
    assert value is not None
    if not low <= value <= high:
        raise ConfigError(name, f"{value:,} is outside {low:,} to {high:,}")


PRESETS: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "llama-124m": {
            "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 12,
            "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        },
        "llama2-7b": {"bos_token_id": 1, "eos_token_id": 2},
        "llama2-13b": {
            "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        "llama2-70b": {
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2,
        },
        "qwen2.5-0.5b": {
            "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768, "rope_theta": 1e6, "tie_word_embeddings": True,
            "bos_token_id": 151643, "eos_token_id": 151643,
        },
        "phi-3-mini": {
            "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
            "sliding_window": 2047, "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000,
        },
    }
)  # fmt: skip
