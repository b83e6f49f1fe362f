"""Record of a selection (selection.json): candidate plans with predicted and measured KL, and how the two agree.

`search` makes the plans, scores them and chooses.
"""

from math import exp, log
from pathlib import Path

import numpy as np

from dynquant.evaluation.statistics import Estimate
from dynquant.storage.documents import FrozenRecord, read_document


class Candidate(FrozenRecord):
    """One plan: what it was predicted to cost, and what it costs on the selection text."""

    label: str
    bytes: int
    predicted_kl: float | None = None  # sum of prices by the last method; None for types that were not priced
    predicted_kl_se: float | None = None
    kl: Estimate | None = None
    top1: Estimate | None = None
    types: dict[str, str]  # tensor -> stored type, of the tensors that have a choice

    @property
    def method(self) -> str:
        """The pricing that made it: its label up to the first comma."""
        return self.label.split(",")[0]


class Fit(FrozenRecord):
    """log KL = intercept + slope log(sum of prices) + noise of standard deviation `residual`."""

    intercept: float
    slope: float
    residual: float

    def predicted(self, total: float) -> tuple[float, float]:
        """KL in nats per token for a plan whose prices add up to `total`, and its standard error."""
        if total <= 0:  # only types without an error
            return 0.0, 0.0
        value = exp(self.intercept + self.slope * log(total))
        return value, value * self.residual

    @classmethod
    def of(cls, totals: np.ndarray, measured: np.ndarray, slope: float | None = None) -> "Fit":
        """Least squares in logarithms of positive numbers; the residual has the degrees of freedom of two fitted
        numbers, or of one where the slope is given."""
        x, y = np.log(totals), np.log(measured)
        free = len(x) - (2 if slope is None else 1)
        slope = float(np.polyfit(x, y, 1)[0]) if slope is None else slope
        intercept = float((y - slope * x).mean())
        residual = float(np.sqrt(((y - intercept - slope * x) ** 2).sum() / max(1, free)))
        return cls(intercept=intercept, slope=slope, residual=residual)


class Selection(FrozenRecord):
    """selection.json: every candidate with its score; `chosen` indexes the plan that was taken."""

    text: str
    num_tokens: int
    candidates: tuple[Candidate, ...]
    chosen: int
    checked: tuple[Candidate, ...] = ()  # plans drawn around the chosen one, to compare prediction and measurement
    rank_correlation: Estimate | None = None  # Spearman's between predicted and measured KL of `checked`
    fit: Fit | None = None
    """From what prices add up to to the KL that is measured: fitted on `checked`, or without them on `candidates`."""
    frontier: tuple[Candidate, ...] = ()  # the planner at several sizes (`planner…`), and fixed recipes

    @property
    def winner(self) -> Candidate:
        return self.candidates[self.chosen]

    @classmethod
    def load(cls, path: Path) -> "Selection | None":
        """Read selection.json; None when nothing was selected. Raises PlanError: the file is not a selection."""
        if not path.is_file():
            return None
        return read_document(path, cls, "a selection", "Plan again.")


def rank_correlation(pairs: np.ndarray, *, resamples: int = 2000) -> Estimate | None:
    """Return the rank correlation of predicted and measured KL, [plans, 2], with a 95 % bootstrap interval over plans;
    None where too few plans differ."""
    from scipy.stats import spearmanr

    def varies(plans: np.ndarray) -> bool:
        return all(len(np.unique(column)) > 2 for column in plans.T)

    picks = np.random.default_rng(0).integers(0, len(pairs), (resamples, len(pairs)))
    values = [spearmanr(*pairs[pick].T).statistic for pick in picks if varies(pairs[pick])]
    if not values:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return Estimate(value=float(spearmanr(*pairs.T).statistic), low=float(low), high=float(high))
