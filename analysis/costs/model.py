"""Time and memory of calibration, error table, sensitivities and export on a machine, estimated before anything is run.

Calibration: 2 operations for each weight that a token meets, at the machine's matmul speed for that width; 4 for each
pair of token and channel in attention; 2 C² a token for second moments of C channels; and a measured time for every
channel that goes in or out of a linear layer. A backward pass triples the first two. Export: weights over the measured
speed of each type; error table: one look at every weight, and drawn rows at such a speed. Sensitivities: the products
of a calibration once forward and once back, those of the head too, and a forward pass in search of super weights.
Reading is added where it is not hidden behind the work. One process on the CPU.

Within a memory limit the model is streamed, see `streamed_cost`: every pass reads the checkpoint, experts that have no
room are read for every batch, and a backward pass runs each layer a second time.

Left out: the report, the closing pass, and what a candidate for a super weight takes to try (a pass each).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from dynquant.analysis.costs.machine import Machine
from dynquant.analysis.sensitivity.stage import PROBE_TOKENS
from dynquant.calibration.collector import SampleLimits
from dynquant.calibration.run import HELD_BACK
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role, layer_of
from dynquant.formats.quant_types import QUANT_TYPES, fit_to_row
from dynquant.inputs.model_inputs import num_held_back
from dynquant.recipes.plan import Plan, PlanEntry
from dynquant.running.streaming.stream_memory import RESERVE_BYTES, WAYS_TO_RUN, Workload, activation_channels

TABLE_TYPES = ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
"""Types whose search tables ggml builds before the first block."""
MEASURED_FLOAT = "BF16"
"""The checkpoint's own type, which is a candidate for every tensor; its speed has that of loading in it."""
_SHARES_TABLE = {"IQ1_M": "IQ1_S"}
_WITHOUT_MOMENT = {
    Role.ATTN_K, Role.ATTN_V, Role.FFN_UP, Role.SHARED_UP, Role.SHARED_GATE, Role.EXPERT_UP, Role.MLA_KV_A,
    Role.MLA_K_B, Role.MLA_V_B, Role.ROUTER,
}  # fmt: skip
"""Weights that read the input of another one, or whose inputs have no second moments."""
_STORED_BYTES, _FLOAT_BYTES = 2, 4
_Stage = tuple[list[PlanEntry], list[PlanEntry]]
"""Dense weights and routed experts of what a streamed model loads together: a layer, the embedding, or the head."""
_BATCH_WINDOWS = 4  # windows that calibration runs at a time on a CPU
_ENCODED_AT_ONCE = 1 << 25  # weights of experts
_DRAWN_ROWS = 100  # of a tensor, whose errors are then known to 2 %: the mean over the 89M model's
_MEASURING_BYTES = 1 << 25  # size of differences and their squares, of some rows at a time (`analysis.errors.sums`)


@dataclass(frozen=True)
class StageCost:
    """One command's stage: seconds, bytes of resident memory at the peak, and bytes read from the checkpoint."""

    stage: str
    seconds: float
    memory_bytes: int
    bytes_read: int


@dataclass(frozen=True)
class CostOptions:
    """The work asked for, in the terms of the commands' options."""

    tokens: int = 131_072
    window: int = 512
    hessians: str = "activations"
    hessian_bytes: int = 8 << 30
    encoder: str = "dynquant"
    types: tuple[str, ...] = ()  # candidate types of the error table
    limit_bytes: int | None = None  # memory within which the model is streamed; None loads it whole


def predict(model: Model, plan: Plan, machine: Machine, options: CostOptions) -> list[StageCost]:
    """Return costs of calibrating, of the error table over `options.types`, of the sensitivities, and of the export."""
    return list(_Costs(model, plan, machine, options).stages())


