"""Builds the error table: encodes every tensor in every candidate type, decodes it, and measures what was lost.

One pass over the model, a few experts in memory at a time. The encoder sees the same importance as `export` will: when
`export` is told to use the same encoder, the measured bytes are the bytes that ship. Its default is another one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan, prod
from typing import Any, ClassVar

import torch

from dynquant.analysis.errors.sums import ErrorJournal, ErrorPart, ErrorSums, Sums
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
from dynquant.formats.checksum import checksum
from dynquant.formats.quant_types import QUANT_TYPES, QuantType, fit_to_row
from dynquant.formats.storage_format import StorageFormat
from dynquant.recipes.presets import is_quantizable
from dynquant.session import Progress, ignore_progress

Formats = Mapping[str, tuple[TensorInfo | LinearLayer, Mapping[StorageFormat, tuple[str, ...]]]]
"""Name -> its tensor, and the formats that this is measured in, each with the candidate types that lead to it."""
Measure = Callable[[Iterable[ErrorPart]], Iterator[tuple[ErrorPart, Sums]]]  # parts -> each with its sums, in any order


@dataclass(frozen=True)
class Meter(ABC):
    """Measures in this process what formats of one kind do to the tensors of `model`."""

    model: Model
    stats: CalibrationStats
    weights_in_memory: ClassVar[int]  # largest number of weights in a group of experts that are loaded together
    encoder_name: ClassVar[str]

    @abstractmethod
    def formats(self, type_names: Sequence[str]) -> Formats:
        """Return what is measured where these types are candidates."""

    @abstractmethod
    def load(self, part: ErrorPart) -> torch.Tensor:
        """Return the weights of a part, float32 [E, R, C]."""

    def sampled(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the rows that are measured, of weights [E, R, C]; all of them where nothing else is said."""
        return weights

    @abstractmethod
    def decoded(
        self, part: ErrorPart, weights: torch.Tensor, scale: torch.Tensor | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each of the part's types and what decoding gives after encoding under the importance `scale` [E, C]."""

    def samples(self, part: ErrorPart) -> torch.Tensor | None:
        """Return held-back inputs of a part, float32 [E, S, C], or None when its outputs are not measured."""
        return None

    def sums(self, part: ErrorPart, on_format: Callable[[], None] = lambda: None) -> Sums:
        """Measure a part; `on_format` is called after each format."""
        whole, scale = self.load(part), importance(self.stats, part.name, part.shape)
        identity, weights = checksum(whole, part.experts.start * whole.shape[1]), self.sampled(whole)
        scale = None if scale is None else scale[as_slice(part.experts)]
        weighting = torch.ones(len(weights), part.shape[-1]) if scale is None else scale
        samples, sums = self.samples(part), {}
        for type_name, decoded in self.decoded(part, weights, scale):
            sums[type_name] = ErrorSums.measured(weights, decoded, weighting, samples)._replace(checksum=identity)
            on_format()
        return sums


@dataclass(frozen=True)
class ErrorMeter(Meter):
    """Measures quant types."""

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

    def load(self, part: ErrorPart) -> torch.Tensor:
        pieces = part.experts if len(part.shape) > 2 else [None]  # a matrix is loaded whole
        return torch.stack([self.model.source.load(part.name, piece) for piece in pieces])

    def samples(self, part: ErrorPart) -> torch.Tensor | None:
        inputs = self.stats.input_of(part.name)
        if inputs is None or inputs.samples is None or inputs.samples.shape[-1] != part.shape[-1]:
            return None
        experts = slice(None) if len(inputs.samples) == 1 else as_slice(part.experts)  # one row: all experts share it
        samples, counts = inputs.samples[experts], inputs.sample_counts[experts]
        filled = torch.arange(samples.shape[1]) < counts.unsqueeze(1)  # [E, S]; rows that are not are zeros
        return samples.float() * filled.unsqueeze(-1)

    def decoded(
        self, part: ErrorPart, weights: torch.Tensor, scale: torch.Tensor | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for candidate in (QUANT_TYPES[name] for name in part.types):
            if self.store is None:
                packed = self.encoder.encode(candidate, weights, scale, threads=self.threads, name=part.name)
            else:
                whole = self.store.packed(part.name, candidate.name)
                packed = whole[as_slice(part.experts)] if whole.ndim == 3 else whole.unsqueeze(0)
            yield candidate.name, decode(candidate, packed, tuple(weights.shape))


def _measured_parts(
    meter: Meter, parts: list[ErrorPart], journal: ErrorJournal | None, elsewhere: Measure | None, progress: Progress
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
        sums = journal.sums_of(part) if journal else None
        if sums is None:
            missing.append(part)
        else:
            advance(part, len(part.types))
            yield part, sums
    for part, sums in (elsewhere or measured_here)(missing):
        if elsewhere:  # workers tell of whole parts alone
            advance(part, len(part.types))
        if journal:
            journal.keep(part, sums)
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
    meter.stats.check_belongs_to(meter.model.fingerprint, meter.model.name, meter.model.settings)
    formats = meter.formats(type_names)
    parts = {name: _parts_of(name, *formats[name], meter.weights_in_memory) for name in formats}
    every_part = [part for of_tensor in parts.values() for part in of_tensor]
    waiting: dict[str, dict[ErrorPart, Sums]] = {name: {} for name in parts}
    rows, checksums = {}, {}
    for measured, part_sums in _measured_parts(meter, every_part, journal, elsewhere, progress):
        name = measured.name
        waiting[name][measured] = part_sums
        if len(waiting[name]) < len(parts[name]):
            continue
        sums, (tensor, candidates) = waiting.pop(name), formats[name]
        rows[name] = []
        for candidate, candidate_types in candidates.items():
            # Parts come in any order; experts follow one another in theirs.
            joined = ErrorSums.joined([sums[part][candidate.name] for part in parts[name]])
            if joined.checksum is not None:
                checksums[name] = f"{joined.checksum:016x}"
            errors = _errors_of(joined, meter.stats.input_of(name))
            rows[name].append(_row(tensor, candidate, candidate_types, errors))
    in_order = (row for name in formats for row in rows[name])
    origin = {"stats_hash": stats_hash, "encoder": meter.encoder_name, "checksums": checksums}
    return _table_of(meter.model, in_order, type_names, **origin)


def unmeasured_table(model: Model, formats: Formats, type_names: Sequence[str]) -> ErrorTable:
    """Return the rows that `build_error_table` would measure, with their bytes alone: every error is 0."""
    no_errors = {"relative_rms": 0.0, "weighted_error": 0.0, "weighted_energy": 0.0}
    rows = (
        _row(tensor, candidate, candidate_types, no_errors)
        for tensor, candidates in formats.values()
        for candidate, candidate_types in candidates.items()
    )
    return _table_of(model, rows, type_names, stats_hash="", encoder="")


def _table_of(model: Model, rows: Iterable[ErrorRow], type_names: Sequence[str], **origin: Any) -> ErrorTable:
    types = tuple(type_names)
    return ErrorTable(model=model.name, fingerprint=model.fingerprint, types=types, rows=tuple(rows), **origin)


def tensor_formats(model: Model, stats: CalibrationStats | None, type_names: Sequence[str]) -> Formats:
    """Return the stored types that candidate types lead to, of every quantizable tensor.

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


def _parts_of(
    name: str, tensor: TensorInfo | LinearLayer, candidates: Iterable[StorageFormat], max_weights: int
) -> list[ErrorPart]:
    """Group the experts that are in memory together, of at most `max_weights` or one alone; a matrix is one expert."""
    shape, types = tensor.shape, tuple(candidate.name for candidate in candidates)
    step = max(1, max_weights // prod(shape[-2:]))
    return [ErrorPart(name, shape, experts, types) for experts in ranges(prod(shape[:-2]), step)]


def _row(
    info: TensorInfo | LinearLayer, candidate: StorageFormat, types: tuple[str, ...], errors: Mapping[str, Any]
) -> ErrorRow:
    """Return the row of a tensor in a format, to which the candidate types `types` lead."""
    place = {"name": info.name, "role": role_of(info.name), "layer": layer_of(info.name)}
    others = tuple(name for name in types if name != candidate.name)
    return ErrorRow(**place, type=candidate.name, wanted=others, bytes=candidate.tensor_bytes(info.shape), **errors)


def _errors_of(sums: ErrorSums, inputs: InputStats | None) -> dict[str, Any]:
    """Return the measured fields of a row, from the sums of all parts of a tensor; see `table` for what they are."""
    squared, weighted = (torch.tensor(of_weights, dtype=torch.float64) for of_weights in sums[:2])
    mean = _routed_mean(weighted, inputs)
    errors = {
        "relative_rms": _ratio_of(squared.sum(0)).sqrt().item(),
        "weighted_error": _ratio_of(mean).item(),
        "weighted_energy": float(mean[1]),
    }
    if len(weighted) > 1:
        errors["per_expert_weighted_error"] = tuple(float(_ratio_of(pair)) for pair in weighted)
    counts = None if inputs is None else inputs.sample_counts
    if sums.outputs is not None and counts is not None and counts.any():
        outputs = torch.tensor(sums.outputs, dtype=torch.float64) / counts.clamp_min(1).unsqueeze(1)  # per token
        errors["activation_error"] = _ratio_of(_routed_mean(outputs, inputs)).sqrt().item()
        if len(outputs) > 1:
            ratios = (outputs[:, 0] / outputs[:, 1]).sqrt().tolist()
            errors["per_expert_activation_error"] = tuple(None if isnan(ratio) else ratio for ratio in ratios)
    return errors


def _routed_mean(per_expert: torch.Tensor, inputs: InputStats | None) -> torch.Tensor:
    """Return the mean of [E, 2] over experts, each weighted by the share of tokens it received."""
    if inputs is None or len(inputs.counts) != len(per_expert) or not int(inputs.counts.sum()):
        return per_expert.mean(0)
    share = inputs.counts.double() / inputs.counts.sum()  # [E]
    return (per_expert * share.unsqueeze(1)).sum(0)


def _ratio_of(error_and_energy: torch.Tensor) -> torch.Tensor:
    """Return error over energy, from [2]; 0 where there is no energy."""
    error, energy = error_and_energy
    return error / energy if float(energy) > 0 else torch.zeros((), dtype=torch.float64)
