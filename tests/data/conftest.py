from __future__ import annotations

from pathlib import Path

import pytest
import spm_vocabulary

from entrenar.tokenizer import from_gguf


@pytest.fixture
def spm_directory(tmp_path: Path) -> Path:
    """A directory with a SentencePiece-style tokenizer.json."""
    tokenizer = from_gguf(spm_vocabulary.metadata())
    assert tokenizer is not None
    tokenizer.save(tmp_path / "spm")
    return tmp_path / "spm"
