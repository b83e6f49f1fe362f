"""Plans priced by running the model, and the choice among them by the KL on text that no price has seen.

Surrogate costs propose, held-out KL selects (PrismaQuant's rule): each method of pricing gives candidates at the same
budget, with and without floors; all are rendered from blocks that are encoded once, and scored on windows of the
calibration source behind those that calibration used, or on a text of the user's. `check` draws plans around the chosen
one and says how well predicted and measured KL agree.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dynquant.analysis.errors.table import ErrorTable, Price
from dynquant.analysis.sensitivity.fisher_probe import fisher_probe, probe_prices
from dynquant.analysis.sensitivity.unit_kl import prices_from, refine
from dynquant.encoding.store import EncodedStore
from dynquant.evaluation.rendered_model import RenderedModel, ScoredText
from dynquant.evaluation.statistics import bootstrap_mean
from dynquant.planning.options import CLOSED_FORM, FISHER, METHODS, UNIT_KL, SearchOptions
from dynquant.planning.selection import Candidate, Fit, Selection, rank_correlation
from dynquant.session import Progress


class Choose(Protocol):
    """Gives the stored type of every tensor for a table, at the budget, or at the size nearest to `file_bytes`."""

    def __call__(self, table: ErrorTable, *, floors: bool = True, file_bytes: int | None = None) -> dict[str, str]: ...


@dataclass(frozen=True)
class PlanSearch:
    """A model that can be rendered, its texts, and how to choose types and count bytes at the budget.

    Args:
        probe_windows: token ids [probes, window] for the Fisher probe.
        unit_windows: token ids [n, window] for unit KL.
        selection_windows: token ids [n, window] disjoint from all others; `selection_text` names them.
        file_bytes: bytes of the whole file for the types of the tensors that have a choice.
        num_weights: of the whole model.
        recipes: label -> stored types of fixed recipes, to measure beside the planner's frontier.
    """

    hf_model: torch.nn.Module
    store: EncodedStore
    options: SearchOptions
    choose: Choose
    file_bytes: Callable[[Mapping[str, str]], int]
    probe_windows: torch.Tensor
    unit_windows: torch.Tensor
    selection_windows: torch.Tensor
    selection_text: str
    num_weights: int
    recipes: Mapping[str, Mapping[str, str]]
    seed: int = 0
    progress: Progress | None = None

    def run(self, table: ErrorTable) -> tuple[ErrorTable, Selection]:
        """The table with all prices that were asked for, priced by the winner's, and the selection.

        Raises:
            CheckpointError: the original's weights cannot be followed into the running model.
            StatsError: the model's decoder layers cannot be found.
        """
        if FISHER in self.options.methods and not table.is_priced_by(FISHER):
            costs = fisher_probe(
                self.hf_model, self.store, table, self.probe_windows, seed=self.seed, progress=self.progress
            )
            table = table.with_prices(FISHER, probe_prices(table, costs))
        base = table.priced(FISHER if table.is_priced_by(FISHER) else CLOSED_FORM)
        rendered = RenderedModel(self.hf_model, self.store)
        selection_text = ScoredText(rendered, self.selection_windows)
        unit_text = ScoredText(rendered, self.unit_windows) if UNIT_KL in self.options.methods else None
        found = [
            self._candidate(priced, floors, table.priced(priced))
            for priced in (CLOSED_FORM, FISHER)
            if priced == CLOSED_FORM or table.is_priced_by(priced)
            for floors in (True, False)
        ]
        if unit_text is not None:
            points = refine(rendered, unit_text, base, self.choose, rounds=self.options.rounds, progress=self.progress)
            last = next(point for point in reversed(points) if point.steps)
            table = table.with_prices(UNIT_KL, prices_from(base, last))
            found += [
                self._priced(f"{UNIT_KL}, round {number}", point.types, table.priced(UNIT_KL))
                for number, point in enumerate(points[1:], start=1)
            ]
        found = list({tuple(sorted(one.types.items())): one for one in reversed(found)}.values())[::-1]
        scored = self._scored(rendered, selection_text, found, "selecting by KL") if self.options.select else found
        chosen = self._best(scored)
        table = table.priced(scored[chosen].method)
        checked = self._scored(rendered, selection_text, self._drawn(base), "checking predictions")
        pairs = np.array([(one.predicted_kl, one.kl.value) for one in checked if one.kl])
        return table, Selection(
            text=self.selection_text,
            num_tokens=selection_text.num_tokens,
            candidates=tuple(scored),
            chosen=chosen,
            checked=tuple(checked),
            rank_correlation=rank_correlation(pairs) if checked else None,
            fit=Fit.of(*pairs.T) if checked else None,
            frontier=tuple(self._scored(rendered, selection_text, self._frontier(base), "measuring the frontier")),
        )

    def _best(self, candidates: list[Candidate]) -> int:
        """The lowest KL; without selection, the last method that was asked for, with floors."""
        if self.options.select:
            return min(range(len(candidates)), key=lambda i: candidates[i].kl.value)  # type: ignore[union-attr]
        wanted = [method for method in METHODS if method in self.options.methods][-1]
        of_method = [i for i, one in enumerate(candidates) if one.method == wanted]
        if not of_method:
            return len(candidates) - 1
        return of_method[-1] if wanted == UNIT_KL else of_method[0]

    def _candidate(self, method: str, floors: bool, table: ErrorTable) -> Candidate:
        return self._priced(method if floors else f"{method}, no floors", self.choose(table, floors=floors), table)

    def _priced(self, label: str, types: Mapping[str, str], table: ErrorTable) -> Candidate:
        total = table.price_of(types)
        return Candidate(
            label=label,
            bytes=self.file_bytes(types),
            predicted_kl=total.kl,
            predicted_kl_se=total.se,
            types=dict(types),
        )

    def _scored(
        self, rendered: RenderedModel, text: ScoredText, candidates: list[Candidate], stage: str
    ) -> list[Candidate]:
        scored = []
        for candidate in candidates:
            rendered.install(candidate.types)
            divergences, agreements = text.score()
            scored.append(
                candidate.model_copy(
                    update={
                        "kl": bootstrap_mean(divergences.numpy(), text.window_lengths),
                        "top1": bootstrap_mean(agreements.numpy(), text.window_lengths),
                    }
                )
            )
            if self.progress:
                self.progress(stage, len(scored), len(candidates), unit="plans")
        return scored

    def _drawn(self, table: ErrorTable) -> list[Candidate]:
        """Plans around the frontier: each tensor's prices are shaken by a factor of about 2, sizes by up to 10 %."""
        random = np.random.default_rng(self.seed)
        around = self.file_bytes(self.choose(table))
        drawn = []
        for number in range(self.options.check_plans):
            factors = {name: float(np.exp(random.normal(0, 0.7))) for name in table.tensors()}
            shaken = {
                name: {row.type: Price(kl=factors[name] * table.cost(row), se=0.0) for row in rows.values()}
                for name, rows in table.tensors().items()
            }
            size = int(random.uniform(0.9, 1.1) * around)
            types = self.choose(table.with_prices("shaken", shaken), floors=False, file_bytes=size)
            drawn.append(self._priced(f"drawn {number + 1}", types, table))
        return drawn

    def _frontier(self, table: ErrorTable) -> list[Candidate]:
        """The planner at sizes evenly spaced in logarithm, and every fixed recipe in the range."""
        if self.options.frontier is None:
            return []
        low, high = (int(bits * self.num_weights / 8) for bits in self.options.frontier)
        found = [
            self._priced(f"planner, {8 * size / self.num_weights:.2f} bpw", types, table)
            for size in np.geomspace(low, high, self.options.frontier_points)
            for types in [self.choose(table, floors=False, file_bytes=int(size))]
        ]
        for label, types in self.recipes.items():
            size = self.file_bytes(types)
            if low <= size <= high:
                found.append(Candidate(label=label, bytes=size, types=dict(types)))
        return found
