"""Measures what the schemes that vLLM reads do to linear layers, for the same kind of table as quant types have.

Layers are encoded as `export` will encode them: under the second moments of their inputs, with error feedback, or under
the importance where there are no moments. Rows do not depend on each other, and are drawn as those of types are
(`sampling`).

NVFP4's global scale alone is of a whole layer and of those that vLLM fuses with it; here it is that of the drawn rows.
It decides only how scales of groups round to E4M3, which has the same precision over 15 powers of two: on ten layers
of textbook-moe-16m errors under the two differ by 0.7 % up or down and by 0.03 % in the mean, and by no more where the
layer's largest weight is 3,000 times that of the rows.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from dynquant.analysis.errors.measure import Content, Formats, Meter
from dynquant.analysis.errors.sampling import Sampling, most_rows, stacked
from dynquant.analysis.errors.sums import ErrorPart, Sums, row_sums
from dynquant.calibration.importance import importance
from dynquant.calibration.second_moments import SecondMoments, hessian
from dynquant.encoding.dynquant_encoder import loss_under
from dynquant.encoding.interface import check_finite
from dynquant.encoding.parts import as_slice, ranges
from dynquant.encoding.vllm import encode_layers_under, nvfp4_global_scale
from dynquant.families.linear_layers import LinearCheckpoint, LinearLayer
from dynquant.formats.checksum import checksum
from dynquant.formats.vllm_schemes import Scheme

ENCODER = "dynquant"
_SEARCHED_BYTES = 80  # for each weight that is searched
_MOMENT_BYTES = 32  # for each number of second moments, with factors


@dataclass(frozen=True)
class SchemeMeter(Meter):
    """Measures schemes of linear layers; `candidates` are those of every layer by its name."""

    checkpoint: LinearCheckpoint
    candidates: Mapping[str, Sequence[Scheme]]
    place: torch.device
    moments: SecondMoments | None = field(default=None, kw_only=True)
    sampling: Sampling = field(default=Sampling(), kw_only=True)

    @cached_property
    def linears(self) -> dict[str, LinearLayer]:
        return {linear.name: linear for linear in self.checkpoint.linears}

    @property
    def origin(self) -> Mapping[str, Any]:
        moments = "" if self.moments is None else self.moments.identity
        return {"encoder": ENCODER, "moments": moments, "seed": self.sampling.seed}

    @property
    def device(self) -> torch.device:
        return self.place

    def formats(self, type_names: Sequence[str]) -> Formats:
        del type_names  # which schemes fit depends on the checkpoint alone
        return scheme_formats(self.checkpoint, self.candidates)

    def read(self, part: ErrorPart) -> Content:
        linear, num_rows, total = self.linears[part.name], part.shape[-2], 0

        def blocks() -> Iterator[tuple[range, range, torch.Tensor]]:
            nonlocal total
            for expert in part.experts:
                weights = linear.load(expert)
                check_finite(weights, name=linear.modules[expert])
                total += checksum(weights, expert * num_rows)
                yield range(expert, expert + 1), range(num_rows), weights.unsqueeze(0)

        drawn = self._drawn(part, blocks(), self.sampling)
        return Content(total % (1 << 64), drawn)

    def sums_of(self, part: ErrorPart, content: Content) -> Sums:
        return self._sums_of_drawn(part, content, self.sampling)

    def _measured(
        self, part: ErrorPart, experts: list[int], weights: torch.Tensor, types: Iterable[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        schemes = [scheme for scheme in self.candidates[part.name] if scheme.name in set(types)]
        energies, lost = [], {scheme.name: [] for scheme in schemes}
        for some in ranges(len(experts), self._experts_at_once(part.shape[-1])):
            rows, numbers = weights[as_slice(some)], experts[as_slice(some)]
            scale, moments = self._guidance(part, numbers)
            metric = moments if moments is not None else scale
            metric = (torch.ones(len(rows), rows.shape[-1]) if metric is None else metric).to(self.device)
            loss, here = loss_under(rows.shape, scale, moments, self.device), rows.to(self.device)
            energies.append(row_sums(here, metric, None).cpu())
            peak, name = float(rows.abs().max()), self.linears[part.name].modules[numbers[0]]
            for scheme in schemes:
                global_scale = nvfp4_global_scale(peak) if scheme.strategy == "tensor_group" else None
                options = {"global_scale": global_scale, "device": self.device, "name": name}
                encoded = encode_layers_under(loss, scheme, rows, **options)
                decoded = torch.stack([layer.decoded() for layer in encoded]).to(self.device)
                lost[scheme.name].append(row_sums(here - decoded, metric, None).cpu())
        return torch.cat(energies, 1), {name: torch.cat(sums, 1) for name, sums in lost.items()}

    def _guidance(self, part: ErrorPart, experts: list[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return importance and second moments that `export` encodes these experts with."""
        scale = importance(self.stats, part.name, part.shape)
        scale = None if scale is None else scale[experts]
        if self.moments is None:
            return scale, None
        return scale, hessian(self.moments, self.stats, part.name, part.shape, experts)

    def _bytes_in_memory(self, part: ErrorPart) -> int:
        num_experts, num_rows, columns = shape = stacked(part.shape)
        at_once = min(num_experts, self._experts_at_once(columns))
        moments = 0 if self.moments is None else _MOMENT_BYTES * at_once * columns**2
        kept = most_rows(shape, self.sampling) * columns
        return 4 * (num_rows * columns + num_experts * kept) + _SEARCHED_BYTES * at_once * kept + moments


def scheme_formats(checkpoint: LinearCheckpoint, candidates: Mapping[str, Sequence[Scheme]]) -> Formats:
    """Return the schemes that every linear layer has as candidates, by its name."""
    return {linear.name: (linear, dict.fromkeys(candidates[linear.name], ())) for linear in checkpoint.linears}
