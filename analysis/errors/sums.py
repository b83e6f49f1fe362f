"""What the error table is made of: sums over the weights of some experts, which are added up in any order of parts.

They are exact in JSON, so that a part that was measured before an interruption counts as if it had been measured now.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

SumNumbers = list[list[list[float]] | None]
"""Squared, weighted and output sums as JSON holds them."""
_ROWS_AT_ONCE = 1 << 22
"""Weights of rows whose errors are computed at a time."""


@dataclass(frozen=True)
class ErrorSums:
    """Squared errors and energies of E experts in one type, float64 [E, 2] with the error first."""

    squared: torch.Tensor
    weighted: torch.Tensor
    outputs: torch.Tensor | None = None
    """Of the outputs on held-back inputs; None without any."""

    @classmethod
    def measured(
        cls, weights: torch.Tensor, decoded: torch.Tensor, scale: torch.Tensor, samples: torch.Tensor | None
    ) -> "ErrorSums":
        """weights, decoded [E, R, C]; scale [E, C]; samples [E, S, C] or None."""
        count, _, columns = weights.shape
        step = max(1, _ROWS_AT_ONCE // (count * columns))
        squared, weighted, outputs = (torch.zeros(count, 2, dtype=torch.float64) for _ in range(3))
        for kept, found in zip(weights.split(step, 1), decoded.split(step, 1), strict=True):
            lost = kept - found
            squared += torch.stack([_energy(lost), _energy(kept)], -1)
            weighted += torch.stack([_energy(lost, scale), _energy(kept, scale)], -1)
            if samples is not None:
                outputs += torch.stack([_energy(samples @ part.transpose(1, 2)) for part in (lost, kept)], -1)
        return cls(squared, weighted, None if samples is None else outputs)

    @classmethod
    def joined(cls, parts: Iterable["ErrorSums"]) -> "ErrorSums":
        """Experts of several parts, one after the other; all or none of them have outputs."""
        parts = list(parts)
        outputs = [part.outputs for part in parts if part.outputs is not None]
        return cls(
            torch.cat([part.squared for part in parts]),
            torch.cat([part.weighted for part in parts]),
            torch.cat(outputs) if outputs else None,
        )

    def numbers(self) -> SumNumbers:
        """As JSON holds them."""
        return [None if one is None else one.tolist() for one in (self.squared, self.weighted, self.outputs)]

    @classmethod
    def from_numbers(cls, numbers: SumNumbers, num_experts: int) -> "ErrorSums":
        """What `numbers` gave.

        Raises:
            ValueError, TypeError: they are not sums of so many experts.
        """
        found = [None if one is None else torch.tensor(one, dtype=torch.float64) for one in numbers]
        if any(one is not None and one.shape != (num_experts, 2) for one in found):
            raise ValueError(f"not the sums of {num_experts} experts")
        squared, weighted, outputs = found
        if squared is None or weighted is None:
            raise ValueError("sums of weights are missing")
        return cls(squared, weighted, outputs)


def _energy(matrices: torch.Tensor, column_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of squares of each matrix in [E, R, C], columns weighted by [E, C]; float64 [E]."""
    columns = matrices.square().sum(dim=1, dtype=torch.float64)  # [E, C]
    return (columns if column_scale is None else columns * column_scale.double()).sum(-1)
