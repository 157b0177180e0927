"""llama.cpp, by the wheel xllamacpp: the odds that it gives the next token after a prompt of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from support import need_oracle

from entrenar import CausalLM, no_grad


def their_logprobs(
    path: Path, prompts: Sequence[Sequence[int]], vocab: int = 512, adapter: Path | None = None
) -> NDArray[np.float64]:
    """Log-probabilities (prompts, vocab) of a GGUF file's next token, its cache in f32; skips without xllamacpp.

    The likeliest token must have text of its own: that of a byte in the middle of a character is held back.
    """
    x = need_oracle("xllamacpp")
    settings = x.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(path), 128, 1, False
    settings.cpuparams.n_threads = 1
    settings.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to f16
    settings.cache_type_k = settings.cache_type_v = x.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        lora = x.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        settings.lora_adapters = [lora]
    server = x.Server(settings)
    rows = np.full((len(prompts), vocab), np.nan)
    for row, prompt in zip(rows, prompts, strict=True):
        answer = server.handle_completions(
            {"prompt": list(prompt), "n_predict": 1, "n_probs": vocab, "temperature": 0.0, "ignore_eos": True}
        )
        (token,) = answer["choices"][0]["logprobs"]["content"]
        for entry in token["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
    return rows


def our_logprobs(model: CausalLM, prompts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """The same of a model here."""
    rows = []
    with no_grad():
        for prompt in prompts:
            x = model(list(prompt)).numpy()[0, -1].astype(np.float64)
            rows.append(x - x.max() - np.log(np.exp(x - x.max()).sum()))
    return np.array(rows)
