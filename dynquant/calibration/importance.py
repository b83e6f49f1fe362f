"""From statistics to the importance that encoders weight errors with: mean squares, shrunk where experts starve.

An expert that saw n tokens has the noisy mean w_e; the layer has the token-weighted mean w. Encoders get

    (n * w_e + k * w) / (n + k)

which is w for an expert without tokens and w_e for one with many. k is small because experts differ: a layer mean
describes none of them. `coverage_report` says how many tokens each expert saw, and which saw too few.
"""

from dataclasses import dataclass

import torch

from dynquant.calibration.statistics import CalibrationStats, InputStats
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role, layer_of, role_of
from dynquant.errors import StatsError

SHRINK_TOKENS = 16  # default k: the layer mean counts as much as this many tokens
STARVED_TOKENS = 32  # an expert with fewer tokens is starved whatever the others saw
STARVED_SHARE = 1 / 8  # so is one with less than this share of the layer's mean tokens per expert
MIN_SHARE = 1e-6  # importance of a dead channel over the mean: a block of zeros would let an encoder erase its weights


@dataclass(frozen=True)
class LayerCoverage:
    """Tokens that each routed expert of a layer saw, and the experts whose statistics lean on the layer mean."""

    layer: int
    tokens: tuple[int, ...]
    starved: tuple[int, ...]


def coverage_report(stats: CalibrationStats, model: Model) -> list[LayerCoverage]:
    """Return `expert_coverage`, or raise StatsError when the model has routed experts and the statistics have none."""
    rows = expert_coverage(stats)
    # A configuration may count experts of layers that the model does not have (`first_k_dense_replace`).
    if not rows and any(role.is_routed_expert for role in model.roles.values()):
        raise StatsError(
            f"The model has {model.hyper.n_expert} experts per layer, but the statistics hold none; calibrate it again."
        )
    return rows


def expert_coverage(stats: CalibrationStats) -> list[LayerCoverage]:
    """Tokens of the routed experts of every layer that the statistics hold, in layer order."""
    rows = []
    for key, input_stats in stats.inputs.items():
        layer = layer_of(key)
        if role_of(key) is Role.EXPERT_DOWN and layer is not None:
            tokens = tuple(input_stats.counts.tolist())
            floor = max(STARVED_TOKENS, STARVED_SHARE * sum(tokens) / len(tokens))
            starved = tuple(expert for expert, count in enumerate(tokens) if count < floor)
            rows.append(LayerCoverage(layer, tokens, starved))
    return sorted(rows, key=lambda row: row.layer)


def importance(
    stats: CalibrationStats, weight: str, shape: tuple[int, ...], *, shrink_tokens: float = SHRINK_TOKENS
) -> torch.Tensor | None:
    """E[x^2] of the input of a weight, float32 [E, C]: one row for a matrix, one per slice of a [E, rows, C] stack.

    None when calibration did not see the input (embeddings, layers that are not run).

    Raises:
        StatsError: the statistics are of another shape than the weight, saw no token, or are not finite.
    """
    input_stats = stats.input_of(weight)
    if input_stats is None:
        return None
    num_slices, channels = (shape[0] if len(shape) == 3 else 1), shape[-1]
    num_experts, measured_channels = input_stats.in_sum2.shape
    if measured_channels != channels or num_experts not in (1, num_slices):
        raise StatsError(
            f"The statistics of {weight} are for {num_experts} x {measured_channels} inputs, but the weight has shape "
            f"{'x'.join(map(str, shape))}; they belong to another model. Calibrate this one."
        )
    mean = _shrunk_mean(input_stats, shrink_tokens)
    if mean is None:
        raise StatsError(f"Calibration saw no token at the input of {weight}; calibrate on a longer text.")
    if not torch.isfinite(mean).all():
        raise StatsError(f"The statistics of {weight} hold NaN or Inf; calibrate in float32 or check the model.")
    average = mean.mean(1, keepdim=True)
    floor = torch.where(average > 0, MIN_SHARE * average, 1.0)  # an input that is always zero: all channels alike
    return torch.maximum(mean, floor).expand(num_slices, -1).to(torch.float32)


def _shrunk_mean(stats: InputStats, shrink_tokens: float) -> torch.Tensor | None:
    """(in_sum2 + k * layer mean) / (n + k) in float64, [E, C]; None when no expert saw a token."""
    counts = stats.counts.to(torch.float64).unsqueeze(1)
    if not counts.any():
        return None
    layer_mean = stats.in_sum2.sum(0) / counts.sum()
    if len(counts) == 1:
        return layer_mean.unsqueeze(0)
    shrunk = (stats.in_sum2 + shrink_tokens * layer_mean) / (counts + shrink_tokens).clamp_min(1e-12)
    return torch.where(counts > 0, shrunk, layer_mean)
