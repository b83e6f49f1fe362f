"""Accumulates second moments of layer inputs during calibration, within a limit of memory.

Experts get a matrix each when all of them fit in the limit, else one for their layer. An input whose matrix does not
fit any more has none, and is listed in `left_out`: its weights are encoded without error feedback.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.statistics import StatsProvenance
from dynquant.running.expert_hooks import expert_modules

DEFAULT_LIMIT = 8 * 2**30
"""Bytes of float32 sums."""


@dataclass
class MomentRecorder:
    """Sums of x xᵀ by key, on the device of the activations."""

    limit_bytes: int
    pools_experts: bool
    left_out: list[str] = field(default_factory=list)
    _sums: dict[str, torch.Tensor] = field(default_factory=dict)
    _weights: dict[str, torch.Tensor] = field(default_factory=dict)
    used_bytes: int = 0

    @classmethod
    def for_model(cls, hf_model: nn.Module, limit_bytes: int) -> "MomentRecorder":
        """Pools experts when a matrix for each would take more than the limit."""
        per_expert = sum(_expert_bytes(module) for module in expert_modules(hf_model).values())
        return cls(limit_bytes, pools_experts=per_expert > limit_bytes)

    def add(
        self,
        key: str,
        x: torch.Tensor,
        *,
        num_experts: int = 1,
        expert: int = 0,
        squared_gradients: torch.Tensor | None = None,
    ) -> None:
        """Add tokens of one expert, `x` [T, C], or of all experts at once [T, E, C].

        With `squared_gradients` [T] a token counts 1 + its own over their mean.
        """
        if not len(x) or not self._has_room(key, x, num_experts):
            return
        x = x.detach().to(torch.float32)
        if x.dim() == 3:
            self._sums[key] += torch.einsum("tea,teb->eab", x, x)
            self._weights[key] += len(x)
            return
        row = 0 if len(self._sums[key]) == 1 else expert
        if squared_gradients is None:
            self._sums[key][row].addmm_(x.T, x)
            self._weights[key][row] += len(x)
        else:
            v = _relative(squared_gradients.to(torch.float32))
            self._sums[key][row].addmm_((x * v.unsqueeze(1)).T, x)
            self._weights[key][row] += v.sum(dtype=torch.float64)

    def finish(
        self, provenance: StatsProvenance, tokens: torch.Tensor, kind: str, aliases: dict[str, str]
    ) -> SecondMoments:
        """The moments of all inputs."""
        sums, weights = self.take()
        known = {alias: key for alias, key in aliases.items() if key in sums}
        return SecondMoments(provenance, tokens.to(torch.int32).cpu(), kind, known, sums, weights)

    def take(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Sums, exactly symmetric, and weights of the inputs that were seen since the last call, on the CPU.

        What was taken still counts against the limit.
        """
        sums = {}
        for key in list(self._sums):
            one = self._sums.pop(key)
            sums[key] = ((one + one.transpose(1, 2)) / 2).cpu()
        weights = {key: one.cpu() for key, one in self._weights.items()}
        self._weights.clear()
        return sums, weights

    def _has_room(self, key: str, x: torch.Tensor, num_experts: int) -> bool:
        if key in self._sums:
            return True
        if key in self.left_out:
            return False
        count = x.shape[1] if x.dim() == 3 else 1 if self.pools_experts else num_experts
        columns = x.shape[-1]
        if self.used_bytes + 4 * count * columns**2 > self.limit_bytes:
            self.left_out.append(key)
            return False
        self.used_bytes += 4 * count * columns**2
        self._sums[key] = torch.zeros(count, columns, columns, device=x.device)
        self._weights[key] = torch.zeros(count, dtype=torch.float64, device=x.device)
        return True


def _expert_bytes(module: nn.Module) -> int:
    """Matrices for both inputs of every expert of a layer."""
    down = module.down_proj.shape  # [E, C, F], or [E, F, C] when transposed
    return 4 * down[0] * (down[1] ** 2 + down[2] ** 2)


def _relative(squared_gradients: torch.Tensor) -> torch.Tensor:
    mean = squared_gradients.mean()
    return 1 + torch.where(mean > 0, squared_gradients / mean, 0.0)  # no branch: it would wait for the GPU
