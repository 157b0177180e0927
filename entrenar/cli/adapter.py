"""The settings of an adapter, which ``finetune``, ``plan`` and ``bench step`` share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from entrenar.cli.settings import Meaning, option
from entrenar.errors import ConfigError
from entrenar.nn.lora import LoraConfig

# PEFT's names of the same settings, which `LoraConfig` has too
PEFT: Mapping[str, str] = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "target",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
AXOLOTL: Mapping[str, str] = {
    "lora_r": "rank",
    "lora_target_modules": "target",
    "peft_use_rslora": "rslora",
    "peft_use_dora": "dora",
    "lora_modules_to_save": "modules_to_save",
}


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """A low-rank adapter: how large, on which layers, and of which kind."""

    ALIASES: ClassVar[Mapping[str, str]] = {**PEFT, **AXOLOTL}
    MEANINGS: ClassVar[Mapping[str, Meaning]] = {
        "adapter": Meaning("quant", {"lora": None, "qlora": "nf4"}),
        "load_in_4bit": Meaning("quant", {"true": "nf4", "false": None}),
        "load_in_8bit": Meaning("quant", {"true": "q8_0", "false": None}),
        "lora_target_linear": Meaning(
            "target", {"true": "all-linear", "false": None}, "which layers get an adapter is said by target"
        ),
    }

    rank: int = option(16, "rank of the adapter, 1 to 512")
    alpha: float = option(32.0, "the adapter counts alpha / rank")
    dropout: float = option(0.0, "chance that an element of the adapter's input is dropped while training")
    target: tuple[str, ...] = option(("all-linear",), "which layers: all-linear, names, or one regular expression")
    rslora: bool = option(False, "the adapter counts alpha / √rank instead")
    dora: bool = option(False, "DoRA: the length of each row of a weight is trained apart from its direction")
    modules_to_save: tuple[str, ...] = option((), "modules trained and saved whole: embed_tokens, lm_head, norm …")

    def lora_config(self) -> LoraConfig:
        """
        Raises:
            ConfigError: a value is impossible; it names the flag.
        """
        try:
            return LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=targets(self.target),
                use_rslora=self.rslora,
                use_dora=self.dora,
                modules_to_save=self.modules_to_save or None,
            )
        except ConfigError as error:
            raise ConfigError(PEFT.get(error.field, error.field), error.reason) from None


def targets(words: tuple[str, ...]) -> str | tuple[str, ...]:
    """A single word that is no plain name is a pattern or "all-linear"; anything else is a list of names.

    Raises:
        ConfigError: several names in one word, which no path matches.
    """
    if len(words) == 1 and re.fullmatch(r"[\w.]+([,\s]+[\w.]+)+[,\s]*", words[0]):
        apart = " ".join(re.findall(r"[\w.]+", words[0]))
        reason = f"{words[0]!r} is one word and no list of names: --target {apart}; in a file a list"
        raise ConfigError("target", reason)
    return words[0] if len(words) == 1 and not re.fullmatch(r"[\w.]+", words[0]) else words
