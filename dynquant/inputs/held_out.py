"""Text kept apart from training: whole documents where there are several, and no passage that training repeats."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dynquant.errors import DataError
from dynquant.inputs.text import CalibrationText

RUN_TOKENS = 32
"""Consecutive tokens that training and held-out text must not share; common phrases are shorter."""
_AT_ONCE = 1024


def split_documents(text: CalibrationText, share: float) -> tuple[CalibrationText, CalibrationText]:
    """Training and held-out documents: the last ones, up to `share` of the characters; a document alone is cut.

    Raises:
        DataError: one document without a line break to cut it at.
    """
    total = sum(map(len, text.documents))
    if len(text.documents) > 1:
        count, size = 1, len(text.documents[-1])
        while count + 1 < len(text.documents) and size + len(text.documents[-count - 1]) <= share * total:
            count += 1
            size += len(text.documents[-count])
        return replace(text, documents=text.documents[:-count]), replace(text, documents=text.documents[-count:])
    (document,) = text.documents
    cut = document.rfind("\n", 0, round((1 - share) * total))
    if cut <= 0 or not document[cut:].strip():
        raise DataError(
            f"{text.name} is one document without a line break, so no part can be held out. Give more documents, one a "
            "line of a .jsonl file."
        )
    return replace(text, documents=(document[:cut],)), replace(text, documents=(document[cut:],))


def without_repeats(windows: Tensor, held_out: Iterable[Tensor]) -> Tensor:
    """The training windows [n, T] that share no run of `RUN_TOKENS` tokens with held-out sequences [*]."""
    seen = [runs_of(tokens.numpy()) for tokens in held_out]
    hashes = np.unique(np.concatenate(seen)) if seen else np.empty(0, np.int64)
    repeats = [np.isin(runs_of(part.numpy()), hashes).any(axis=-1) for part in windows.split(_AT_ONCE)]
    return windows[~torch.from_numpy(np.concatenate([np.empty(0, bool), *repeats]))]


def runs_of(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit hash of every run of consecutive tokens [..., T]: [..., T - RUN_TOKENS + 1]."""
    count = max(0, tokens.shape[-1] - RUN_TOKENS + 1)
    hashes = np.zeros((*tokens.shape[:-1], count), np.int64)
    with np.errstate(over="ignore"):
        for place, factor in enumerate(np.random.default_rng(0).integers(-(2**62), 2**62, RUN_TOKENS) | 1):
            hashes += tokens[..., place : place + count] * factor
    return hashes
