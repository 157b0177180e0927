"""Fuzz adapter settings: a file's bytes or LoraConfig's keywords give settings that pick layers, or typed errors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import _common
import atheris

with atheris.instrument_imports(include=["entrenar"]):
    from entrenar.errors import AdapterError, ConfigError, FormatError
    from entrenar.models.peft_adapter import read_config
    from entrenar.nn.lora import MAX_RANK, LoraConfig

NAMES = ["r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "use_rslora",
         "rank_pattern", "alpha_pattern"]  # fmt: skip
WORDS = ["all-linear", "q_proj", "layers.0.mlp.up_proj", ".*", "(", "|", ")*", "[^.]", "_proj$", "+", "?", "{2}"]
PATHS = [f"model.layers.{i}.{end}" for i in (0, 11) for end in ("self_attn.q_proj", "mlp.up_proj")] + ["lm_head"]
FILE = os.memfd_create("adapter_config.json")


def value(data: atheris.FuzzedDataProvider, depth: int = 0) -> Any:
    some = range(data.ConsumeIntInRange(0, 4))
    kind = data.ConsumeIntInRange(0, 6 if depth < 2 else 4)
    if kind == 6:
        return [value(data, depth + 1) for _ in some]
    if kind == 5:
        return {data.PickValueInList(WORDS): value(data, depth + 1) for _ in some}
    return (data.PickValueInList([None, True, 0, 1, 0.5, 16, 512, 10**400]), data.ConsumeFloat(),
            data.ConsumeInt(len(some) * 4), data.ConsumeUnicode(8),
            "".join(data.PickValueInList(WORDS) for _ in some))[kind]  # fmt: skip


def one_input(raw: bytes) -> None:
    try:
        if raw[:1] in (b"{", b"["):
            os.ftruncate(FILE, 0)
            os.pwrite(FILE, raw, 0)
            config = read_config(Path(f"/proc/self/fd/{FILE}"))
        else:
            data = atheris.FuzzedDataProvider(raw)
            config = LoraConfig(**{data.PickValueInList(NAMES): value(data) for _ in range(4)})
    except (AdapterError, ConfigError, FormatError):
        return
    for path in PATHS:
        assert 1 <= config.rank_of(path) <= MAX_RANK
        assert 0 <= config.scale_of(path) < float("inf")
        if config.bounded:  # other patterns are tried by their authors alone
            config.selects(path)


if __name__ == "__main__":
    _common.run(one_input, _common.adapter_configs, _common.noise)
