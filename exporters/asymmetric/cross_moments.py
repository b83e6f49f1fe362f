"""Second moments of what a matrix of a quantized model reads, y, across from what the original's reads there, x.

Of all matrices on y, the nearest to W x is W + W D H⁻¹ with D = E[(x - y) yᵀ], H = E[y yᵀ] (GPTAQ, arXiv:2504.02692).
H is that of `second_moments`, damped and shrunk; D counts in the measure n / (n + C) that n tokens know of C channels,
so that an expert with few tokens stays nearly what it was. Half the way is gone (QEP, arXiv:2504.09629), since all of
it fits the calibration text: on other text textbook-moe-16m as IQ2_XXS, with 16,384 tokens, has KL 0.672 without, 0.548
half of the way, 0.575 all of it, and after a closing pass 0.521, 0.480 and 0.523.
"""

import torch
from torch import Tensor

from dynquant.calibration.second_moments import SecondMoments, hessian
from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.errors import StatsError

_SHARE = 0.5  # of the way to the nearest matrix


class CrossMoments:
    """Sums over tokens by key of an input, in float32 on the device of the activations."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._differences: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, key: str, y: Tensor, x: Tensor, *, num_experts: int = 1, expert: int = 0) -> None:
        """Add tokens [T, C] of one expert, in both models."""
        y, x = y.float(), x.float()
        if key not in self._sums:
            self._sums[key] = y.new_zeros(num_experts, y.shape[1], y.shape[1])
            self._differences[key] = torch.zeros_like(self._sums[key])
            self._counts[key] = torch.zeros(num_experts, dtype=torch.int64)
        self._sums[key][expert].addmm_(y.T, y)
        self._differences[key][expert].addmm_((x - y).T, y)
        self._counts[key][expert] += len(y)

    def of_quantized(
        self, provenance: StatsProvenance, aliases: dict[str, str]
    ) -> tuple[CalibrationStats, SecondMoments]:
        """Return statistics and second moments of y; `aliases` maps other weights to their key."""
        sums, counts = {key: total.cpu() for key, total in self._sums.items()}, self._counts
        squares = {key: total.diagonal(dim1=1, dim2=2).double() for key, total in sums.items()}
        stats = CalibrationStats(provenance, {key: InputStats(squares[key], counts[key]) for key in sums}, aliases)
        weights = {key: count.double() for key, count in counts.items()}
        return stats, SecondMoments(provenance, torch.empty(0, 0), aliases=aliases, sums=sums, weights=weights)

    def corrections(self, stats: CalibrationStats, moments: SecondMoments) -> dict[str, Tensor]:
        """Return what to add to a matrix, in units of itself, for every key: float32 [E, C, C] on the CPU.

        Raises:
            StatsError: the quantized model gives NaN or Inf.
        """
        return {key: self._correction(key, stats, moments) for key in self._sums}

    def _correction(self, key: str, stats: CalibrationStats, moments: SecondMoments) -> Tensor:
        experts, channels = self._sums[key].shape[:2]
        h = hessian(moments, stats, key, (experts, 1, channels) if experts > 1 else (1, channels))
        assert h is not None
        corrections = torch.empty(experts, channels, channels)
        for expert in range(experts):  # one at a time: many in float64 would not fit on a GPU
            tokens = int(self._counts[key][expert])
            differences = _SHARE * self._differences[key][expert].double() / (tokens + channels)
            corrections[expert] = _solved(key, h[min(expert, len(h) - 1)].to(differences), differences)
        return corrections


def _solved(key: str, h: Tensor, differences: Tensor) -> Tensor:
    """Return D H⁻¹ [C, C] of one matrix."""
    if not (h.isfinite().all() and differences.isfinite().all()):
        raise StatsError(
            f"{key}: the inputs that the quantized model gives it are not finite, so there is nothing to correct by. "
            "Export without --asymmetric, or with more bits for the layers before it."
        )
    return torch.cholesky_solve(differences.mT, torch.linalg.cholesky(h)).mT.float()  # h is positive definite
