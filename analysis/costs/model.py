"""How long calibration, error table, sensitivities and export take on a machine, and in what memory, before anything is
run.

Calibration: 2 operations for each weight that a token meets, at the machine's matmul speed for that width; 4 for each
pair of token and channel in attention; 2 C² a token for second moments of C channels; and a measured time for every
channel that goes in or out of a linear layer. A backward pass triples the first two. Error table and export: weights
over the measured speed of each type. Sensitivities: the products of a calibration once forward and once back, those of
the head too, and a forward pass in search of super weights. Reading is added where it is not hidden behind the work.
One process on the CPU.

Within a memory limit the model is streamed: every pass reads the checkpoint, experts that have no room are read for
every batch, and a backward pass runs each layer a second time.

Left out: the report, the closing pass, and what a candidate for a super weight takes to try (a pass each).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, log, prod

from dynquant.analysis.costs.machine import Machine
from dynquant.analysis.costs.streamed_cost import StreamedCost, StreamedPass, kept_bytes, streamed_cost
from dynquant.calibration.collector import SampleLimits
from dynquant.calibration.run import HELD_BACK
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role, layer_of
from dynquant.formats.quant_types import QUANT_TYPES, fit_to_row
from dynquant.inputs.model_inputs import num_held_back
from dynquant.recipes.plan import Plan, PlanEntry

_SHARES_INPUT = {Role.ATTN_K, Role.ATTN_V, Role.FFN_UP, Role.SHARED_UP, Role.SHARED_GATE, Role.EXPERT_UP, Role.MLA_KV_A}
"""Weights that read the input of another one."""
TABLE_TYPES = ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
"""Types whose search tables ggml builds before the first block."""
_SHARES_TABLE = {"IQ1_M": "IQ1_S"}
MEASURED_FLOAT = "BF16"
"""The checkpoint's own type, which is a candidate for every tensor; its speed has that of loading in it."""
_FLOAT_BYTES = 4
_BATCH_WINDOWS = 4
"""Windows that calibration runs at a time on a CPU."""
_PROBE_TOKENS = 4096
_ENCODED_AT_ONCE = 1 << 25
_MEASURING_BYTES = 1 << 25
"""Differences and their squares, of some rows at a time (`error_sums`)."""


@dataclass(frozen=True)
class StageCost:
    """One command's stage: seconds, bytes of resident memory at the peak, and bytes read from the checkpoint."""

    stage: str
    seconds: float
    memory_bytes: int
    bytes_read: int


@dataclass(frozen=True)
class Workload:
    """What is asked for, in the terms of the commands' options."""

    tokens: int = 131_072
    window: int = 512
    hessians: str = "activations"
    hessian_bytes: int = 8 << 30
    encoder: str = "dynquant"
    types: tuple[str, ...] = ()
    """Candidate types of the error table."""
    limit_bytes: int | None = None
    """Memory within which the model is streamed; None loads it whole."""


def predict(model: Model, plan: Plan, machine: Machine, work: Workload) -> list[StageCost]:
    """Costs of calibrating, of the error table over `work.types`, of the sensitivities, and of exporting `plan`."""
    weights = sum(prod(entry.shape) for entry in plan.entries)
    stored = 2 * weights
    largest = max(_at_once(entry) for entry in plan.entries) * _FLOAT_BYTES
    reading = stored / machine.disk_bytes_per_s
    built = _search_tables(machine, plan.histogram()) if work.encoder == "ggml" else 0.0
    moments = _moment_bytes(model, plan.entries, work)
    return [
        _calibration(model, plan, machine, work),
        StageCost(
            "error table",
            machine.start_seconds + _search_tables(machine, work.types) + reading + _table_seconds(plan, machine, work),
            machine.start_bytes + _sample_bytes(model, plan.entries, work) + 3 * largest + _MEASURING_BYTES,
            stored,
        ),
        _sensitivities(model, plan, machine, work),
        StageCost(
            "export",
            machine.start_seconds + built + max(reading, _export(plan, machine, work)),
            machine.start_bytes + 3 * largest + (moments if work.encoder == "dynquant" else 0),
            stored,
        ),
    ]


