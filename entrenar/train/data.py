"""What a run trains and evaluates on, made from files as the settings say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from entrenar.data import Dataset, Source, Windows, build, find, hold_out, read
from entrenar.errors import TokenizerError
from entrenar.tokenizer import Tokenizer
from entrenar.train.config import TrainConfig

AnyPath = str | PathLike[str]


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on and, where there are any, rows to evaluate on.

    Attributes:
        files: path -> SHA-256 of each file they came from, for the record of the run.
    """

    train: Dataset
    valid: Dataset | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 over the files' hashes, the number of rows, and the first, middle and last row: changes with the
        data, the tokenizer, the template and the masks."""
        count = len(self.train)
        digest = hashlib.sha256(" ".join([str(count), *sorted(self.files.values())]).encode())
        for row in (0, count // 2, count - 1):
            batch = self.train.batch([row])
            digest.update(batch.ids.tobytes() + batch.labels.tobytes())
        return digest.hexdigest()


def sources(paths: AnyPath | Iterable[AnyPath], valid_fraction: float) -> tuple[Source, Source | None]:
    """The records to train on and to evaluate on: a directory's valid file, or else the last `valid_fraction`."""
    train = read(paths)
    if isinstance(paths, str | PathLike) and Path(paths).is_dir() and find(paths, "valid") is not None:
        return train, read(paths, "valid")
    return hold_out(train, valid_fraction) if valid_fraction else (train, None)


def prepare(paths: AnyPath | Iterable[AnyPath], tokenizer: Tokenizer | None, config: TrainConfig) -> TrainingData:
    """Reads, splits, renders and packs. Evaluation rows are packed too, never cut at random.

    Raises:
        DataError: a file or a sample can't be used; the message names it. TokenizerError: there is no tokenizer.
    """
    if tokenizer is None:
        raise TokenizerError("the model has no tokenizer, so text can't be trained on; load one with it")
    train, valid = sources(paths, config.valid_fraction)
    how = {"mask_prompt": config.mask_prompt, "packing": config.packing}
    return TrainingData(
        build(train, tokenizer, config.seq_len, crops=config.random_crops, **how),
        None if valid is None else build(valid, tokenizer, config.seq_len, **how),
        train.hashes() | ({} if valid is None else valid.hashes()),
    )


def batches_per_epoch(data: Dataset, config: TrainConfig) -> int:
    """Micro-batches in a pass; for random crops as many as it takes to see as many tokens as there are."""
    rows = len(data)
    if config.random_crops and isinstance(data, Windows):
        rows = -(-len(data.ids) // config.seq_len)
    return -(-rows // config.batch_size)
