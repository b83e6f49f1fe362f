"""Measures drawn rows round by round, until every type of a tensor is known well enough."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dynquant.analysis.errors.sampling import DrawnRows, Extent, Sampling
from dynquant.analysis.errors.sums import ErrorSums, Sample, Sums

Places = tuple[slice, slice]  # experts in the order in which they were drawn, and rows of each


@dataclass
class SampledSums:
    """Sums of drawn rows of one tensor, and which types need more of them."""

    drawn: DrawnRows
    shares: Tensor  # float64 [E], tokens that each expert received
    types: tuple[str, ...]
    limits: Sampling
    types_left: tuple[str, ...] = ()
    """Types that the round is for."""
    _energies: Tensor | None = None  # [2 or 3, E, M], experts and rows in the order in which they were drawn
    _lost: dict[str, Tensor] = field(default_factory=dict)
    _extents: dict[str, Extent] = field(default_factory=dict)  # what was measured of each type

    def rounds(self) -> Iterator[tuple[list[int], Tensor, Places]]:
        """Yield experts, their rows [n, m, C], and the places of their sums; `add` wants them before the next round."""
        earlier, self.types_left = Extent(0, 0), self.types
        for extent in self.drawn.extents(self.limits):
            is_wider = extent.rows == earlier.rows
            places = (
                slice(earlier.experts if is_wider else 0, extent.experts),
                slice(0 if is_wider else earlier.rows, extent.rows),
            )
            experts = self.drawn.experts[places[0]]
            yield experts.tolist(), self.drawn.weights[experts, places[1]], places
            self._extents |= dict.fromkeys(self.types_left, extent)
            self.types_left = tuple(name for name in self.types_left if not self._is_known(name))
            if not self.types_left:
                return
            earlier = extent

    def add(self, places: Places, energies: Tensor, lost: Mapping[str, Tensor]) -> None:
        """Take down the sums of rows, and what they lose in each wanted type."""
        if self._energies is None:
            shape = (len(energies), *self.drawn.weights.shape[:2])
            self._energies = torch.zeros(shape, dtype=torch.float64)
            self._lost = {name: torch.zeros(shape, dtype=torch.float64) for name in self.types}
        self._energies[:, *places] = energies
        for name, of_type in lost.items():
            self._lost[name][:, *places] = of_type

    def sums(self, checksum: int) -> Sums:
        """Return estimates for the whole tensor, by type."""
        return {name: self._estimate(name, checksum) for name in self.types}

    def _is_known(self, name: str) -> bool:
        error, error_se = self._error_and_se(name)
        return error_se <= max(self.limits.target * error, self.limits.negligible)

    def _error_and_se(self, name: str) -> tuple[float, float]:
        """Return `weighted_error` and its standard error."""
        extent = self._extents[name]
        energies, lost = (sums[1, : extent.experts, : extent.rows] for sums in (self._energies, self._lost[name]))
        shares = self.shares[self.drawn.experts[: extent.experts]]
        counted = shares / self.drawn.expert_chances(extent)
        error, energy = (float((self.drawn.totals(sums, extent) * counted).sum()) for sums in (lost, energies))
        return error / energy if energy > 0 else 0.0, self.drawn.standard_error(lost, energies, shares, extent)

    def _estimate(self, name: str, checksum: int) -> ErrorSums:
        extent = self._extents[name]
        place = slice(None), slice(extent.experts), slice(extent.rows)
        experts = self.drawn.experts[: extent.experts]
        by_number = experts.argsort()
        lost, energies = (
            self.drawn.totals(sums[place], extent)[:, by_number] for sums in (self._lost[name], self._energies)
        )
        if self.drawn.is_whole(extent):
            return ErrorSums.of(lost, energies, checksum)
        chances = self.drawn.expert_chances(extent)[by_number].tolist()
        sample = Sample(experts[by_number].tolist(), chances, self._error_and_se(name)[1])
        return ErrorSums.of(lost, energies, checksum, sample)