def _calibration(model: Model, plan: Plan, machine: Machine, work: Workload) -> StageCost:
    weights = sum(prod(entry.shape) for entry in plan.entries)
    seconds = _calibration_seconds(model, plan, machine, work)
    if work.limit_bytes is None:
        moments = _moment_bytes(model, plan.entries, work)
        memory = machine.start_bytes + machine.run_bytes + _FLOAT_BYTES * weights + 2 * moments
        reading = 2 * weights / machine.disk_bytes_per_s
        return StageCost("calibrate", machine.start_seconds + reading + seconds, memory, 2 * weights)
    is_backward = work.hessians == "gradients"
    layers = {layer_of(entry.name) for entry in plan.entries} - {None}
    moments = max(
        _moment_bytes(model, [entry for entry in plan.entries if layer_of(entry.name) == layer], work)
        for layer in layers
    )
    passed = _passed(model, work, _BATCH_WINDOWS, is_backward=is_backward, moment_bytes=moments)
    batches = ceil(work.tokens / passed.batch_tokens)
    cost = streamed_cost(plan, machine.start_bytes, passed, work.limit_bytes)
    return _streamed("calibrate", plan, machine, cost, seconds, passes=2 if is_backward else 1, batches=batches)


def _sensitivities(model: Model, plan: Plan, machine: Machine, work: Workload) -> StageCost:
    weights = sum(prod(entry.shape) for entry in plan.entries)
    search = replace(work, tokens=work.window, hessians="none")
    probe = replace(work, tokens=_PROBE_TOKENS, hessians="none")
    once = _calibration_seconds(model, plan, machine, probe)
    streamed = work.limit_bytes is not None
    head = 2 * (2 * probe.tokens * model.hyper.n_vocab * model.hyper.n_embd) / _interpolated(machine.matmul_flops, 4096)
    seconds = _calibration_seconds(model, plan, machine, search) + (3 if streamed else 2) * once + head
    passed = _passed(model, work, 1, is_backward=True)
    if work.limit_bytes is None:
        memory = machine.start_bytes + machine.run_bytes + _FLOAT_BYTES * weights + kept_bytes(plan, passed)
        reading = 2 * weights / machine.disk_bytes_per_s
        return StageCost("sensitivities", machine.start_seconds + reading + seconds, memory, 2 * weights)
    cost = streamed_cost(plan, machine.start_bytes, passed, work.limit_bytes)
    batches = ceil(_PROBE_TOKENS / work.window)
    return _streamed("sensitivities", plan, machine, cost, seconds, passes=3, batches=batches)


def _passed(model: Model, work: Workload, windows: int, *, is_backward: bool, moment_bytes: int = 0) -> StreamedPass:
    return StreamedPass(windows * work.window, model.hyper.n_expert_used, is_backward, moment_bytes)


def _streamed(
    stage: str, plan: Plan, machine: Machine, cost: StreamedCost, seconds: float, *, passes: int, batches: int
) -> StageCost:
    """Of a stage that computes for so many seconds."""
    dense, experts = (
        2 * sum(prod(entry.shape) for entry in plan.entries if entry.role.is_routed_expert == routed)
        for routed in (False, True)
    )
    read = passes * (dense + experts * (1 if cost.keeps_experts else batches))
    reading = read / machine.disk_bytes_per_s
    hidden = max(reading, seconds) if cost.reads_ahead and cost.keeps_experts else reading + seconds
    return StageCost(stage, machine.start_seconds + hidden, cost.memory_bytes, read)


def _linears(model: Model, entries: Iterable[PlanEntry]) -> Iterator[tuple[PlanEntry, float]]:
    """Matrices that tokens go through while a model is calibrated, and the share of tokens that meets each slice."""
    for entry in entries:
        if len(entry.shape) < 2 or entry.role in (Role.EMBEDDING, Role.OUTPUT):
            continue
        routed = entry.role.is_routed_expert and model.hyper.n_expert
        yield entry, model.hyper.n_expert_used / model.hyper.n_expert if routed else 1.0


def _calibration_seconds(model: Model, plan: Plan, machine: Machine, work: Workload) -> float:
    passes = 3 if work.hessians == "gradients" else 1
    running = calibration_flop_seconds(model, plan, machine.matmul_flops, work)
    running += calibration_elements(model, plan, work) * machine.element_seconds
    if work.hessians == "none":
        return running
    return passes * running + sum(
        2
        * work.tokens
        * share
        * prod(entry.shape[:-2])
        * entry.shape[-1] ** 2
        / _interpolated(machine.matmul_flops, entry.shape[-1])
        for entry, share in _linears(model, plan.entries)
        if _has_moment(entry)
    )


