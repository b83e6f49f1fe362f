"""Builds the error table: encodes every tensor in every candidate type, decodes it, and measures what was lost.

One pass over the model, a few experts in memory at a time. The encoder sees the same importance as `export` will, so
the measured bytes are the bytes that ship.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from dynquant.analysis.error_table import ErrorRow, ErrorTable
from dynquant.architecture import layer_of, role_of
from dynquant.codecs import decode
from dynquant.codecs.encoder import Encoder
from dynquant.encoded_store import EncodedStore
from dynquant.importance import importance
from dynquant.model import Model
from dynquant.presets import is_quantizable
from dynquant.progress import Progress, ignore_progress
from dynquant.quant_types import QUANT_TYPES, QuantType, fit_to_row
from dynquant.statistics import CalibrationStats, InputStats
from dynquant.tensor_source import TensorInfo

WEIGHTS_IN_MEMORY = 1 << 23
"""Experts are taken in groups of at most this many weights (32 MB of float32, which the allocator uses again)."""

_ROWS_AT_ONCE = 1 << 22
"""Weights of rows whose errors are computed at a time."""


@dataclass
class _Sums:
    """Squared errors and energies of one tensor in one type, one entry an expert."""

    squared: list[torch.Tensor] = field(default_factory=list)  # error, energy
    weighted: list[torch.Tensor] = field(default_factory=list)  # error, energy
    outputs: list[torch.Tensor] = field(default_factory=list)  # error, energy

    def add(self, weights: torch.Tensor, decoded: torch.Tensor, scale: torch.Tensor, samples: torch.Tensor | None):
        """weights, decoded [E, R, C]; scale [E, C]; samples [E, S, C] or None."""
        count, _, columns = weights.shape
        step = max(1, _ROWS_AT_ONCE // (count * columns))
        squared, weighted, outputs = (torch.zeros(count, 2, dtype=torch.float64) for _ in range(3))
        for kept, found in zip(weights.split(step, 1), decoded.split(step, 1), strict=True):
            lost = kept - found
            squared += torch.stack([_energy(lost), _energy(kept)], -1)
            weighted += torch.stack([_energy(lost, scale), _energy(kept, scale)], -1)
            if samples is not None:
                outputs += torch.stack([_energy(samples @ part.transpose(1, 2)) for part in (lost, kept)], -1)
        self.squared.append(squared)
        self.weighted.append(weighted)
        if samples is not None:
            self.outputs.append(outputs)


def _energy(matrices: torch.Tensor, column_scale: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of squares of each matrix in [E, R, C], columns weighted by [E, C]; float64 [E]."""
    columns = matrices.square().sum(dim=1, dtype=torch.float64)  # [E, C]
    return (columns if column_scale is None else columns * column_scale.double()).sum(-1)


def build_error_table(
    model: Model,
    stats: CalibrationStats,
    type_names: Sequence[str],
    encoder: Encoder,
    *,
    stats_hash: str,
    threads: int | None = None,
    store: EncodedStore | None = None,
    progress: Progress | None = None,
) -> ErrorTable:
    """Measure every quantizable tensor in every type of `type_names` that its row length and statistics allow.

    Blocks are taken from `store`, of the same encoder, and kept there; without one they are forgotten.

    Raises:
        StatsError: the statistics belong to another checkpoint.
        EncodeError: a weight is NaN or infinite; the tensor is named.
    """
    stats.check_belongs_to(model.fingerprint, model.name)
    infos = [info for info in map(model.source.info, model.source.names()) if is_quantizable(info.name, info.shape)]
    candidates = {info: _candidates(info, type_names, stats) for info in infos}
    total = sum(info.numel * len(found) for info, found in candidates.items())
    rows: list[ErrorRow] = []
    done = 0
    report = progress or ignore_progress

    def measured(info: TensorInfo, num_weights: int) -> None:
        nonlocal done
        done += num_weights
        report("measuring errors", done, total, unit="weights", tensor=info.name)

    for info, found in candidates.items():
        measured(info, 0)
        rows += _measure(model, stats, info, found, encoder, threads, store, partial(measured, info))
    return ErrorTable(
        model=model.name,
        fingerprint=model.fingerprint,
        stats_hash=stats_hash,
        encoder=encoder.name,
        types=tuple(type_names),
        rows=tuple(rows),
    )


def _candidates(
    info: TensorInfo, type_names: Sequence[str], stats: CalibrationStats
) -> dict[QuantType, tuple[str, ...]]:
    """Stored type -> the wanted types that lead to it, without those that need statistics the tensor does not have.

    The checkpoint's own float type is always one: it loses nothing.
    """
    has_stats = stats.input_of(info.name) is not None
    found: dict[QuantType, tuple[str, ...]] = {}
    for name in (*type_names, info.dtype if info.dtype in ("F32", "F16", "BF16") else "F16"):
        stored, _ = fit_to_row(QUANT_TYPES[name], info.shape[-1])
        if has_stats or not stored.needs_imatrix:
            found[stored] = (*found.get(stored, ()), name)
    return found


