"""Two models that write on from the same prompts, greedily: where they part, whether they repeat themselves, how much
they write.

KL looks one token ahead of the original's own text. Here every model goes on from what it wrote itself, so that small
errors add up, as they do in an answer. Where two tokens are about equally likely, programs that round differently part
without any quantization: an unquantized file says how much of a figure that is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynquant.errors import EvaluationError
from dynquant.evaluation.statistics import Estimate, bootstrap_mean, compare_paired, wilson_interval
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.inputs.questions import take_evenly
from dynquant.inputs.text import TextEncoder, evaluation_windows
from dynquant.inputs.written import is_loop
from dynquant.storage.documents import FrozenRecord

PROMPT_TOKENS = 64
_NOTHING = -1  # fills rows of continuations behind their end


class Prompts(NamedTuple):
    """Starts of pieces of a text, each of `PROMPT_TOKENS` tokens."""

    name: str
    sha256: str
    tokens: list[list[int]]


class Continuations(NamedTuple):
    """Token ids that a model writes after each prompt, with the one that ends a text if it came to that."""

    tokens: list[list[int]]
    stop: frozenset[int]
    """Tokens that end a text."""

    @property
    def ends(self) -> list[bool]:
        """For each, whether the model found an end."""
        return [bool(ids) and ids[-1] in self.stop for ids in self.tokens]

    def tensors(self) -> dict[str, Tensor]:
        """Return int64 `continuations` [prompts, longest], filled with -1, and `stop`."""
        rows = [torch.tensor(ids, dtype=torch.int64) for ids in self.tokens]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_NOTHING)
        return {"continuations": padded, "stop": torch.tensor(sorted(self.stop), dtype=torch.int64)}

    @classmethod
    def from_tensors(cls, continuations: Tensor, stop: Tensor) -> "Continuations":
        """Return what `tensors` made tensors of."""
        rows = [row[row != _NOTHING].tolist() for row in continuations]
        return cls(rows, frozenset(stop.tolist()))


class Writing(FrozenRecord):
    """One model's continuations."""

    loops: Estimate
    """Share that ends in a block which repeats."""
    ends: Estimate
    """Share that ends before the limit."""
    length: Estimate
    """Mean tokens, at most the limit."""


class GenerationResult(FrozenRecord):
    """Greedy continuations of both models after the same prompts.

    `shared_tokens` is how many tokens they have in common before they part, at most `new_tokens`; `quartiles` are those
    of it. `mcnemar_p` is of loops, two-sided and exact.
    """

    name: str
    sha256: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    shared_tokens: Estimate
    quartiles: tuple[float, float, float]
    never_part: Estimate
    reference: Writing
    candidate: Writing
    only_reference_loops: int
    only_candidate_loops: int
    mcnemar_p: float


def read_prompts(path: Path, encode: TextEncoder, *, count: int, max_tokens: int) -> Prompts:
    """Return the starts of at most `count` pieces of a text, spread evenly over its first `max_tokens` tokens.

    Raises:
        EvaluationError: the text cannot be read, or is shorter than one prompt.
    """
    text: ModelInputs = evaluation_windows(
        path, encode, window=PROMPT_TOKENS, max_tokens=max(max_tokens, PROMPT_TOKENS)
    )
    starts = [batch.ids[0].tolist() for batch in text]
    whole = [ids for ids in starts if len(ids) == PROMPT_TOKENS]
    if not whole:
        raise EvaluationError(
            f"{text.name} is shorter than one prompt of {PROMPT_TOKENS} tokens. Give more text, or --tasks without "
            "generate."
        )
    return Prompts(text.name, text.sha256, take_evenly(whole, count))


def check_fits(new_tokens: int, context_length: int) -> None:
    """Raise EvaluationError where a model's context is too short for a prompt and what is written after it."""
    if PROMPT_TOKENS + new_tokens > context_length:
        raise EvaluationError(
            f"{new_tokens:,} tokens after prompts of {PROMPT_TOKENS} do not fit the context of {context_length:,}; "
            f"give --new-tokens {context_length - PROMPT_TOKENS} or less."
        )


def summarize_generation(
    prompts: Prompts, before: Continuations, after: Continuations, new_tokens: int
) -> GenerationResult:
    """Compare what two models wrote after the same prompts."""
    shared = [
        new_tokens if first == second else _num_shared(first, second)
        for first, second in zip(before.tokens, after.tokens, strict=True)
    ]
    loops = [[is_loop(ids) for ids in side.tokens] for side in (before, after)]
    paired = compare_paired(*loops)
    low, middle, high = np.quantile(shared, (0.25, 0.5, 0.75)).tolist()
    return GenerationResult(
        name=prompts.name,
        sha256=prompts.sha256,
        prompts=len(shared),
        prompt_tokens=len(prompts.tokens[0]),
        new_tokens=new_tokens,
        shared_tokens=_mean(shared),
        quartiles=(low, middle, high),
        never_part=wilson_interval(sum(a == b for a, b in zip(before.tokens, after.tokens, strict=True)), len(shared)),
        reference=_writing(before, loops[0]),
        candidate=_writing(after, loops[1]),
        only_reference_loops=int(paired["only_reference_right"]),
        only_candidate_loops=int(paired["only_candidate_right"]),
        mcnemar_p=paired["mcnemar_p"],
    )


def _writing(side: Continuations, loops: Sequence[bool]) -> Writing:
    count = len(side.tokens)
    return Writing(
        loops=wilson_interval(sum(loops), count),
        ends=wilson_interval(sum(side.ends), count),
        length=_mean([len(ids) for ids in side.tokens]),
    )


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _mean(values: Sequence[int]) -> Estimate:
    return bootstrap_mean(np.asarray(values, dtype=np.float64), [1] * len(values))
