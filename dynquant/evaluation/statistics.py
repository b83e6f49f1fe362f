"""Intervals and tests for evaluation: token-block bootstrap, Wilson interval, McNemar's exact test.

Neighbouring tokens are correlated, so means over tokens are resampled in blocks of consecutive tokens; two models on
the same questions are compared pair by pair. Multiple-testing corrections are left to the reader.
"""

from collections.abc import Callable, Sequence
from math import sqrt

import numpy as np

from dynquant.storage.documents import FrozenRecord

BLOCK_TOKENS = 64
NUM_RESAMPLES = 2000
_PICKS_AT_ONCE = 1 << 22  # a long text has more blocks than memory for all resamples
_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def shown_kl(nats: float) -> str:
    """Return a KL with four decimals, or with two digits where those would show fewer: `0.0926`, `3.2e-05`."""
    return f"{nats:.2g}" if abs(nats) <= 0.00095 else f"{nats:.4f}"


class Estimate(FrozenRecord):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def shown(self, form: str | Callable[[float], str]) -> str:
        """Return the value with its interval, all in a format as `.4f`, or as a function shows them."""
        value, low, high = (
            f"{each:{form}}" if isinstance(form, str) else form(each) for each in (self.value, self.low, self.high)
        )
        return f"{value} [{low}, {high}]"


def block_sums(values: np.ndarray, window_lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and sizes of blocks of up to BLOCK_TOKENS consecutive values that never cross a window's end."""
    starts, position = [], 0
    for length in window_lengths:
        starts += range(position, position + length, BLOCK_TOKENS)
        position += length
    if position != len(values):
        raise ValueError(f"`window_lengths` add up to {position}, but there are {len(values)} values")
    return np.add.reduceat(values.astype(np.float64), starts), np.diff([*starts, position])


def bootstrap_mean(values: np.ndarray, window_lengths: list[int]) -> Estimate:
    """Mean of per-token values with a 95 % percentile interval from resampled blocks of consecutive tokens."""
    return bootstrap_ratio(*block_sums(values, window_lengths))


def bootstrap_ratio(sums: np.ndarray, base_sums: np.ndarray) -> Estimate:
    """Ratio of two models' means on the same blocks, with a 95 % interval from blocks drawn for both together."""
    generator, ratios = np.random.default_rng(0), []
    at_once = max(1, _PICKS_AT_ONCE // len(sums))
    for start in range(0, NUM_RESAMPLES, at_once):
        shape = min(at_once, NUM_RESAMPLES - start), len(sums)
        picks = generator.integers(0, len(sums), size=shape)  # blocks, with replacement
        ratios.append(sums[picks].sum(axis=1) / base_sums[picks].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return Estimate(value=float(sums.sum() / base_sums.sum()), low=float(low), high=float(high))


def wilson_interval(successes: int, total: int) -> Estimate:
    """A proportion with Wilson's 95 % score interval, which stays inside [0, 1]."""
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"`successes` must be between 0 and `total` >= 1, got {successes} of {total}")
    p = successes / total
    scale = 1 + _Z95**2 / total
    center = (p + _Z95**2 / (2 * total)) / scale
    half = _Z95 / scale * sqrt(p * (1 - p) / total + _Z95**2 / (4 * total**2))
    return Estimate(value=p, low=min(p, max(0.0, center - half)), high=max(p, min(1.0, center + half)))


def only_one(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    """Count the questions that only the first, and only the second, of two paired classifiers answers correctly."""
    pairs = list(zip(first, second, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two paired classifiers are equally accurate.

    `only_first` and `only_second` count the questions that exactly one of them answers correctly; under the null
    hypothesis each is Binomial(sum, 1/2).
    """
    discordant = only_first + only_second
    term = tail = 1
    for i in range(min(only_first, only_second)):
        term = term * (discordant - i) // (i + 1)  # the next binomial coefficient, exact in integers
        tail += term
    return min(1.0, 2 * tail / 2**discordant)


def compare_paired(reference: Sequence[bool], candidate: Sequence[bool]) -> dict[str, float]:
    """Return where one model's answer alone is right, and McNemar's p, as reports name them."""
    lost, won = only_one(reference, candidate)
    return {"only_reference_right": lost, "only_candidate_right": won, "mcnemar_p": mcnemar_exact(lost, won)}