@dataclass(frozen=True)
class _Costs:
    model: Model
    plan: Plan
    machine: Machine
    options: CostOptions

    def stages(self) -> Iterator[StageCost]:
        machine, options, entries, hyper = self.machine, self.options, self.plan.entries, self.model.hyper
        backward = options.hessians in ("gradients", "two-sided")
        batch = Workload(_BATCH_WINDOWS * options.window, backward)
        work = self._seconds(options.tokens, options.hessians)
        yield self._run_model("calibrate", work, options.tokens, batch, passes=2 if backward else 1)

        stored = _STORED_BYTES * _num_weights(entries)
        reading = stored / machine.disk_bytes_per_s
        # A matrix, or a few experts, are encoded at once: weights, importance, and what is made of them.
        encoding = 3 * _FLOAT_BYTES * max(_weights_at_once(entry) for entry in entries)
        seconds = self._table_seconds() + reading
        memory = self._sample_bytes() + encoding + _MEASURING_BYTES
        yield StageCost("error table", machine.start_seconds + seconds, machine.start_bytes + memory, stored)

        probe = self._seconds(PROBE_TOKENS, "none")
        head = 4 * PROBE_TOKENS * hyper.n_vocab * hyper.n_embd / _interpolated(machine.matmul_flops, 4096)
        forwards = 2 if options.limit_bytes is None else 3  # a streamed layer runs again on the way back
        work = self._seconds(options.window, "none") + forwards * probe + head
        yield self._run_model("sensitivities", work, PROBE_TOKENS, Workload(options.window, True), passes=3)

        speeds = machine.encode[options.encoder]
        packed = (entry for entry in entries if not entry.quant_type.is_float)
        seconds = max(reading, sum(prod(entry.shape) / _speed(speeds, entry.type) for entry in packed))
        if options.encoder == "ggml":
            seconds += self._search_tables(self.plan.histogram())
        memory = encoding + (self._moment_bytes(entries) if options.encoder == "dynquant" else 0)
        yield StageCost("export", machine.start_seconds + seconds, machine.start_bytes + memory, stored)

    def _run_model(self, stage: str, seconds: float, tokens: int, batch: Workload, *, passes: int) -> StageCost:
        """Return the cost of running the model for `seconds`, whole or streamed."""
        machine, limit, entries = self.machine, self.options.limit_bytes, self.plan.entries
        layers, is_calibration = _stages(self.plan)[1:-1], stage == "calibrate"
        stored, disk = _STORED_BYTES * _num_weights(entries), machine.disk_bytes_per_s
        if limit is None:
            if is_calibration:
                held = 2 * self._moment_bytes(entries)  # they are there twice while they are saved
            else:  # a backward pass keeps half of what each layer holds at its own peak
                held = sum(_activation_bytes(self.model, layer, batch) for layer in layers) // 2
            memory = machine.start_bytes + machine.run_bytes + _FLOAT_BYTES * _num_weights(entries) + held
            return StageCost(stage, seconds + (machine.start_seconds + stored / disk), memory, stored)
        moments = max(self._moment_bytes(dense + experts) for dense, experts in layers) if is_calibration else 0
        start = machine.start_bytes
        memory, keeps_experts, reads_ahead = streamed_cost(self.model, self.plan, start, batch, limit, moments)
        read = passes * stored
        if not keeps_experts:
            experts = _STORED_BYTES * _num_weights(entry for entry in entries if entry.role.is_routed_expert)
            read += passes * experts * (ceil(tokens / batch.batch_tokens) - 1)
        is_hidden = reads_ahead and keeps_experts  # experts that are read for every batch hold the work up
        seconds = max(read / disk, seconds) if is_hidden else read / disk + seconds
        return StageCost(stage, machine.start_seconds + seconds, memory, read)

    def _seconds(self, tokens: int, hessians: str) -> float:
        """Return the time that a calibration computes."""
        machine, window = self.machine, self.options.window
        running, channels = calibration_work(self.model, self.plan, machine.matmul_flops, tokens, window)
        running += channels * machine.element_seconds
        if hessians == "none":
            return running
        moments = 0.0
        for experts, width, share in self._moments(self.plan.entries):
            moments += 2 * tokens * share * experts * width**2 / _interpolated(machine.matmul_flops, width)
        return (3 if hessians in ("gradients", "two-sided") else 1) * running + moments

    def _measured(self, entries: Iterable[PlanEntry]) -> Iterator[tuple[PlanEntry, float]]:
        """Yield the `_linears` whose inputs have second moments of their own."""
        return (pair for pair in _linears(self.model, entries) if pair[0].role not in _WITHOUT_MOMENT)

    def _moments(self, entries: Iterable[PlanEntry]) -> Iterator[tuple[int, int, float]]:
        """Yield experts, width and share of tokens of second moments of inputs, and of outputs where they are taken."""
        for entry, share in self._measured(entries):
            yield prod(entry.shape[:-2]), entry.shape[-1], share
        if self.options.hessians == "two-sided":
            for entry, share in _linears(self.model, entries):
                yield prod(entry.shape[:-2]), entry.shape[-2], share

    def _moment_bytes(self, entries: Iterable[PlanEntry]) -> int:
        """Return the size of the second moments; experts share a matrix when each has no room."""
        if self.options.hessians == "none":
            return 0
        widths, limit = [(experts, width) for experts, width, _ in self._moments(entries)], self.options.hessian_bytes
        each = sum(_FLOAT_BYTES * experts * width**2 for experts, width in widths)
        shared = sum(_FLOAT_BYTES * width**2 for _, width in widths)
        return each if each <= limit else min(shared, limit)

    def _sample_bytes(self) -> int:
        """Return the size of the held-back inputs in the statistics, bfloat16."""
        windows = num_held_back(ceil(self.options.tokens / self.options.window), HELD_BACK)
        limits, held, total = SampleLimits(), self.options.window * windows, 0
        for entry, share in self._measured(self.plan.entries):
            experts, channels = prod(entry.shape[:-2]), entry.shape[-1]
            is_routed = entry.role.is_routed_expert
            most = limits.rows_per_expert(experts, channels) if is_routed else limits.dense_rows
            total += 2 * min(most, ceil(held * share)) * experts * channels
        return total

    def _table_seconds(self) -> float:
        """Return the time of a look at all weights, and of encoding drawn rows with dynquant's encoder."""
        seconds, types = 0.0, [QUANT_TYPES[name] for name in self.options.types]
        for entry in self.plan.entries:
            if len(entry.shape) >= 2 and entry.role != Role.ROUTER:
                stored = {fit_to_row(quant_type, entry.shape[-1])[0].name for quant_type in types}
                drawn = min(prod(entry.shape[:-1]), _DRAWN_ROWS) * entry.shape[-1]
                seconds += prod(entry.shape) / _speed(self.machine.errors, MEASURED_FLOAT)
                seconds += drawn * sum(1 / _speed(self.machine.encode["dynquant"], name) for name in stored)
        return seconds

    def _search_tables(self, types: Iterable[str]) -> float:
        """Return the time in which ggml builds the search tables of the types."""
        needed = {_SHARES_TABLE.get(name, name) for name in types}
        return sum(seconds for name, seconds in self.machine.table_seconds.items() if name in needed)


