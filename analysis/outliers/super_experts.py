"""Super experts: the few routed experts whose down-projection drives massive activations (arXiv 2507.23279).

From calibration statistics alone. An expert is one when its largest |output| is above the 99.5th percentile of all
experts, a tenth of the largest, and `min_ratio` times the median; or when it receives `min_energy_share` of its layer's
down-projection input energy with `min_energy_ratio` times less of its routing. The paper's rule that only the first
75 % of the layers count is left out: it misses published cases in last layers.
"""

import torch

from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.tensor_roles import Role, layer_of, role_of
from dynquant.storage.documents import FrozenRecord


class SuperExpert(FrozenRecord):
    """One routed expert that a plan should keep precise. Shares are of the layer's total, from 0 to 1."""

    name: str
    layer: int
    expert: int
    max_out: float
    ratio: float
    """|max_out| over the median of all routed experts."""
    energy_share: float
    routing_share: float


def find_super_experts(
    stats: CalibrationStats, *, min_ratio: float = 10.0, min_energy_share: float = 0.1, min_energy_ratio: float = 20.0
) -> list[SuperExpert]:
    """List super experts in order of |max_out|, largest first. Empty for dense models and imported statistics."""
    rows = [
        row
        for name, inputs in stats.inputs.items()
        if role_of(name) is Role.EXPERT_DOWN and inputs.max_out is not None
        for row in _experts_of(name, inputs.in_sum2, inputs.counts, inputs.max_out)
    ]
    if not rows:
        return []
    maxima = torch.tensor([abs(row.max_out) for row in rows], dtype=torch.float64)
    middle = max(float(maxima.median()), 1e-30)
    floor = max(float(maxima.quantile(0.995)), float(maxima.max()) / 10, min_ratio * middle)
    chosen = [
        row.model_copy(update={"ratio": abs(row.max_out) / middle})
        for row in rows
        if abs(row.max_out) >= floor
        or (row.energy_share >= min_energy_share and row.energy_share >= min_energy_ratio * row.routing_share)
    ]
    return sorted(chosen, key=lambda row: -abs(row.max_out))


def _experts_of(name: str, in_sum2: torch.Tensor, counts: torch.Tensor, max_out: torch.Tensor) -> list[SuperExpert]:
    energy = in_sum2.sum(1)
    energy_shares = energy / energy.sum().clamp_min(1e-300)
    routing_shares = counts / counts.sum().clamp_min(1)
    return [
        SuperExpert(
            name=name,
            layer=layer_of(name) or 0,
            expert=expert,
            max_out=float(max_out[expert]),
            ratio=0.0,
            energy_share=float(energy_shares[expert]),
            routing_share=float(routing_shares[expert]),
        )
        for expert in range(len(counts))
    ]
