"""Accumulates what calibration keeps of the inputs of layers: sums of squares, extremes, sampled rows, second moments.

Recorders know keys of `CalibrationStats.inputs`, but neither hooks nor models. Squares of one batch are summed in
float32 (relative error about 2e-7 at 2,048 tokens, a tenth of the time of float64) and batches in float64, on the
device of the activations.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import nn

from dynquant.calibration.second_moments import OUTPUT
from dynquant.calibration.statistics import InputStats
from dynquant.resources import parse_size
from dynquant.running.expert_hooks import expert_layout, expert_modules, expert_stack
from dynquant.running.load import tf32_products

DEFAULT_LIMIT = 8 * 2**30
"""Bytes of float32 sums of second moments, of inputs or of outputs, where there is memory enough."""
_INPUT_SHARE, _OUTPUT_SHARE = 0.3, 0.15  # of all memory, at most
_STRIP = 64
"""Rows of a sum that are added to at once, at least; narrower products are slower than what they leave out is worth."""
_PINNED_VALUES = 1 << 24
"""Come from a GPU at once."""


class InputRecorder:
    """Running statistics of an input with E experts (1 for a plain linear layer) and C channels."""

    def __init__(self, num_experts: int, num_channels: int, *, sample_rows: int, device: torch.device) -> None:
        self.num_experts, self.num_channels = num_experts, num_channels
        self._in_sum2 = torch.zeros(num_experts, num_channels, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_experts, dtype=torch.int64)
        self._sample_rows = sample_rows
        self._samples: torch.Tensor | None = None
        self._sample_counts = torch.zeros_like(self._counts)
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
            self._samples = torch.zeros(shape, dtype=torch.bfloat16, device=self._in_sum2.device)
        picked = torch.arange(take, device=x.device) * x.shape[0] // take  # evenly spread
        rows = slice(expert, expert + x.shape[1])
        self._samples[rows, used : used + take] = x[picked].transpose(0, 1).to(torch.bfloat16)
        self._sample_counts[rows] += take

    def add_extremes(self, x: torch.Tensor, out: torch.Tensor, positions: torch.Tensor, *, expert: int = 0) -> None:
        """Keep the values of largest magnitude in `x` [T, C] and `out` [T, rows]; `positions` [T] are in the window."""
        for name, values in (("max_in", x), ("max_out", out)):
            if name not in self._extremes:
                self._extremes[name] = torch.zeros(self.num_experts)
                for part in ("channel", "position"):
                    self._extremes[f"{name}_{part}"] = torch.full((self.num_experts,), -1, dtype=torch.int64)
            low, high = torch.aminmax(values)  # no copy of the values, unlike abs
            if max(-float(low), float(high)) > abs(float(self._extremes[name][expert])):
                token, channel = divmod(int(values.abs().argmax()), values.shape[1])
                self._extremes[name][expert] = float(values[token, channel])
                self._extremes[f"{name}_channel"][expert] = channel
                self._extremes[f"{name}_position"][expert] = int(positions[token])

    def finish(self) -> InputStats:
        """Return the statistics on the CPU."""
        samples = () if self._samples is None else (self._samples.cpu(), self._sample_counts)
        return InputStats(self._in_sum2.cpu(), self._counts, *samples, **self._extremes)


def _on_cpu(values: torch.Tensor) -> torch.Tensor:
    """Return the values on the CPU; from a GPU they come through pinned memory, which it fills at many times the speed
    and all cores empty."""
    if not values.is_cuda:
        return values
    copied = torch.empty(values.shape, dtype=values.dtype)
    parts = zip(values.reshape(-1).split(_PINNED_VALUES), copied.view(-1).split(_PINNED_VALUES), strict=True)
    pinned = torch.empty(min(values.numel(), _PINNED_VALUES), dtype=values.dtype, pin_memory=True)
    for source, target in parts:
        target.copy_(pinned[: len(source)].copy_(source))
    return copied


def moment_limits(asked: str | None, memory: int) -> tuple[int, int]:
    """Return the bytes of second moments of inputs, and of outputs: those asked for of each, or what is sensible with
    so much memory in all, of which the model and its backward pass need the rest."""
    if asked is not None:
        return (parse_size(asked),) * 2
    return min(DEFAULT_LIMIT, int(_INPUT_SHARE * memory)), min(DEFAULT_LIMIT, int(_OUTPUT_SHARE * memory))


def _add_products(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add xᵀ y, symmetric, to `total` [C, C]: on a CPU to what lies above its diagonal, and to little else."""
    step = max(_STRIP, len(total) // 8) if not x.is_cuda else len(total)
    for start in range(0, len(total), step):
        total[start : start + step, start:].addmm_(x[:, start : start + step].T, y[:, start:])


@dataclass
class MomentRecorder:
    """Sums of x xᵀ by key, on the device of the activations, within limits of memory for inputs, and for gradients of
    outputs (`OUTPUT`) where there are to be any.

    Experts get a matrix each when all of them fit in the limit, else one for their layer. An input whose matrix does
    not fit any more has none, and is listed in `left_out`: its weights are encoded without error feedback.
    """

    limits: tuple[int, int]
    """Bytes of inputs, and of outputs."""
    pools_experts: bool
    with_outputs: bool = False
    left_out: list[str] = field(default_factory=list)
    _sums: dict[str, torch.Tensor] = field(default_factory=dict)
    _weights: dict[str, torch.Tensor] = field(default_factory=dict)
    used_bytes: list[int] = field(default_factory=lambda: [0, 0])
    """Bytes of inputs, and of outputs."""

    @classmethod
    def for_model(cls, hf_model: nn.Module, limits: tuple[int, int], *, with_outputs: bool = False) -> "MomentRecorder":
        """Pools experts when a matrix for each would take more than a limit."""
        experts = expert_modules(hf_model).values()
        shapes = [expert_stack(module, expert_layout(module).down).shape for module in experts]
        # [E, C, F], or [E, F, C] when transposed: float32 matrices for both inputs of every expert.
        needed = sum(4 * experts * (rows**2 + columns**2) for experts, rows, columns in shapes)
        # Outputs of gate and up are as wide as the input of down.
        outputs = 2 * with_outputs * sum(4 * experts * min(rows, columns) ** 2 for experts, rows, columns in shapes)
        return cls(limits, needed > limits[0] or outputs > limits[1], with_outputs)

    def add(
        self, key: str, x: torch.Tensor, *, num_experts: int = 1, expert: int = 0, squares: torch.Tensor | None = None
    ) -> None:
        """Add tokens of one expert, `x` [T, C], or of all experts at once [T, E, C].

        With `squares` [T] of gradients a token counts 1 + its own over their mean.
        """
        if not len(x) or not self._has_room(key, x, num_experts):
            return
        x, row = x.detach(), 0 if len(self._sums[key]) == 1 else expert
        is_exact = x.is_cuda and x.dtype == torch.bfloat16  # as products of bfloat16 numbers in float32 are
        if x.dim() == 2 and squares is None and is_exact:
            self._sums[key][row] += torch.mm(x.T, x, out_dtype=torch.float32)  # on tensor cores, ten times as fast
            self._weights[key][row] += len(x)
            return
        x = x.to(torch.float32)
        if x.dim() == 3:
            self._sums[key] += torch.einsum("tea,teb->eab", x, x)
            self._weights[key] += len(x)
        elif squares is None:
            _add_products(self._sums[key][row], x, x)
            self._weights[key][row] += len(x)
        else:
            squares = squares.to(torch.float32)
            mean = squares.mean()
            v = 1 + torch.where(mean > 0, squares / mean, 0.0)  # no branch: it would wait for the GPU
            with tf32_products(x.device):
                _add_products(self._sums[key][row], x * v.unsqueeze(1), x)
            self._weights[key][row] += v.sum(dtype=torch.float64)

    def take(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Sums, exactly symmetric, and weights of the inputs that were seen since the last call, on the CPU.

        What was taken still counts against the limit.
        """
        sums = {}
        for key in list(self._sums):
            upper = self._sums.pop(key).triu()  # products round differently on both sides, or are not there below
            sums[key] = _on_cpu(upper + upper.triu(1).mT)
        weights = {key: weight.cpu() for key, weight in self._weights.items()}
        self._weights.clear()
        return sums, weights

    def _has_room(self, key: str, x: torch.Tensor, num_experts: int) -> bool:
        if key in self._sums:
            return True
        if key in self.left_out:
            return False
        count = x.shape[1] if x.dim() == 3 else 1 if self.pools_experts else num_experts
        columns, side = x.shape[-1], key.endswith(OUTPUT)
        if self.used_bytes[side] + (size := 4 * count * columns**2) > self.limits[side]:
            self.left_out.append(key)
            return False
        self.used_bytes[side] += size
        self._sums[key] = torch.zeros(count, columns, columns, device=x.device)
        self._weights[key] = torch.zeros(count, dtype=torch.float64, device=x.device)
        return True