def streamed_cost(
    model: Model, plan: Plan, start_bytes: int, batch: Workload, limit_bytes: int, moment_bytes: int = 0
) -> tuple[int, bool, bool]:
    """Return the peak of the process in bytes, and the first of `WAYS_TO_RUN` within the limit, or the most frugal.

    Args:
        start_bytes: of a process that has read no weight.
        moment_bytes: second moments of the largest layer.
    """
    stages = _stages(plan)
    last, step = len(stages) - 1, -1 if batch.is_backward else 1

    def stage_bytes(number: int, keeps_experts: bool, reads_ahead: bool) -> int:
        dense, experts = stages[number]
        # One tensor is there a second time while it is converted; gate and up of an expert are one matrix by then.
        converted = [prod(entry.shape) for entry in dense] + [2 * prod(entry.shape[1:]) for entry in experts]
        total = _FLOAT_BYTES * (_num_weights(dense) + max(converted, default=0))
        total += _STORED_BYTES * _num_weights(experts) if keeps_experts else 0
        if reads_ahead and 0 <= number + step <= last:
            dense_ahead, experts_ahead = stages[number + step]
            total += _STORED_BYTES * _num_weights(dense_ahead + experts_ahead if keeps_experts else dense_ahead)
        if number == last and batch.is_backward:
            total += 5 * _FLOAT_BYTES * batch.batch_tokens * dense[0].shape[0]  # logits and their gradients
        if 0 < number < last:
            total += _activation_bytes(model, stages[number], batch) + moment_bytes
        return total

    for way in WAYS_TO_RUN:
        memory = start_bytes + RESERVE_BYTES + max(stage_bytes(number, *way) for number in range(len(stages)))
        if memory <= limit_bytes:
            break
    return memory, *way


