"""Builds the error table: encodes every tensor in every candidate type, decodes it, and measures what was lost.

One pass over the model, a few experts in memory at a time. The encoder sees the same importance as `export` will: when
`export` is told to use the same encoder, the measured bytes are the bytes that ship. Its default is another one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar, Protocol

import torch

from dynquant.analysis.errors.sums import ErrorJournal, ErrorSums, SumNumbers, Sums
from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.calibration.importance import importance
from dynquant.calibration.statistics import CalibrationStats, InputStats
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import layer_of, role_of
from dynquant.checkpoints.tensor_source import TensorInfo
from dynquant.encoding.interface import Encoder
from dynquant.encoding.parts import as_slice, ranges
from dynquant.encoding.store import EncodedStore
from dynquant.families.linear_layers import LinearLayer
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES, QuantType, fit_to_row
from dynquant.formats.storage_format import StorageFormat
from dynquant.recipes.presets import is_quantizable
from dynquant.session import Progress, ignore_progress

Formats = Mapping[str, tuple[TensorInfo | LinearLayer, Mapping[StorageFormat, tuple[str, ...]]]]
"""Name -> its tensor, and the formats that this is measured in, each with the wanted types that lead to it."""


@dataclass(frozen=True)
class ErrorPart:
    """Unit of measuring: experts of the tensor `name` of `shape`, in all their types."""

    name: str
    shape: tuple[int, ...]
    experts: range
    types: tuple[str, ...]

    @property
    def num_weights(self) -> int:
        return len(self.experts) * prod(self.shape[-2:])


Measure = Callable[[Iterable[ErrorPart]], Iterator[tuple[ErrorPart, Sums]]]
"""Parts -> each with its sums, in any order."""


class Meter(Protocol):
    """Measures in this process what formats of one kind do to the tensors of `model`."""

    model: Model
    stats: CalibrationStats
    encoder_name: str
    weights_in_memory: int
    """Largest number of weights in a group of experts that are loaded together."""

    def formats(self, type_names: Sequence[str]) -> Formats:
        """Return what is measured where these types are wanted."""

    def sums(self, part: ErrorPart, on_format: Callable[[], None]) -> Sums:
        """Measure a part; `on_format` is called after each format."""


@dataclass(frozen=True)
class ErrorMeter:
    """Measures quant types."""

    model: Model
    stats: CalibrationStats
    encoder: Encoder
    threads: int | None = None
    store: EncodedStore | None = None
    """Blocks of the same encoder are taken from it and kept there; without one they are forgotten."""

    # 8 MB of float32: glibc returns every array of 32 MB to the system, and page faults then take longer than all else
    # for types that are quickly encoded.
    weights_in_memory: ClassVar[int] = 1 << 21

    @property
    def encoder_name(self) -> str:
        return self.encoder.name

    def formats(self, type_names: Sequence[str]) -> Formats:
        return tensor_formats(self.model, self.stats, type_names)

    def sums(self, part: ErrorPart, on_format: Callable[[], None] = lambda: None) -> Sums:
        columns, experts, source = part.shape[-1], as_slice(part.experts), self.model.source
        is_stacked = len(part.shape) > 2
        # [E, R, C]
        weights = torch.stack([source.load(part.name, *([expert] if is_stacked else [])) for expert in part.experts])
        scale = importance(self.stats, part.name, part.shape)  # [E or 1, C] or None
        if scale is not None:
            scale = scale[0] if len(scale) == 1 else scale[experts]
        weighting = torch.ones(len(weights), columns) if scale is None else scale.expand(len(weights), columns)
        samples = _samples(self.stats.input_of(part.name), experts, columns)
        sums = {}
        for candidate in (QUANT_TYPES[name] for name in part.types):
            if self.store is None:
                packed = self.encoder.encode(candidate, weights, scale, threads=self.threads, name=part.name)
            else:
                whole = self.store.packed(part.name, candidate.name)
                packed = whole[experts] if whole.ndim == 3 else whole.unsqueeze(0)
            decoded = decode(candidate, packed, tuple(weights.shape))
            sums[candidate.name] = ErrorSums.measured(weights, decoded, weighting, samples)
            on_format()
        return sums


def _measured_parts(
    meter: Meter,
    parts: Sequence[ErrorPart],
    journal: ErrorJournal | None,
    elsewhere: Measure | None,
    progress: Progress,
) -> Iterator[tuple[ErrorPart, Sums]]:
    """Yield every part with its sums: those of the journal first, then those that are measured and added to it."""
    total, done = sum(part.num_weights * len(part.types) for part in parts), 0

    def advance(part: ErrorPart, num_types: int) -> None:
        nonlocal done
        done += part.num_weights * num_types
        progress("measuring errors", done, total, unit="weights", tensor=part.name)

    def measured_here(missing: Iterable[ErrorPart]) -> Iterator[tuple[ErrorPart, Sums]]:
        for part in missing:
            advance(part, 0)
            yield part, meter.sums(part, partial(advance, part, 1))

    missing = []
    for part in parts:
        sums = journal.get(part.name, part.experts, part.types) if journal else None
        if sums is None:
            missing.append(part)
        else:
            advance(part, len(part.types))
            yield part, sums
    for part, sums in (elsewhere or measured_here)(missing):
        if elsewhere:
            advance(part, len(part.types))
        if journal:
            journal.add(part.name, part.experts, sums)
        yield part, sums


def build_error_table(
    meter: Meter,
    type_names: Sequence[str],
    *,
    stats_hash: str,
    journal: ErrorJournal | None = None,
    elsewhere: Measure | None = None,
    progress: Progress = ignore_progress,
) -> ErrorTable:
    """Measure every tensor in the formats that `type_names` lead to.

    Parts that `journal` holds are not measured again, others are added to it. `elsewhere` measures them on other
    machines, with neither threads nor store of `meter`.

    Raises:
        PlanError: the journal cannot be written.
        StatsError: the statistics belong to another checkpoint.
        EncodeError: a weight is NaN or infinite; the tensor is named.
    """
    meter.stats.check_belongs_to(meter.model.fingerprint, meter.model.name)
    formats = meter.formats(type_names)
    parts = {
        name: _parts_of(name, tensor.shape, [candidate.name for candidate in candidates], meter.weights_in_memory)
        for name, (tensor, candidates) in formats.items()
    }
    every_part = [part for of_tensor in parts.values() for part in of_tensor]
    # Sums wait as numbers for the last part of their tensor: tensors of a few bytes would lie between the large ones
    # for as long, and memory that is freed around them is not joined. A 14 GB checkpoint took 23 GB.
    waiting: dict[str, dict[ErrorPart, dict[str, SumNumbers]]] = {name: {} for name in parts}
    rows = {}
    for measured, part_sums in _measured_parts(meter, every_part, journal, elsewhere, progress):
        name = measured.name
        waiting[name][measured] = {type_name: sums.numbers() for type_name, sums in part_sums.items()}
        if len(waiting[name]) < len(parts[name]):
            continue
        numbers, (tensor, candidates) = waiting.pop(name), formats[name]
        rows[name] = []
        for candidate, wanted in candidates.items():
            # Parts come in any order; experts follow one another in theirs.
            sums = ErrorSums.joined(
                ErrorSums.from_numbers(numbers[part][candidate.name], len(part.experts)) for part in parts[name]
            )
            rows[name].append(_measured_row(tensor, candidate, wanted, sums, meter.stats))
    in_order = [row for name in formats for row in rows[name]]
    return _table_of(meter.model, in_order, type_names, stats_hash=stats_hash, encoder=meter.encoder_name)


def unmeasured_table(model: Model, formats: Formats, type_names: Sequence[str]) -> ErrorTable:
    """Return the rows that `build_error_table` would measure, with their bytes alone: every error is 0."""
    no_errors = {"relative_rms": 0.0, "weighted_error": 0.0, "weighted_energy": 0.0}
    rows = [
        ErrorRow(**_identity(tensor, candidate, wanted), **no_errors)
        for tensor, candidates in formats.values()
        for candidate, wanted in candidates.items()
    ]
    return _table_of(model, rows, type_names)


def _table_of(
    model: Model, rows: Iterable[ErrorRow], type_names: Sequence[str], *, stats_hash: str = "", encoder: str = ""
) -> ErrorTable:
    """Return the table of rows that were measured on `model`."""
    return ErrorTable(
        model=model.name,
        fingerprint=model.fingerprint,
        stats_hash=stats_hash,
        encoder=encoder,
        types=tuple(type_names),
        rows=tuple(rows),
    )


def tensor_formats(model: Model, stats: CalibrationStats | None, type_names: Sequence[str]) -> Formats:
    """Return the stored types that wanted types lead to, of every quantizable tensor.

    Types that need statistics are left out for a tensor that has none; without `stats`, all are taken to have some.
    The checkpoint's own float type is always one: it loses nothing.
    """
    formats = {}
    for info in map(model.source.info, model.source.names()):
        if not is_quantizable(info.name, info.shape):
            continue
        has_stats = stats is None or stats.input_of(info.name) is not None
        candidates: dict[QuantType, tuple[str, ...]] = {}
        for name in (*type_names, info.dtype if info.dtype in ("F32", "F16", "BF16") else "F16"):
            stored, _ = fit_to_row(QUANT_TYPES[name], info.shape[-1])
            if has_stats or not stored.needs_imatrix:
                candidates[stored] = (*candidates.get(stored, ()), name)
        formats[info.name] = (info, candidates)
    return formats


def _parts_of(name: str, shape: tuple[int, ...], types: Sequence[str], max_weights: int) -> list[ErrorPart]:
    """Group the experts that are in memory together, of at most `max_weights` or one alone; a matrix is one expert."""
    count, step = prod(shape[:-2]), max(1, max_weights // prod(shape[-2:]))
    return [ErrorPart(name, shape, experts, tuple(types)) for experts in ranges(count, step)]


def _samples(inputs: InputStats | None, experts: slice, columns: int) -> torch.Tensor | None:
    """Return held-back inputs float32 [E, S, C] with unfilled rows zero, or None when there are none of this width."""
    if inputs is None or inputs.samples is None or inputs.samples.shape[-1] != columns:
        return None
    if len(inputs.samples) == 1:
        experts = slice(None)  # all experts share the inputs of their layer
    samples, counts = inputs.samples[experts], inputs.sample_counts[experts]
    filled = torch.arange(samples.shape[1]) < counts.unsqueeze(1)  # [E, S]
    return samples.float() * filled.unsqueeze(-1)


def _measured_row(
    info: TensorInfo | LinearLayer,
    candidate: StorageFormat,
    wanted: tuple[str, ...],
    sums: ErrorSums,
    stats: CalibrationStats,
) -> ErrorRow:
    """Return the row of a tensor in a format, from the sums of all its parts; see `table` for what is in it."""
    inputs = stats.input_of(info.name)
    squared, weighted = sums.squared, sums.weighted
    activation, per_expert_activation = None, ()
    counts = None if inputs is None else inputs.sample_counts
    if sums.outputs is not None and counts is not None and counts.any():
        outputs = sums.outputs / counts.clamp_min(1).unsqueeze(1)
        ratios = (outputs[:, 0] / outputs[:, 1]).sqrt()
        per_expert_activation = tuple(None if torch.isnan(r) else float(r) for r in ratios)
        activation = _ratio_of(_routed_mean(outputs, inputs)).sqrt().item()
    return ErrorRow(
        **_identity(info, candidate, wanted),
        relative_rms=_ratio_of(squared.sum(0)).sqrt().item(),
        weighted_error=_ratio_of(_routed_mean(weighted, inputs)).item(),
        weighted_energy=float(_routed_mean(weighted, inputs)[1]),
        activation_error=activation,
        per_expert_weighted_error=tuple(float(_ratio_of(pair)) for pair in weighted) if len(weighted) > 1 else (),
        per_expert_activation_error=per_expert_activation if len(per_expert_activation) > 1 else (),
    )


def _identity(info: TensorInfo | LinearLayer, candidate: StorageFormat, wanted: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a row that need no measuring."""
    return {
        "name": info.name,
        "role": role_of(info.name),
        "layer": layer_of(info.name),
        "type": candidate.name,
        "wanted": tuple(name for name in wanted if name != candidate.name),
        "bytes": candidate.tensor_bytes(info.shape),
    }


def _routed_mean(per_expert: torch.Tensor, inputs: InputStats | None) -> torch.Tensor:
    """Return the mean of [E, 2] over experts, each weighted by the share of tokens it received."""
    if inputs is None or len(inputs.counts) != len(per_expert) or not int(inputs.counts.sum()):
        return per_expert.mean(0)
    share = inputs.counts.double() / inputs.counts.sum()
    return (per_expert * share.unsqueeze(1)).sum(0)


def _ratio_of(error_and_energy: torch.Tensor) -> torch.Tensor:
    """Return error over energy, from [2]; 0 where there is no energy."""
    error, energy = error_and_energy
    return error / energy if float(energy) > 0 else torch.zeros((), dtype=torch.float64)
