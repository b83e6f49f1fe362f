"""How long calibration, error table and export take on a machine, and in what memory, before anything is run.

Calibration: 2 operations for each weight that a token meets, at the machine's matmul speed for that width; 4 for each
pair of token and channel in attention; 2 C² a token for second moments of C channels; and a measured time for every
channel that goes in or out of a linear layer. A backward pass triples the first two. Error table and export: weights
over the measured speed of each type. Reading is added where it is not hidden behind the work. One process on the CPU.

Left out: super weights, sensitivities, the report and the closing pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log, prod

from dynquant.architecture import Role
from dynquant.machine import Machine
from dynquant.model import Model
from dynquant.plan import Plan, PlanEntry
from dynquant.quant_types import QUANT_TYPES, fit_to_row

_SHARES_INPUT = {Role.ATTN_K, Role.ATTN_V, Role.FFN_UP, Role.SHARED_UP, Role.SHARED_GATE, Role.EXPERT_UP, Role.MLA_KV_A}
"""Weights that read the input of another one."""
_FLOAT_BYTES = 4
_ENCODED_AT_ONCE = 1 << 25


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


def predict(model: Model, plan: Plan, machine: Machine, work: Workload) -> list[StageCost]:
    """Costs of calibrating, of the error table over `work.types`, and of exporting `plan`."""
    weights = sum(prod(entry.shape) for entry in plan.entries)
    stored = 2 * weights
    largest = max(_at_once(entry) for entry in plan.entries) * _FLOAT_BYTES
    reading = stored / machine.disk_bytes_per_s
    moments = _moment_bytes(model, plan, work)
    return [
        StageCost(
            "calibrate",
            machine.start_seconds + reading + _calibration_seconds(model, plan, machine, work),
            machine.start_bytes + machine.run_bytes + _FLOAT_BYTES * weights + 2 * moments,
            stored,
        ),
        StageCost(
            "error table",
            machine.start_seconds + machine.table_seconds + max(reading, _table_seconds(plan, machine, work)),
            machine.start_bytes + 4 * largest,
            stored,
        ),
        StageCost(
            "export",
            machine.start_seconds + _export_table_seconds(plan, machine) + max(reading, _export(plan, machine, work)),
            machine.start_bytes + 3 * largest + (moments if work.encoder == "dynquant" else 0),
            stored,
        ),
    ]


def _linears(model: Model, plan: Plan) -> Iterator[tuple[PlanEntry, float]]:
    """Matrices that tokens go through while a model is calibrated, and the share of tokens that meets each slice."""
    for entry in plan.entries:
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
        for entry, share in _linears(model, plan)
        if _has_moment(entry)
    )


def calibration_flop_seconds(model: Model, plan: Plan, matmul_flops: dict[int, float], work: Workload) -> float:
    """Of the products of one forward pass."""
    seconds = 0.0
    for entry, share in _linears(model, plan):
        *slices, rows, columns = entry.shape
        operations = 2 * work.tokens * share * prod(slices) * rows * columns
        seconds += operations / _interpolated(matmul_flops, min(rows, columns))
        if entry.role == Role.ATTN_OUT:
            seconds += 4 * work.tokens * work.window * columns / _interpolated(matmul_flops, 64)
    return seconds


def calibration_elements(model: Model, plan: Plan, work: Workload) -> float:
    """Channels of tokens that go in or out of linear layers in one forward pass."""
    return sum(
        work.tokens * share * prod(entry.shape[:-2]) * sum(entry.shape[-2:]) for entry, share in _linears(model, plan)
    )


def _has_moment(entry: PlanEntry) -> bool:
    return entry.role not in _SHARES_INPUT and entry.role not in (Role.MLA_K_B, Role.MLA_V_B, Role.ROUTER)


def _moment_bytes(model: Model, plan: Plan, work: Workload) -> int:
    """Of all second moments; experts share a matrix when each has no room."""
    if work.hessians == "none":
        return 0
    entries = [entry for entry, _ in _linears(model, plan) if _has_moment(entry)]
    each, shared = (
        sum(_FLOAT_BYTES * (prod(entry.shape[:-2]) if apart else 1) * entry.shape[-1] ** 2 for entry in entries)
        for apart in (True, False)
    )
    return min(each if each <= work.hessian_bytes else shared, work.hessian_bytes)


def _table_seconds(plan: Plan, machine: Machine, work: Workload) -> float:
    seconds = 0.0
    for entry in plan.entries:
        if len(entry.shape) < 2 or entry.role == Role.ROUTER:
            continue
        stored = {fit_to_row(QUANT_TYPES[name], entry.shape[-1])[0].name for name in work.types}
        seconds += prod(entry.shape) * sum(1 / _speed(machine.errors, name) for name in stored)
    return seconds


def _export(plan: Plan, machine: Machine, work: Workload) -> float:
    return sum(
        prod(entry.shape) / _speed(machine.encode[work.encoder], entry.type)
        for entry in plan.entries
        if not entry.quant_type.is_float
    )


def _export_table_seconds(plan: Plan, machine: Machine) -> float:
    return machine.table_seconds if any(entry.quant_type.needs_imatrix for entry in plan.entries) else 0.0


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
