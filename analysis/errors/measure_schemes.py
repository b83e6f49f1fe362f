"""Measures what the schemes that vLLM reads do to linear layers, for the same kind of table as quant types have.

Layers are encoded under the importance of their inputs. Rows of a matrix are rounded alike, so a sample of them is
measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from dynquant.analysis.errors.measure import (
    ErrorPart,
    measured_row,
    measured_tensors,
    parts_of,
    table_of,
    unmeasured_row,
)
from dynquant.analysis.errors.sums import ErrorJournal, ErrorSums, Sums
from dynquant.analysis.errors.table import ErrorTable
from dynquant.calibration.importance import importance
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model
from dynquant.encoding.parts import as_slice
from dynquant.encoding.vllm import encode_layers, nvfp4_global_scale
from dynquant.families.linear_layers import LinearCheckpoint, LinearLayer
from dynquant.formats.vllm_schemes import SCHEMES, Scheme
from dynquant.session import Progress, ignore_progress

ENCODER = "dynquant, diagonal"
WEIGHTS_IN_MEMORY = 1 << 23
_SAMPLED_ROWS = 64
"""Rows of each matrix that are measured, evenly spaced."""


@dataclass(frozen=True)
class SchemeMeter:
    """Measures parts of linear layers in this process; `candidates` are the schemes of every layer by its name."""

    model: Model
    checkpoint: LinearCheckpoint
    stats: CalibrationStats
    candidates: Mapping[str, Sequence[Scheme]]
    device: torch.device | None = None

    @cached_property
    def linears(self) -> dict[str, LinearLayer]:
        return {linear.name: linear for linear in self.checkpoint.linears}

    def sums(self, part: ErrorPart, on_scheme: Callable[[], None]) -> Sums:
        """Measure sampled rows of some experts in each scheme; `on_scheme` is called after each."""
        linear, columns = self.linears[part.name], part.shape[-1]
        sampled = slice(0, None, max(1, part.shape[-2] // _SAMPLED_ROWS))
        weights = torch.stack([linear.load(expert)[sampled] for expert in part.experts])
        metric = importance(self.stats, part.name, part.shape)
        metric = None if metric is None else metric[as_slice(part.experts)]
        weighting = torch.ones(len(weights), columns) if metric is None else metric
        peak, sums = float(weights.abs().max()), {}
        for scheme in self.candidates[part.name]:
            encoded = encode_layers(
                scheme,
                weights,
                importance=metric,
                global_scale=nvfp4_global_scale(peak) if scheme.strategy == "tensor_group" else None,
                device=self.device,
                name=linear.modules[part.experts.start],
            )
            decoded = torch.stack([layer.decoded() for layer in encoded])
            sums[scheme.name] = ErrorSums.measured(weights, decoded, weighting, None)
            on_scheme()
        return sums


def build_scheme_table(
    meter: SchemeMeter, *, stats_hash: str, journal: ErrorJournal | None = None, progress: Progress = ignore_progress
) -> ErrorTable:
    """Measure every linear layer in each of its candidates.

    Parts that `journal` holds are not measured again, others are added to it.

    Raises:
        PlanError: the journal cannot be written.
        StatsError: the statistics belong to another checkpoint.
        EncodeError: NaN or Inf weights; the layer is named.
    """
    model, stats = meter.model, meter.stats
    stats.check_belongs_to(model.fingerprint, model.name)
    parts = {
        name: parts_of(name, linear.shape, [scheme.name for scheme in meter.candidates[name]], WEIGHTS_IN_MEMORY)
        for name, linear in meter.linears.items()
    }
    rows = []
    for name, sums in measured_tensors(parts, meter.sums, journal=journal, progress=progress):
        for scheme in meter.candidates[name]:
            rows.append(measured_row(meter.linears[name], scheme, (), sums.joined(scheme.name), stats))
    return table_of(model, rows, tuple(SCHEMES), stats_hash=stats_hash, encoder=ENCODER)


def unmeasured_scheme_table(
    model: Model, checkpoint: LinearCheckpoint, candidates: Mapping[str, Sequence[Scheme]]
) -> ErrorTable:
    """Return the rows of these candidates with their bytes alone: every error is 0."""
    rows = [unmeasured_row(linear, scheme, ()) for linear in checkpoint.linears for scheme in candidates[linear.name]]
    return table_of(model, rows, tuple(SCHEMES))
