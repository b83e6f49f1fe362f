"""Pieces and scores of SentencePiece BPE tokenizers, from tokenizer.model or from tokenizer.json alone.

llama.cpp merges the pair of neighbours whose joined piece has the highest score. A tokenizer.json has no scores, but
its merges are in score order; a piece's score is then the negated rank of the first merge that makes it. That is exact
when every way to split a piece is a merge, as in all that transformers converts from SentencePiece; this is checked.
"""

import re
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import TokenType

from dynquant.errors import CheckpointError, unreadable
from dynquant.families.common.config import WAY_OUT

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

Piece = tuple[str | None, TokenType, float]
"""Text (None where an id has no token), type and score."""

SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNMERGED_SCORE = -1000000.0


def model_pieces(path: Path) -> list[Piece]:
    """Return all pieces of a tokenizer.model by id, or raise CheckpointError when it is damaged."""
    processor = _processor(path)
    tests = {
        TokenType.UNKNOWN: processor.IsUnknown,
        TokenType.CONTROL: processor.IsControl,
        TokenType.UNUSED: processor.IsUnused,
        TokenType.BYTE: processor.IsByte,
    }
    ids = range(processor.GetPieceSize())
    kinds = [next((kind for kind, test in tests.items() if test(i)), TokenType.NORMAL) for i in ids]
    try:
        pieces = [(processor.IdToPiece(i), kind, processor.GetScore(i)) for i, kind in zip(ids, kinds, strict=True)]
        if not all(isfinite(score) for _, _, score in pieces):
            raise ValueError("a score is no number")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}. Fetch it again.") from error
    return pieces


def model_prefixes_space(path: Path) -> bool:
    """Return whether a tokenizer.model puts a space before the text."""
    return "".join(_processor(path).EncodeAsPieces("a")).startswith(SPACE)


def model_special_ids(path: Path) -> dict[str, int]:
    """Return the ids that a tokenizer.model itself gives to BOS and EOS."""
    processor = _processor(path)
    return {kind: i for kind, i in (("bos", processor.bos_id()), ("eos", processor.eos_id())) if i >= 0}


def json_pieces(tokenizer: dict[str, object], path: Path) -> tuple[list[Piece], bool]:
    """Pieces by id, and whether a space is put before the text, from a tokenizer.json with byte fallback.

    Raises:
        CheckpointError: rules that llama.cpp's SentencePiece tokenizer does not have.
    """
    vocab: dict[str, int] = tokenizer["model"]["vocab"]  # type: ignore[index]
    scores = _scores_from_merges(tokenizer["model"].get("merges") or [], vocab, path)  # type: ignore[index,attr-defined]
    unknown = tokenizer["model"].get("unk_token")  # type: ignore[index,attr-defined]
    pieces: list[Piece] = [(None, TokenType.UNUSED, 0.0)] * (max(vocab.values()) + 1)
    for text, token_id in vocab.items():
        kind = TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        kind = TokenType.UNKNOWN if text == unknown else kind
        pieces[token_id] = (text, kind, scores.get(text, _UNMERGED_SCORE))
    return pieces, prefixes_space(tokenizer, path)


def _processor(path: Path) -> "SentencePieceProcessor":
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise CheckpointError(
            f"Reading {path} needs sentencepiece: pip install 'dynquant-toolchain[models]'."
        ) from error
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            unreadable(path, error) or f"{path} is not a SentencePiece model ({error}). Fetch it again."
        ) from error


def _scores_from_merges(merges: list, vocab: dict[str, int], path: Path) -> dict[str, float]:
    """Negated first rank of each piece's merges; pieces whose ranks interleave had equal scores and get them back."""
    ranks: dict[str, list[int]] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, []).append(rank)
    scores: dict[str, float] = {}
    start, end = 0, -1
    for text, numbers in ranks.items():
        num_splits = sum(text[:i] in vocab and text[i:] in vocab for i in range(1, len(text)))
        if num_splits != len(numbers):
            raise CheckpointError(
                f"{path}: {text!r} can be split into pieces in {num_splits} ways, but {len(numbers)} of them are "
                "merges. llama.cpp's SentencePiece tokenizer merges in all of them and would give other ids. Put "
                f"tokenizer.model beside it. {WAY_OUT}"
            )
        if numbers[0] > end:
            start = numbers[0]
        end = max(end, numbers[-1])
        scores[text] = -float(start)
    return scores


def prefixes_space(tokenizer: dict[str, object], path: Path) -> bool:
    """Read the normalizer and pre-tokenizer; only the replacement of spaces and a leading space are allowed."""
    prefixes = False
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend" and step.get("prepend") == SPACE:
            prefixes = True
        elif step.get("type") != "Replace" or step.get("pattern") != {"String": " "} or step.get("content") != SPACE:
            raise CheckpointError(f"{path} normalizes text in a way that llama.cpp does not: {step!r}. {WAY_OUT}")
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and not step.get("split", True):
            prefixes = prefixes or step.get("prepend_scheme") in ("first", "always")
        elif step.get("type") != "Split" or step.get("pattern") != {"String": " "}:
            raise CheckpointError(f"{path} splits text in a way that llama.cpp does not: {step!r}. {WAY_OUT}")
    return prefixes


def _steps(stage: object, key: str) -> list[dict[str, object]]:
    if not isinstance(stage, dict):
        return []
    return stage.get(key, []) if stage.get("type") == "Sequence" else [stage]
