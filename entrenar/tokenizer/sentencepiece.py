"""SentencePiece-style BPE (Llama 2, Phi-3): scores in place of merges, a visible space, bytes for the
unknown.

SentencePiece joins the neighbours whose union has the highest score, the leftmost of equals. The engine wants
an ordered list of pairs: `merges` lists every pair of pieces whose union is a piece, by the union's score.
(Two pieces with the very same score can't share a rank; the one with the lower id goes first.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers
from tokenizers.decoders import Decoder
from tokenizers.normalizers import Normalizer

from entrenar.tokenizer.pieces import BYTE_PIECES, SPACE

LONGEST_PIECE = 256  # characters; finding a piece's pairs takes time in the square of its length


def merges(vocab: Mapping[str, int], scores: Sequence[float], results: Collection[int]) -> list[tuple[str, str]]:
    """Pairs of pieces in the order in which they are joined; `results` are the ids that joining may yield."""
    tokens = list(vocab)
    order = sorted(results, key=lambda i: (-scores[i], i))
    return [pair for i in order for pair in splits(tokens[i], vocab)]


def splits(token: str, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make `token` of two pieces, in the order of their ids."""
    pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
    found = [(a, b) for a, b in pairs if a in vocab and b in vocab]
    return sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


def engine(
    vocab: Mapping[str, int], pairs: list[tuple[str, str]], unk: str | None, add_space_prefix: bool = True
) -> Engine:
    """The pipeline: a space in front (where asked), visible spaces, merges, bytes or `unk` for the rest."""
    has_bytes = all(piece in vocab for piece in BYTE_PIECES)
    built = Engine(models.BPE(dict(vocab), pairs, unk_token=unk, fuse_unk=False, byte_fallback=has_bytes))
    prefix: list[Normalizer] = [normalizers.Prepend(SPACE)] if add_space_prefix else []
    strip: list[Decoder] = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    built.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    built.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return built
