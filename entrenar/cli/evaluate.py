"""``entrenar eval``: negative log-likelihood and perplexity of a text or of samples under a model."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Literal

from entrenar.cli.model import ModelSettings, tokenizer_of
from entrenar.cli.output import print_json
from entrenar.cli.settings import option, required
from entrenar.data import batches, build, read
from entrenar.train.evaluate import evaluate


@dataclass(frozen=True, kw_only=True)
class Command(ModelSettings):
    """Measure how well a model predicts data: nll (nats a token), perplexity and the number of tokens."""

    data: tuple[str, ...] = required("files (plain text, JSONL) or a directory with the split")
    split: Literal["train", "valid", "test"] = option("valid", "which file of a directory")
    seq_len: int = option(512, "longest sequence in tokens; plain text is cut into windows of it")
    batch_size: int = option(8, "sequences at a time")
    mask_prompt: bool = option(False, "count completions only, not prompts")
    json: bool = option(False, "print one JSON object")

    def run(self) -> int:
        source = read(self.data, self.split)
        model = self.load()
        dataset = build(source, tokenizer_of(model, self.model), self.seq_len, mask_prompt=self.mask_prompt)
        start = time.perf_counter()
        result = evaluate(model, batches(dataset, self.batch_size))
        seconds = time.perf_counter() - start
        if self.json:
            print_json({**asdict(result), "truncated": dataset.truncated, "seconds": round(seconds, 3)})
        else:
            print(f"nll {result.nll:.4f} nats a token, perplexity {result.perplexity:.2f}, {result.tokens:,} tokens")
            if dataset.truncated:
                print(f"{dataset.truncated:,} samples were cut at {self.seq_len} tokens; --seq-len raises that")
        return 0
