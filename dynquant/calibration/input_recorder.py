"""Accumulates what calibration keeps of one linear input: sums of squares, extremes, and sampled rows.

A recorder belongs to one key of `CalibrationStats.inputs`. Squares of one batch are summed in float32 (relative error
about 2e-7 at 2,048 tokens, a tenth of the time of float64) and batches in float64, on the device of the activations.
It does not know names, hooks or models.
"""

import math

import torch

from dynquant.calibration.statistics import InputStats


class InputRecorder:
    """Running statistics of an input with E experts (1 for a plain linear layer) and C channels."""

    def __init__(self, num_experts: int, num_channels: int, *, sample_rows: int, device: torch.device) -> None:
        self.num_experts = num_experts
        self.num_channels = num_channels
        self._device = device
        self._in_sum2 = torch.zeros(num_experts, num_channels, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_experts, dtype=torch.int64)
        self._sample_rows = sample_rows
        self._samples: torch.Tensor | None = None
        self._sample_counts = torch.zeros(num_experts, dtype=torch.int64)
        self._extremes: dict[str, torch.Tensor] = {}

    def add_sums(self, x: torch.Tensor, *, expert: int = 0) -> None:
        """Add tokens. `x` is [T, C] for one expert, or [T, E, C] for all experts at once."""
        x = x.unsqueeze(1) if x.ndim == 2 else x
        rows = slice(expert, expert + x.shape[1])
        self._in_sum2[rows] += x.float().square().sum(0)
        self._counts[rows] += x.shape[0]

    def add_samples(self, x: torch.Tensor, *, expert: int = 0, fill: float) -> None:
        """Keep evenly spread rows of `x` ([T, C] or [T, E, C]) until `fill` of the capacity is used.

        `fill` grows to 1 over the held-back batches, so that the rows come from all of them.
        """
        x = x.unsqueeze(1) if x.ndim == 2 else x
        used = int(self._sample_counts[expert])
        take = min(x.shape[0], math.ceil(fill * self._sample_rows) - used)
        if take <= 0:
            return
        if self._samples is None:
            shape = (self.num_experts, self._sample_rows, self.num_channels)
            self._samples = torch.zeros(shape, dtype=torch.bfloat16, device=self._device)
        chosen = torch.arange(take, device=x.device) * x.shape[0] // take
        rows = slice(expert, expert + x.shape[1])
        self._samples[rows, used : used + take] = x[chosen].transpose(0, 1).to(torch.bfloat16)
        self._sample_counts[rows] += take

    def add_extremes(self, x: torch.Tensor, out: torch.Tensor, positions: torch.Tensor, *, expert: int = 0) -> None:
        """Keep the values of largest magnitude in `x` [T, C] and `out` [T, rows]; `positions` [T] are in the window."""
        self._add_extreme("max_in", x, positions, expert)
        self._add_extreme("max_out", out, positions, expert)

    def _add_extreme(self, name: str, values: torch.Tensor, positions: torch.Tensor, expert: int) -> None:
        if name not in self._extremes:
            self._add_extreme_fields(name)
        kept = self._extremes[name]
        low, high = torch.aminmax(values)
        if not max(-float(low), float(high)) > abs(float(kept[expert])):
            return
        place = int(values.abs().argmax())
        token, channel = divmod(place, values.shape[1])
        kept[expert] = float(values[token, channel])
        self._extremes[f"{name}_channel"][expert] = channel
        self._extremes[f"{name}_position"][expert] = int(positions[token])

    def _add_extreme_fields(self, name: str) -> None:
        self._extremes[name] = torch.zeros(self.num_experts)
        for part in ("channel", "position"):
            self._extremes[f"{name}_{part}"] = torch.full((self.num_experts,), -1, dtype=torch.int64)

    def finish(self) -> InputStats:
        """The statistics on the CPU."""
        samples = {}
        if self._samples is not None:
            samples = {"samples": self._samples.cpu(), "sample_counts": self._sample_counts}
        return InputStats(in_sum2=self._in_sum2.cpu(), counts=self._counts, **samples, **self._extremes)