def _measure(
    model: Model,
    stats: CalibrationStats,
    info: TensorInfo,
    candidates: Mapping[QuantType, tuple[str, ...]],
    encoder: Encoder,
    threads: int | None,
    store: EncodedStore | None,
    on_weights: Callable[[int], None],
) -> Iterator[ErrorRow]:
    columns = info.shape[-1]
    scale = importance(stats, info.name, info.shape)  # [E or 1, C] or None
    inputs = stats.input_of(info.name)
    sums = {candidate.name: _Sums() for candidate in candidates}
    for experts, weights in expert_groups(model, info):
        group_scale = None if scale is None else (scale[0] if len(scale) == 1 else scale[experts])
        samples = _samples(inputs, experts, columns)
        for candidate in candidates:
            if store is None:
                packed = encoder.encode(candidate, weights, group_scale, threads=threads, name=info.name)
            else:
                whole = store.packed(info.name, candidate.name)
                packed = whole[experts] if whole.ndim == 3 else whole.unsqueeze(0)
            decoded = decode(candidate, packed, tuple(weights.shape))
            ones = torch.ones(len(weights), columns)
            weighting = ones if group_scale is None else group_scale.expand(len(weights), columns)
            sums[candidate.name].add(weights, decoded, weighting, samples)
            on_weights(weights.numel())
    for candidate, wanted in candidates.items():
        yield _row(info, candidate, wanted, sums[candidate.name], inputs)


def expert_groups(model: Model, info: TensorInfo) -> Iterator[tuple[slice, torch.Tensor]]:
    """A tensor as float32 [E, R, C], in groups of experts that fit in memory; a matrix is one expert."""
    if len(info.shape) == 2:
        yield slice(0, 1), model.source.load(info.name).unsqueeze(0)
        return
    count = info.shape[0]
    step = max(1, WEIGHTS_IN_MEMORY // (info.shape[-2] * info.shape[-1]))
    for start in range(0, count, step):
        experts = range(start, min(start + step, count))
        weights = torch.stack([model.source.load(info.name, expert) for expert in experts])
        yield slice(start, experts.stop), weights


def _samples(inputs: InputStats | None, experts: slice, columns: int) -> torch.Tensor | None:
    """Held-back inputs float32 [E, S, C] with unfilled rows zero, or None when there are none of this width."""
    if inputs is None or inputs.samples is None or inputs.samples.shape[-1] != columns:
        return None
    samples = inputs.samples if len(inputs.samples) == 1 else inputs.samples[experts]
    counts = inputs.sample_counts if len(inputs.samples) == 1 else inputs.sample_counts[experts]
    filled = torch.arange(samples.shape[1]) < counts.unsqueeze(1)  # [E, S]
    return samples.float() * filled.unsqueeze(-1)


def _row(
    info: TensorInfo, candidate: QuantType, wanted: tuple[str, ...], sums: _Sums, inputs: InputStats | None
) -> ErrorRow:
    squared, weighted = torch.cat(sums.squared), torch.cat(sums.weighted)  # [E, 2]
    activation, per_expert_activation = None, ()
    if sums.outputs and inputs is not None and inputs.sample_counts is not None and inputs.sample_counts.any():
        outputs = torch.cat(sums.outputs) / inputs.sample_counts.clamp_min(1).unsqueeze(1)
        ratios = (outputs[:, 0] / outputs[:, 1]).sqrt()
        per_expert_activation = tuple(None if torch.isnan(r) else float(r) for r in ratios)
        activation = _ratio(_routed_mean(outputs, inputs)).sqrt().item()
    return ErrorRow(
        name=info.name,
        role=role_of(info.name),
        layer=layer_of(info.name),
        type=candidate.name,
        wanted=tuple(name for name in wanted if name != candidate.name),
        bytes=candidate.tensor_bytes(info.shape),
        relative_rms=_ratio(squared.sum(0)).sqrt().item(),
        weighted_error=_ratio(_routed_mean(weighted, inputs)).item(),
        weighted_energy=float(_routed_mean(weighted, inputs)[1]),
        activation_error=activation,
        per_expert_weighted_error=_per_expert(weighted),
        per_expert_activation_error=per_expert_activation if len(per_expert_activation) > 1 else (),
    )


def _routed_mean(per_expert: torch.Tensor, inputs: InputStats | None) -> torch.Tensor:
    """Mean of [E, 2] over experts, each weighted by the share of tokens it received."""
    if inputs is None or len(inputs.counts) != len(per_expert) or not int(inputs.counts.sum()):
        return per_expert.mean(0)
    share = inputs.counts.double() / inputs.counts.sum()
    return (per_expert * share.unsqueeze(1)).sum(0)


def _ratio(error_and_energy: torch.Tensor) -> torch.Tensor:
    error, energy = error_and_energy
    return error / energy if float(energy) > 0 else torch.zeros((), dtype=torch.float64)


def _per_expert(weighted: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(_ratio(pair)) for pair in weighted) if len(weighted) > 1 else ()