def _stages(plan: Plan) -> list[_Stage]:
    """Return the embedding, the layers and the head; a tied embedding is its own head, as in `layer_stream`."""
    layers: dict[int, _Stage] = {}
    for entry in plan.entries:
        if (layer := layer_of(entry.name)) is not None:
            layers.setdefault(layer, ([], []))[entry.role.is_routed_expert].append(entry)
    embedding = [entry for entry in plan.entries if entry.role == Role.EMBEDDING]
    head = [entry for entry in plan.entries if entry.role == Role.OUTPUT]
    return [(embedding, []), *(layers[number] for number in sorted(layers)), (head or embedding, [])]


def _activation_bytes(model: Model, stage: _Stage, batch: Workload) -> int:
    """Return what a layer holds at its peak."""
    dense, experts = stage
    linears = sum(_output_channels(entry) for entry in dense if len(entry.shape) > 1)
    one_expert, used = sum(entry.shape[1] for entry in experts), model.hyper.n_expert_used
    channels = activation_channels(linears, one_expert, used, is_backward=batch.is_backward)
    return _FLOAT_BYTES * batch.batch_tokens * channels


def _output_channels(entry: PlanEntry) -> int:
    """Return channels of a matrix, or of all heads together; GGUF stores k_b the other way round."""
    return prod(entry.shape[:-2]) * entry.shape[-1 if entry.role == Role.MLA_K_B else -2]


def _num_weights(entries: Iterable[PlanEntry]) -> int:
    return sum(prod(entry.shape) for entry in entries)


def _linears(model: Model, entries: Iterable[PlanEntry]) -> Iterator[tuple[PlanEntry, float]]:
    """Yield matrices that tokens go through in calibration, and the share of tokens that meets each slice."""
    for entry in entries:
        if len(entry.shape) >= 2 and entry.role not in (Role.EMBEDDING, Role.OUTPUT):
            routed = entry.role.is_routed_expert and model.hyper.n_expert
            yield entry, model.hyper.n_expert_used / model.hyper.n_expert if routed else 1.0


def calibration_work(
    model: Model, plan: Plan, matmul_flops: dict[int, float], tokens: int, window: int
) -> tuple[float, float]:
    """Return of a forward pass the time of its products, and channels of tokens in or out of linear layers."""
    seconds, channels = 0.0, 0.0
    for entry, share in _linears(model, plan.entries):
        *slices, rows, columns = entry.shape
        rows_of_tokens = tokens * share * prod(slices)
        channels += rows_of_tokens * (rows + columns)
        seconds += 2 * rows_of_tokens * rows * columns / _interpolated(matmul_flops, min(rows, columns))
        if entry.role == Role.ATTN_OUT:
            seconds += 4 * tokens * window * columns / _interpolated(matmul_flops, 64)
    return seconds, channels


def _weights_at_once(entry: PlanEntry) -> int:
    """Return weights of an entry that are in memory together while it is encoded: a matrix, or a few experts."""
    if len(entry.shape) < 3:
        return prod(entry.shape)
    return max(prod(entry.shape[1:]), min(prod(entry.shape), _ENCODED_AT_ONCE))


def _speed(speeds: dict[str, float], name: str) -> float:
    """Return weights per second in a type; one that was not measured goes like the one nearest in bits per weight."""
    bits = QUANT_TYPES[name].bits_per_weight
    return speeds.get(name) or speeds[min(speeds, key=lambda other: abs(QUANT_TYPES[other].bits_per_weight - bits))]


def _interpolated(speeds: dict[int, float], width: int) -> float:
    """Interpolate between measured widths on a double logarithmic scale; return the nearest beyond them."""
    widths = sorted(speeds)
    return float(np.exp(np.interp(np.log(width), np.log(widths), np.log([speeds[width] for width in widths]))))
