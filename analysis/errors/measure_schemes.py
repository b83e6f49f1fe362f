"""Measures what the schemes that vLLM reads do to linear layers, for the same kind of table as quant types have.

Layers are encoded as `export` will encode them: under the second moments of their inputs, with error feedback, or under
the importance where there are no moments. Rows of a matrix are rounded alike, so a sample of them is measured.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch

from dynquant.analysis.errors.measure import Content, Formats, Meter
from dynquant.analysis.errors.sums import ErrorPart, ErrorSums, Sums, row_sums
from dynquant.calibration.importance import importance
from dynquant.calibration.second_moments import SecondMoments, hessian
from dynquant.encoding.dynquant_encoder import Loss, loss_under
from dynquant.encoding.parts import as_slice
from dynquant.encoding.vllm import encode_layers_under, nvfp4_global_scale
from dynquant.families.linear_layers import LinearCheckpoint, LinearLayer
from dynquant.formats.checksum import checksum
from dynquant.formats.vllm_schemes import Scheme

ENCODER = "dynquant"
_SAMPLED_ROWS = 64  # rows of each matrix that are measured, evenly spaced; fewer than twice as many
_SEARCHED_BYTES = 80  # for each weight that is searched
_MOMENT_BYTES = 32  # for each number of second moments, with factors


@dataclass(frozen=True)
class SchemeMeter(Meter):
    """Measures schemes of linear layers; `candidates` are those of every layer by its name."""

    checkpoint: LinearCheckpoint
    candidates: Mapping[str, Sequence[Scheme]]
    place: torch.device
    moments: SecondMoments | None = field(default=None, kw_only=True)
    weights_in_memory: ClassVar[int] = 1 << 23

    @cached_property
    def linears(self) -> dict[str, LinearLayer]:
        return {linear.name: linear for linear in self.checkpoint.linears}

    @property
    def origin(self) -> Mapping[str, Any]:
        return {"encoder": ENCODER, "moments": "" if self.moments is None else self.moments.identity}

    @property
    def device(self) -> torch.device:
        return self.place

    def formats(self, type_names: Sequence[str]) -> Formats:
        del type_names  # which schemes fit depends on the checkpoint alone
        return scheme_formats(self.checkpoint, self.candidates)

    def read(self, part: ErrorPart) -> Content:
        """Read a part, and keep evenly spaced rows."""
        whole = torch.stack([self.linears[part.name].load(expert) for expert in part.experts])
        identity = checksum(whole, part.experts.start * whole.shape[1])
        return Content(identity, whole[:, :: max(1, whole.shape[1] // _SAMPLED_ROWS)].clone())

    def sums_of(self, part: ErrorPart, content: Content) -> Sums:
        identity, weights = content.checksum, content.rows
        assert isinstance(weights, torch.Tensor)
        scale, moments = self._guidance(part)
        metric = moments if moments is not None else scale
        metric = (torch.ones(len(weights), part.shape[-1]) if metric is None else metric).to(self.device)
        here = weights.to(self.device)
        energies = row_sums(here, metric, None).sum(-1).cpu()
        loss = loss_under(weights.shape, scale, moments, self.device)  # one for all schemes
        return {
            name: ErrorSums.of(row_sums(here - after.to(self.device), metric, None).sum(-1).cpu(), energies, identity)
            for name, after in self._decoded(part, weights, loss)
        }

    def _guidance(self, part: ErrorPart) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return importance and second moments that `export` encodes these experts with."""
        scale, experts = importance(self.stats, part.name, part.shape), as_slice(part.experts)
        scale = None if scale is None else scale[experts]
        if self.moments is None:
            return scale, None
        return scale, hessian(self.moments, self.stats, part.name, part.shape, experts)

    def _bytes_in_memory(self, part: ErrorPart) -> int:
        num_experts, columns = len(part.experts), part.shape[-1]
        moments = 0 if self.moments is None else _MOMENT_BYTES * num_experts * columns**2
        return 4 * part.num_weights + _SEARCHED_BYTES * 2 * _SAMPLED_ROWS * num_experts * columns + moments

    def _decoded(self, part: ErrorPart, weights: torch.Tensor, loss: Loss) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each scheme and what decoding gives after encoding under the loss."""
        module, peak = self.linears[part.name].modules[part.experts.start], float(weights.abs().max())
        for scheme in self.candidates[part.name]:
            global_scale = nvfp4_global_scale(peak) if scheme.strategy == "tensor_group" else None
            options = {"global_scale": global_scale, "device": self.device, "name": module}
            encoded = encode_layers_under(loss, scheme, weights, **options)
            yield scheme.name, torch.stack([layer.decoded() for layer in encoded])


def scheme_formats(checkpoint: LinearCheckpoint, candidates: Mapping[str, Sequence[Scheme]]) -> Formats:
    """Return the schemes that every linear layer has as candidates, by its name."""
    return {linear.name: (linear, dict.fromkeys(candidates[linear.name], ())) for linear in checkpoint.linears}
