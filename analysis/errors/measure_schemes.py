"""Measures what the schemes that vLLM reads do to linear layers, for the same kind of table as quant types have.

Layers are encoded under the importance of their inputs. Rows of a matrix are rounded alike, so a sample of them is
measured.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from dynquant.analysis.errors.measure import ErrorPart, Formats
from dynquant.analysis.errors.sums import ErrorSums, Sums
from dynquant.calibration.importance import importance
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model
from dynquant.encoding.parts import as_slice
from dynquant.encoding.vllm import encode_layers, nvfp4_global_scale
from dynquant.families.linear_layers import LinearCheckpoint, LinearLayer
from dynquant.formats.vllm_schemes import Scheme

ENCODER = "dynquant, diagonal"
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
    encoder_name: ClassVar[str] = ENCODER
    weights_in_memory: ClassVar[int] = 1 << 23

    @cached_property
    def linears(self) -> dict[str, LinearLayer]:
        return {linear.name: linear for linear in self.checkpoint.linears}

    def formats(self, type_names: Sequence[str]) -> Formats:
        del type_names  # which schemes fit depends on the checkpoint alone
        return scheme_formats(self.checkpoint, self.candidates)

    def sums(self, part: ErrorPart, on_format: Callable[[], None]) -> Sums:
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
            on_format()
        return sums


def scheme_formats(checkpoint: LinearCheckpoint, candidates: Mapping[str, Sequence[Scheme]]) -> Formats:
    """Return the schemes that every linear layer has as candidates, by its name."""
    return {linear.name: (linear, dict.fromkeys(candidates[linear.name], ())) for linear in checkpoint.linears}
