"""Super experts: the few routed experts whose down-projection drives massive activations (arXiv 2507.23279).

From calibration statistics alone. An expert is one when its largest |output| is above the 99.5th percentile of all
experts, a tenth of the largest, and MIN_RATIO times the median; or when it receives MIN_ENERGY_SHARE of its layer's
down-projection input energy with MIN_ENERGY_RATIO times less of its routing. The paper's rule that only the first
75 % of the layers count is left out: it misses published cases in last layers. Experts that calibration starved (fewer
than MIN_TOKENS) are not judged and give no median; where they are the majority, the statistics give no verdict.
"""

from typing import NamedTuple

import torch

from dynquant.calibration.statistics import CalibrationStats, InputStats
from dynquant.checkpoints.tensor_roles import Role, role_of

MIN_RATIO, MIN_ENERGY_SHARE, MIN_ENERGY_RATIO = 10.0, 0.1, 20.0
MIN_TOKENS = 8


class SuperExpert(NamedTuple):
    """One routed expert that a plan should keep precise. Shares are of the layer's total, from 0 to 1."""

    name: str
    expert: int
    max_out: float
    ratio: float  # |max_out| over the median of all routed experts that were calibrated
    energy_share: float
    routing_share: float


def find_super_experts(stats: CalibrationStats) -> list[SuperExpert]:
    """List super experts in order of |max_out|, largest first. Empty where statistics are missing or scarce."""
    measured = {name: inputs for name, inputs in stats.inputs.items() if role_of(name) is Role.EXPERT_DOWN}
    measured = {name: inputs for name, inputs in measured.items() if inputs.max_out is not None}
    rows = [row for name, inputs in measured.items() for row in _experts_of(name, inputs)]
    if 2 * len(rows) <= sum(len(inputs.counts) for inputs in measured.values()):
        return []
    maxima = torch.tensor([abs(row.max_out) for row in rows], dtype=torch.float64)
    middle = max(float(maxima.median()), 1e-30)
    floor = max(float(maxima.quantile(0.995)), float(maxima.max()) / 10, MIN_RATIO * middle)
    chosen = [
        row._replace(ratio=abs(row.max_out) / middle)
        for row in rows
        if abs(row.max_out) >= floor
        or (row.energy_share >= MIN_ENERGY_SHARE and row.energy_share >= MIN_ENERGY_RATIO * row.routing_share)
    ]
    return sorted(chosen, key=lambda row: -abs(row.max_out))


def _experts_of(name: str, inputs: InputStats) -> list[SuperExpert]:
    energy = inputs.in_sum2.sum(1)
    energy_shares = energy / energy.sum().clamp_min(1e-300)  # of the layer's input energy
    routing_shares = inputs.counts / inputs.counts.sum().clamp_min(1)
    assert inputs.max_out is not None
    numbers = zip(inputs.counts, inputs.max_out.tolist(), energy_shares.tolist(), routing_shares.tolist(), strict=True)
    return [
        SuperExpert(name, expert, largest, 0.0, *shares)
        for expert, (count, largest, *shares) in enumerate(numbers)
        if count >= MIN_TOKENS
    ]