def calibration_flop_seconds(model: Model, plan: Plan, matmul_flops: dict[int, float], work: Workload) -> float:
    """Of the products of one forward pass."""
    seconds = 0.0
    for entry, share in _linears(model, plan.entries):
        *slices, rows, columns = entry.shape
        operations = 2 * work.tokens * share * prod(slices) * rows * columns
        seconds += operations / _interpolated(matmul_flops, min(rows, columns))
        if entry.role == Role.ATTN_OUT:
            seconds += 4 * work.tokens * work.window * columns / _interpolated(matmul_flops, 64)
    return seconds


def calibration_elements(model: Model, plan: Plan, work: Workload) -> float:
    """Channels of tokens that go in or out of linear layers in one forward pass."""
    return sum(
        work.tokens * share * prod(entry.shape[:-2]) * sum(entry.shape[-2:])
        for entry, share in _linears(model, plan.entries)
    )


def _has_moment(entry: PlanEntry) -> bool:
    return entry.role not in _SHARES_INPUT and entry.role not in (Role.MLA_K_B, Role.MLA_V_B, Role.ROUTER)


def _moment_bytes(model: Model, entries: Sequence[PlanEntry], work: Workload) -> int:
    """Of the second moments of their inputs; experts share a matrix when each has no room."""
    if work.hessians == "none":
        return 0
    entries = [entry for entry, _ in _linears(model, entries) if _has_moment(entry)]
    each, shared = (
        sum(_FLOAT_BYTES * (prod(entry.shape[:-2]) if apart else 1) * entry.shape[-1] ** 2 for entry in entries)
        for apart in (True, False)
    )
    return min(each if each <= work.hessian_bytes else shared, work.hessian_bytes)


def _sample_bytes(model: Model, entries: Sequence[PlanEntry], work: Workload) -> int:
    """Of the held-back inputs in the statistics, bfloat16."""
    limits, held = SampleLimits(), work.window * num_held_back(ceil(work.tokens / work.window), HELD_BACK)
    total = 0
    for entry, share in _linears(model, entries):
        if not _has_moment(entry):
            continue
        experts, channels = prod(entry.shape[:-2]), entry.shape[-1]
        most = limits.rows_per_expert(experts, channels) if entry.role.is_routed_expert else limits.dense_rows
        total += 2 * min(most, ceil(held * share)) * experts * channels
    return total


def _table_seconds(plan: Plan, machine: Machine, work: Workload) -> float:
    seconds = 0.0
    for entry in plan.entries:
        if len(entry.shape) < 2 or entry.role == Role.ROUTER:
            continue
        stored = {fit_to_row(QUANT_TYPES[name], entry.shape[-1])[0].name for name in work.types} | {MEASURED_FLOAT}
        seconds += prod(entry.shape) * sum(1 / _speed(machine.errors, name) for name in stored)
    return seconds


def _export(plan: Plan, machine: Machine, work: Workload) -> float:
    return sum(
        prod(entry.shape) / _speed(machine.encode[work.encoder], entry.type)
        for entry in plan.entries
        if not entry.quant_type.is_float
    )


def _search_tables(machine: Machine, types: Iterable[str]) -> float:
    needed = {_SHARES_TABLE.get(name, name) for name in types}
    return sum(seconds for name, seconds in machine.table_seconds.items() if name in needed)


def _at_once(entry: PlanEntry) -> int:
    """Weights of an entry that are in memory together while it is encoded: a matrix, or a few experts."""
    if len(entry.shape) < 3:
        return prod(entry.shape)
    return max(prod(entry.shape[1:]), min(prod(entry.shape), _ENCODED_AT_ONCE))


def _speed(speeds: dict[str, float], name: str) -> float:
    """Weights per second in a type; one that was not measured goes like the one nearest in bits per weight."""
    bits = QUANT_TYPES[name].bits_per_weight
    return speeds.get(name) or speeds[min(speeds, key=lambda other: abs(QUANT_TYPES[other].bits_per_weight - bits))]


def _interpolated(speeds: dict[int, float], width: int) -> float:
    """Between measured widths on a double logarithmic scale; the nearest beyond them."""
    known = sorted(speeds)
    width = min(max(width, known[0]), known[-1])
    above = next(index for index, other in enumerate(known) if other >= width)
    if known[above] == width:
        return speeds[width]
    low, high = known[above - 1], known[above]
    part = (log(width) - log(low)) / (log(high) - log(low))
    return exp((1 - part) * log(speeds[low]) + part * log(speeds[high]))
