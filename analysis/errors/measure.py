"""Builds the error table: encodes tensors in every candidate type, decodes them, and measures what was lost.

One pass over the model. Of every tensor, rows are drawn and measured until the table is precise enough (`sampling`), or
all of them are, a few experts in memory at a time. The encoder sees the same importance and second moments as that of
`export` will, so that the measured bytes are those that ship.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan, prod
from typing import Any, ClassVar

import torch

from dynquant.analysis.errors.sampled_sums import SampledSums
from dynquant.analysis.errors.sampling import DrawnRows, Sampling, blocks_of, draw, most_rows, stacked
from dynquant.analysis.errors.sums import ErrorJournal, ErrorPart, ErrorSums, Sums, row_sums
from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.calibration.importance import importance
from dynquant.calibration.second_moments import SecondMoments, hessian
from dynquant.calibration.statistics import CalibrationStats, InputStats
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import layer_of, role_of
from dynquant.checkpoints.tensor_source import TensorInfo
from dynquant.encoding.ggml import is_known
from dynquant.encoding.interface import Encoder, check_finite
from dynquant.encoding.parts import BYTES_PER_MOMENT, TensorPart, as_slice, load_part, ranges
from dynquant.encoding.stream import holds_blocks
from dynquant.families.linear_layers import LinearLayer
from dynquant.formats import decode
from dynquant.formats.checksum import checksum
from dynquant.formats.quant_types import QUANT_TYPES, QuantType, candidates_for_row
from dynquant.formats.storage_format import StorageFormat
from dynquant.recipes.held_types import planned_matrices
from dynquant.resources import usable_cores
from dynquant.running.streaming.stream_memory import free_memory
from dynquant.session import Progress, ignore_progress
from dynquant.workers import can_fork, in_processes, side_by_side

Formats = Mapping[str, tuple[TensorInfo | LinearLayer, Mapping[StorageFormat, tuple[str, ...]]]]
"""Name -> its tensor, and the formats that this is measured in, each with the candidate types that lead to it."""
Measure = Callable[[Iterable[ErrorPart]], Iterator[tuple[ErrorPart, Sums]]]  # parts -> each with its sums, in any order

_CPU_HESSIAN_BYTES = 1 << 28
_GPU_HESSIAN_BYTES = 1 << 31
"""Second moments of the experts that are measured together, at least of one."""
_BLOCK_WEIGHTS = 1 << 25
"""Weights of a large matrix that are in memory while rows are drawn from it."""

_FEWEST_BYTES_AT_ONCE = 1 << 32
"""Memory of all parts that are read ahead or measured side by side, where half of what is free is less."""


@dataclass(frozen=True)
class Meter(ABC):
    """Measures in this process what formats of one kind do to the tensors of `model`."""

    model: Model
    stats: CalibrationStats
    threads: int | None = field(default=None, kw_only=True)
    """Cores that measure parts side by side, or threads that read ahead of a GPU."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The place where parts are measured."""

    @property
    @abstractmethod
    def origin(self) -> Mapping[str, Any]:
        """Fields of the table that say how it was measured."""

    @abstractmethod
    def formats(self, type_names: Sequence[str]) -> Formats:
        """Return what is measured where these types are candidates."""

    def parts(self, name: str, shape: tuple[int, ...], types: tuple[str, ...]) -> list[ErrorPart]:
        """Return what is measured together: a matrix or all experts, of which rows are drawn."""
        return [ErrorPart(name, shape, range(prod(shape[:-2])), types)]

    def measured(self, parts: Iterable[ErrorPart]) -> Iterator[tuple[ErrorPart, Sums]]:
        """Measure parts side by side; on a GPU one by one, while the next ones are read.

        Much of the work on a CPU is short steps in Python, so that it is done in processes, what takes longest first.
        But a large matrix of which every row is measured is cut into rows, for threads.
        """
        memory = {"cost": self._bytes_in_memory, "budget": max(_FEWEST_BYTES_AT_ONCE, free_memory() // 2)}
        if self.device.type == "cpu":
            parts, threads = list(parts), self.threads or usable_cores()
            in_copies = {part for part in parts if threads > 1 and can_fork() and self._is_for_one_core(part)}
            by_work = sorted(in_copies, key=lambda part: (-part.num_weights * len(part.types), part.name))
            yield from in_processes(self.sums, by_work, threads, **memory)
            rest = (part for part in parts if part not in in_copies)
            yield from side_by_side(lambda part: (part, self.sums(part)), rest, threads, **memory)
            return
        for part, content in side_by_side(lambda part: (part, self.read(part)), parts, self.threads, **memory):
            yield part, self.sums_of(part, content)

    def sums(self, part: ErrorPart) -> Sums:
        """Read and measure a part."""
        return self.sums_of(part, self.read(part))

    @abstractmethod
    def read(self, part: ErrorPart) -> "Content":
        """Read every weight of a part once, for its checksum, and keep those that may be measured."""

    @abstractmethod
    def sums_of(self, part: ErrorPart, content: "Content") -> Sums:
        """Measure a part that was read."""

    def _sums_of_drawn(self, part: ErrorPart, content: "Content", limits: Sampling) -> Sums:
        """Measure drawn rows of a tensor until they say enough of it."""
        assert isinstance(content.rows, DrawnRows)
        shares = _shares(self.stats.input_of(part.name), len(content.rows.experts))
        sampled = SampledSums(content.rows, shares, part.types, limits)
        for experts, weights, places in sampled.rounds():
            sampled.add(places, *self._measured(part, experts, weights, sampled.types_left))
        return sampled.sums(content.checksum)

    @abstractmethod
    def _measured(
        self, part: ErrorPart, experts: list[int], weights: torch.Tensor, types: Iterable[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the `row_sums` of rows [E, R, C] of these experts, and by type of what they lose."""

    @abstractmethod
    def _bytes_in_memory(self, part: ErrorPart) -> int:
        """Return what a part takes while it waits or is measured."""

    def _experts_at_once(self, columns: int) -> int:
        """Return how many experts have their second moments in memory together, where there are any."""
        limit = _CPU_HESSIAN_BYTES if self.device.type == "cpu" else _GPU_HESSIAN_BYTES
        return max(1, limit // (4 * columns**2))

    def _drawn(
        self, part: ErrorPart, blocks: Iterable[tuple[range, range, torch.Tensor]], limits: Sampling
    ) -> DrawnRows:
        """Draw rows of a tensor that `blocks` read once."""
        scale, shape = importance(self.stats, part.name, part.shape), stacked(part.shape)
        return draw(part.name, shape, blocks, scale, _shares(self.stats.input_of(part.name), shape[0]), limits)

    def _is_for_one_core(self, part: ErrorPart) -> bool:
        """Return whether nothing of the part is shared among cores."""
        return True


@dataclass(frozen=True)
class ErrorMeter(Meter):
    """Measures quant types, as `encoder` makes them under the importance of a tensor's inputs and their second moments.

    Every weight is measured, or with `sampling` rows that are drawn. Both use the same blocks as an export, where rows
    of an expert do not depend on each other: on a CPU to the bit, on a GPU to rounding.
    """

    encoder: Encoder
    moments: SecondMoments | None = None
    """For an encoder that uses them alone."""
    sampling: Sampling | None = None

    # 8 MB of float32: glibc returns every array of 32 MB to the system, and page faults then take longer than all else
    # for types that are quickly encoded.
    weights_in_memory: ClassVar[int] = 1 << 21

    @property
    def origin(self) -> Mapping[str, Any]:
        moments = "" if self.moments is None else self.moments.identity
        return {"encoder": self.encoder.name, "moments": moments, "seed": self.sampling and self.sampling.seed}

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def formats(self, type_names: Sequence[str]) -> Formats:
        return tensor_formats(self.model, self.stats, type_names)

    def parts(self, name: str, shape: tuple[int, ...], types: tuple[str, ...]) -> list[ErrorPart]:
        """Group the experts that are in memory together, at least one, where every weight is measured."""
        if self.sampling is not None:
            return super().parts(name, shape, types)
        step = max(1, self.weights_in_memory // prod(shape[-2:]))
        return [ErrorPart(name, shape, experts, types) for experts in ranges(prod(shape[:-2]), step)]

    def _is_for_one_core(self, part: ErrorPart) -> bool:
        return self.sampling is not None or part.num_weights <= self.weights_in_memory

    def _bytes_in_memory(self, part: ErrorPart) -> int:
        num_experts, num_rows, columns = shape = stacked(part.shape)
        hessians = 0
        if self.moments is not None and self.device.type == "cpu":  # a GPU holds those of one part
            hessians = BYTES_PER_MOMENT * columns**2 * min(num_experts, self._experts_at_once(columns))
        if self.sampling is None:
            return 4 * part.num_weights + hessians
        block = min(num_rows * columns, _BLOCK_WEIGHTS)
        return 4 * (block + num_experts * most_rows(shape, self.sampling) * columns) + hessians

    def read(self, part: ErrorPart) -> "Content":
        if self.sampling is None:
            pieces = part.experts if len(part.shape) > 2 else [None]  # a matrix is loaded whole
            weights = torch.stack([self.model.source.load(part.name, piece) for piece in pieces])
            return Content(checksum(weights, part.experts.start * part.shape[-2]), weights)
        total, shape = 0, stacked(part.shape)

        def blocks() -> Iterator[tuple[range, range, torch.Tensor]]:
            nonlocal total
            for experts, rows in blocks_of(shape, _BLOCK_WEIGHTS):
                block = TensorPart(part.name, part.shape, QUANT_TYPES["F32"], experts, rows)
                weights = load_part(self.model.source, block)
                check_finite(weights, name=part.name)
                total += checksum(weights, experts.start * shape[1] + rows.start)
                yield experts, rows, weights.reshape(1, len(rows), -1)

        drawn = self._drawn(part, blocks(), self.sampling)
        return Content(total % (1 << 64), drawn)

    def sums_of(self, part: ErrorPart, content: "Content") -> Sums:
        rows = content.rows
        if isinstance(rows, torch.Tensor):
            energies, lost = self._measured(part, list(part.experts), rows, part.types)
            energy = energies.sum(-1)
            return {name: ErrorSums.of(of_type.sum(-1), energy, content.checksum) for name, of_type in lost.items()}
        assert self.sampling is not None
        return self._sums_of_drawn(part, content, self.sampling)

    def _measured(
        self, part: ErrorPart, experts: list[int], weights: torch.Tensor, types: Iterable[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        count = len(experts) if self.moments is None else self._experts_at_once(part.shape[-1])
        energies, lost = [], {name: [] for name in types}
        for some in ranges(len(experts), count):
            rows, numbers = weights[as_slice(some)], experts[as_slice(some)]
            scale, hessian = self._guidance(part, numbers)
            samples, here = self._samples(part, numbers), rows.to(self.device)
            metric = self._metric(rows, scale, hessian)
            energies.append(row_sums(here, metric, samples).cpu())
            for name, sums in lost.items():
                if holds_blocks(self.model, part.name, QUANT_TYPES[name]):  # `export` copies them
                    sums.append(torch.zeros_like(energies[-1]))
                    continue
                options = {} if hessian is None or QUANT_TYPES[name].is_float else {"hessian": metric}
                packed = self.encoder.encode(QUANT_TYPES[name], here, scale, self.threads, name=part.name, **options)
                decoded = decode(name, packed.to(self.device), tuple(rows.shape))
                sums.append(row_sums(here - decoded, metric, samples).cpu())
        return torch.cat(energies, 1), {name: torch.cat(sums, 1) for name, sums in lost.items()}

    def sums_of_blocks(
        self, part: TensorPart, weights: torch.Tensor, packed: torch.Tensor, hessian: torch.Tensor | None
    ) -> ErrorSums:
        """Return the sums of a part that `export` encoded to `packed` under these second moments."""
        experts = list(part.experts)
        rows = weights.reshape(len(experts), len(part.rows), -1).to(self.device)
        scale = importance(self.stats, part.name, part.shape)
        metric = self._metric(rows, None if scale is None else scale[experts], hessian)
        samples, lost = self._samples(part, experts), decode(part.quant_type.name, packed.to(self.device), rows.shape)
        of_rows = (row_sums(each, metric, samples).sum(-1).cpu() for each in (lost.sub_(rows), rows))
        return ErrorSums.of(*of_rows, checksum=None)

    def _metric(self, rows: torch.Tensor, scale: torch.Tensor | None, hessian: torch.Tensor | None) -> torch.Tensor:
        """Return what errors of rows [E, R, C] are weighed by: second moments, else importance, else nothing."""
        metric = hessian if hessian is not None else scale
        return (torch.ones(len(rows), rows.shape[-1]) if metric is None else metric).to(self.device)

    def _guidance(self, part: ErrorPart, experts: list[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return importance and second moments that `export` encodes these experts with."""
        scale = importance(self.stats, part.name, part.shape)
        scale = None if scale is None else scale[experts]
        if self.moments is None:
            return scale, None
        return scale, hessian(self.moments, self.stats, part.name, part.shape, experts)

    def _samples(self, part: ErrorPart | TensorPart, experts: list[int]) -> torch.Tensor | None:
        """Return held-back inputs of experts, float32 [E or 1, S, C]; None when the part's outputs are not measured."""
        inputs = self.stats.input_of(part.name)
        if inputs is None or inputs.samples is None or inputs.samples.shape[-1] != part.shape[-1]:
            return None
        chosen = [0] if len(inputs.samples) == 1 else experts  # one row: all experts share it
        samples, counts = inputs.samples[chosen], inputs.sample_counts[chosen]
        filled = torch.arange(samples.shape[1]) < counts.unsqueeze(1)  # [E, S]; rows that are not are zeros
        return (samples.float() * filled.unsqueeze(-1)).to(self.device)


@dataclass(frozen=True)
class Content:
    """A part in memory: all its weights, or drawn rows."""

    checksum: int
    rows: torch.Tensor | DrawnRows


def _measured_parts(
    meter: Meter, parts: list[ErrorPart], journal: ErrorJournal | None, elsewhere: Measure | None, progress: Progress
) -> Iterator[tuple[ErrorPart, Sums]]:
    """Yield every part with its sums: those of the journal first, then those that are measured and added to it."""
    total, done = sum(part.num_weights * len(part.types) for part in parts), 0

    def advance(part: ErrorPart, *, resumed: bool = False) -> None:
        nonlocal done
        done += part.num_weights * len(part.types)
        progress("measuring errors", done, total, unit="weights", tensor=part.name, resumed=resumed)

    progress("measuring errors", 0, total, unit="weights")
    missing = []
    for part in parts:
        sums = journal.sums_of(part) if journal else None
        if sums is None:
            missing.append(part)
        else:
            advance(part, resumed=True)
            yield part, sums
    for part, sums in (elsewhere or meter.measured)(missing):
        advance(part)
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
    parts = {}
    for name, (tensor, candidates) in formats.items():
        parts[name] = meter.parts(name, tensor.shape, tuple(candidate.name for candidate in candidates))
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
            errors = errors_of(joined, meter.stats.input_of(name), prod(tensor.shape[:-2]))
            rows[name].append(_row(tensor, candidate, candidate_types, errors))
    in_order = (row for name in formats for row in rows[name])
    checksums = {name: checksums[name] for name in formats if name in checksums}  # workers are done in any order
    origin = {"stats_hash": stats_hash, "checksums": checksums, **meter.origin}
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
    """Return the stored types that candidate types lead to, of every matrix whose type costs decide.

    Types that need statistics are left out for a tensor that has none; without `stats`, those that read an
    input are taken to have some.
    The checkpoint's own float type is always one: it loses nothing. A candidate that does not fit the rows leads to
    what llama.cpp stores in its place, and to Q2_0 or Q1_0 where that is nearer in bits.
    """
    formats = {}
    for info in map(model.source.info, planned_matrices(model)):
        has_stats = model.reads_input(info.name) if stats is None else stats.input_of(info.name) is not None
        candidates: dict[QuantType, tuple[str, ...]] = {}
        for name in (*type_names, info.float_type):
            for stored in candidates_for_row(QUANT_TYPES[name], info.shape[-1]):
                if is_known(stored) and (has_stats or not stored.needs_imatrix):
                    candidates[stored] = (*candidates.get(stored, ()), name)
        formats[info.name] = (info, candidates)
    return formats


def _row(
    info: TensorInfo | LinearLayer, candidate: StorageFormat, types: tuple[str, ...], errors: Mapping[str, Any]
) -> ErrorRow:
    """Return the row of a tensor in a format, to which the candidate types `types` lead."""
    place = {"name": info.name, "role": role_of(info.name), "layer": layer_of(info.name)}
    others = tuple(name for name in types if name != candidate.name)
    return ErrorRow(**place, type=candidate.name, stands_for=others, bytes=candidate.tensor_bytes(info.shape), **errors)


def errors_of(sums: ErrorSums, inputs: InputStats | None, num_experts: int) -> dict[str, Any]:
    """Return the measured fields of a row, from the sums of all parts of a tensor; see `table` for what they are."""
    squared, weighted = (torch.tensor(of_weights, dtype=torch.float64) for of_weights in sums[:2])
    experts, stands_for = list(range(num_experts)), torch.ones(num_experts, 1, dtype=torch.float64)
    if sums.sample is not None:
        experts, stands_for = sums.sample.experts, 1 / torch.tensor(sums.sample.chances, dtype=torch.float64)[:, None]
    counted = _shares(inputs, num_experts)[experts].unsqueeze(1) * stands_for
    mean = (weighted * counted).sum(0)
    errors = {
        "relative_rms": _ratio_of((squared * stands_for).sum(0)).sqrt().item(),
        "weighted_error": _ratio_of(mean).item(),
        "weighted_error_se": None if sums.sample is None else sums.sample.weighted_error_se,
        "weighted_energy": float(mean[1]),
    }
    if num_experts > 1:
        of_experts = dict(zip(experts, (float(_ratio_of(pair)) for pair in weighted), strict=True))
        errors["per_expert_weighted_error"] = tuple(map(of_experts.get, range(num_experts)))
    if sums.outputs is None or inputs is None:
        return errors
    counts = inputs.sample_counts.expand(num_experts)[experts]
    if counts.any():
        outputs = torch.tensor(sums.outputs, dtype=torch.float64) / counts.clamp_min(1).unsqueeze(1)  # per token
        errors["activation_error"] = _ratio_of((outputs * counted).sum(0)).sqrt().item()
        if num_experts > 1:
            ratios = (outputs[:, 0] / outputs[:, 1]).sqrt().tolist()
            ratio_of = {expert: ratio for expert, ratio in zip(experts, ratios, strict=True) if not isnan(ratio)}
            errors["per_expert_activation_error"] = tuple(map(ratio_of.get, range(num_experts)))
    return errors


def _shares(inputs: InputStats | None, num_experts: int) -> torch.Tensor:
    """Return the share of tokens that each expert received, float64 [E]; even ones where they were not counted."""
    if inputs is None or len(inputs.counts) != num_experts or not int(inputs.counts.sum()):
        return torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)
    return inputs.counts.double() / inputs.counts.sum()


def _ratio_of(error_and_energy: torch.Tensor) -> torch.Tensor:
    """Return error over energy, from [2]; 0 where there is no energy."""
    error, energy = error_and_energy
    return error / energy if float(energy) > 0 else torch.zeros((), dtype=torch.float64)
