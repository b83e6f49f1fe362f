"""Time and memory of calibration, error table, sensitivities and export on a machine, estimated before anything is run.

Calibration: 2 operations for each weight that a token meets, at the machine's matmul speed for that width; 4 for each
pair of token and channel in attention; 2 C² a token for second moments of C channels; and a measured time for every
channel that goes in or out of a linear layer. A backward pass triples the first two. Error table and export: weights
over the measured speed of each type. Sensitivities: the products of a calibration once forward and once back, those of
the head too, and a forward pass in search of super weights. Reading is added where it is not hidden behind the work.
One process on the CPU.

Within a memory limit the model is streamed, see `streamed_cost`: every pass reads the checkpoint, experts that have no
room are read for every batch, and a backward pass runs each layer a second time.

Left out: the report, the closing pass, and what a candidate for a super weight takes to try (a pass each).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, exp, log, prod

from dynquant.analysis.costs.machine import Machine
from dynquant.analysis.sensitivity.stage import PROBE_TOKENS
from dynquant.calibration.collector import SampleLimits
from dynquant.calibration.run import HELD_BACK
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role, layer_of
from dynquant.formats.quant_types import QUANT_TYPES, fit_to_row
from dynquant.inputs.model_inputs import num_held_back
from dynquant.recipes.plan import Plan, PlanEntry
from dynquant.running.stream_memory import RESERVE_BYTES, WAYS_TO_RUN, Workload, activation_channels

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
_BATCH_WINDOWS = 4
"""Windows that calibration runs at a time on a CPU."""
_ENCODED_AT_ONCE = 1 << 25
_MEASURING_BYTES = 1 << 25
"""Size of differences and their squares, of some rows at a time (`analysis.errors.sums`)."""


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
    types: tuple[str, ...] = ()
    """Candidate types of the error table."""
    limit_bytes: int | None = None
    """Memory within which the model is streamed; None loads it whole."""


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
        plan, machine, options = self.plan, self.machine, self.options
        backward = options.hessians == "gradients"
        work = self._seconds(options.tokens, options.hessians)
        yield self._run_model("calibrate", work, options.tokens, _BATCH_WINDOWS, backward, passes=2 if backward else 1)

        stored = _STORED_BYTES * sum(prod(entry.shape) for entry in plan.entries)
        reading = stored / machine.disk_bytes_per_s
        # A matrix, or a few experts, are encoded at once: weights, importance, and what is made of them.
        encoding = 3 * _FLOAT_BYTES * max(_weights_at_once(entry) for entry in plan.entries)
        seconds = self._table_seconds() + self._search_tables(options.types) + reading
        memory = self._sample_bytes() + encoding + _MEASURING_BYTES
        yield StageCost("error table", machine.start_seconds + seconds, machine.start_bytes + memory, stored)

        probe = self._seconds(PROBE_TOKENS, "none")
        head = 4 * PROBE_TOKENS * self.model.hyper.n_vocab * self.model.hyper.n_embd / self._flops(4096)
        forwards = 2 if options.limit_bytes is None else 3  # a streamed layer runs again on the way back
        work = self._seconds(options.window, "none") + forwards * probe + head
        yield self._run_model("sensitivities", work, PROBE_TOKENS, 1, True, passes=3)

        seconds = max(reading, self._export_seconds())
        memory = encoding + (self._moment_bytes(plan.entries) if options.encoder == "dynquant" else 0)
        if options.encoder == "ggml":
            seconds += self._search_tables(plan.histogram())
        yield StageCost("export", machine.start_seconds + seconds, machine.start_bytes + memory, stored)

    def _run_model(
        self, stage: str, seconds: float, tokens: int, windows: int, is_backward: bool, *, passes: int
    ) -> StageCost:
        """Return the cost of running the model for `seconds`, whole or streamed, some windows at a time."""
        plan, machine, limit = self.plan, self.machine, self.options.limit_bytes
        batch = Workload(windows * self.options.window, is_backward)
        is_calibration = stage == "calibrate"
        weights = sum(prod(entry.shape) for entry in plan.entries)
        if limit is None:
            # Second moments are there twice while they are saved; a backward pass keeps activations of all layers.
            held = 2 * self._moment_bytes(plan.entries) if is_calibration else self._activation_bytes(batch)
            memory = machine.start_bytes + machine.run_bytes + _FLOAT_BYTES * weights + held
            seconds += machine.start_seconds + _STORED_BYTES * weights / machine.disk_bytes_per_s
            return StageCost(stage, seconds, memory, _STORED_BYTES * weights)
        moments = 0
        if is_calibration:
            layers = _by_layer(plan).values()
            moments = max(self._moment_bytes(entries) for entries in layers)
        cost = streamed_cost(self.model, plan, machine.start_bytes, batch, limit, moment_bytes=moments)
        dense, experts = (
            _STORED_BYTES * sum(prod(entry.shape) for entry in plan.entries if entry.role.is_routed_expert == routed)
            for routed in (False, True)
        )
        repeats = 1 if cost.keeps_experts else ceil(tokens / batch.batch_tokens)
        read = passes * (dense + experts * repeats)
        reading = read / machine.disk_bytes_per_s
        is_hidden = cost.reads_ahead and cost.keeps_experts
        seconds = max(reading, seconds) if is_hidden else reading + seconds
        return StageCost(stage, machine.start_seconds + seconds, cost.memory_bytes, read)

    def _seconds(self, tokens: int, hessians: str) -> float:
        """Return the time that a calibration computes."""
        plan, flops = self.plan, self.machine.matmul_flops
        running = calibration_flop_seconds(self.model, plan, flops, tokens, self.options.window)
        running += calibration_elements(self.model, plan, tokens) * self.machine.element_seconds
        if hessians == "none":
            return running
        moments = sum(
            2 * tokens * share * prod(entry.shape[:-2]) * entry.shape[-1] ** 2 / self._flops(entry.shape[-1])
            for entry, share in _linears(self.model, plan.entries)
            if entry.role not in _WITHOUT_MOMENT
        )
        return (3 if hessians == "gradients" else 1) * running + moments

    def _flops(self, width: int) -> float:
        return _interpolated(self.machine.matmul_flops, width)

    def _moment_bytes(self, entries: Iterable[PlanEntry]) -> int:
        """Return the size of the second moments of inputs; experts share a matrix when each has no room."""
        if self.options.hessians == "none":
            return 0
        shapes = [e.shape for e, _ in _linears(self.model, entries) if e.role not in _WITHOUT_MOMENT]
        each = sum(_FLOAT_BYTES * prod(shape[:-2]) * shape[-1] ** 2 for shape in shapes)
        shared = sum(_FLOAT_BYTES * shape[-1] ** 2 for shape in shapes)
        return min(each if each <= self.options.hessian_bytes else shared, self.options.hessian_bytes)

    def _activation_bytes(self, batch: Workload) -> int:
        """Return what a backward pass keeps of all layers: half of what each holds at its own peak."""
        used = self.model.hyper.n_expert_used
        return sum(stage.activation_bytes(batch, used) for stage in list(_stages(self.plan))[1:-1]) // 2

    def _sample_bytes(self) -> int:
        """Return the size of the held-back inputs in the statistics, bfloat16."""
        windows = num_held_back(ceil(self.options.tokens / self.options.window), HELD_BACK)
        limits, held, total = SampleLimits(), self.options.window * windows, 0
        for entry, share in _linears(self.model, self.plan.entries):
            if entry.role not in _WITHOUT_MOMENT:
                experts, channels = prod(entry.shape[:-2]), entry.shape[-1]
                is_routed = entry.role.is_routed_expert
                most = limits.rows_per_expert(experts, channels) if is_routed else limits.dense_rows
                total += 2 * min(most, ceil(held * share)) * experts * channels
        return total

    def _table_seconds(self) -> float:
        seconds, types = 0.0, [QUANT_TYPES[name] for name in self.options.types]
        for entry in self.plan.entries:
            if len(entry.shape) >= 2 and entry.role != Role.ROUTER:
                stored = {fit_to_row(quant_type, entry.shape[-1])[0].name for quant_type in types} | {MEASURED_FLOAT}
                seconds += prod(entry.shape) * sum(1 / _speed(self.machine.errors, name) for name in stored)
        return seconds

    def _export_seconds(self) -> float:
        speeds = self.machine.encode[self.options.encoder]
        packed = (entry for entry in self.plan.entries if not entry.quant_type.is_float)
        return sum(prod(entry.shape) / _speed(speeds, entry.type) for entry in packed)

    def _search_tables(self, types: Iterable[str]) -> float:
        """Return the time in which ggml builds the search tables of the types."""
        needed = {_SHARES_TABLE.get(name, name) for name in types}
        return sum(seconds for name, seconds in self.machine.table_seconds.items() if name in needed)


@dataclass(frozen=True)
class StreamedCost:
    """The way in which a model is run within a limit, and the bytes that the process takes at its peak."""

    memory_bytes: int
    keeps_experts: bool
    reads_ahead: bool


@dataclass(frozen=True)
class _Stage:
    """The embedding, a layer or the head of a streamed model, known by its plan alone (`running.layer_stream`)."""

    dense: list[PlanEntry]
    experts: list[PlanEntry]

    @property
    def loaded_bytes(self) -> int:
        """Matrices as float32, and one tensor a second time while it is converted."""
        sizes = [prod(entry.shape) for entry in self.dense]
        # gate and up of an expert are one matrix of the running model
        matrices = [2 * prod(entry.shape[1:]) for entry in self.experts]
        return _FLOAT_BYTES * (sum(sizes) + max((*sizes, *matrices), default=0))

    def stored_bytes(self, *, keeps_experts: bool) -> int:
        entries = self.dense + self.experts if keeps_experts else self.dense
        return _STORED_BYTES * sum(prod(entry.shape) for entry in entries)

    def activation_bytes(self, batch: Workload, experts_used: int) -> int:
        linears = sum(_output_channels(entry) for entry in self.dense if len(entry.shape) > 1)
        one_expert = sum(entry.shape[1] for entry in self.experts)
        channels = activation_channels(linears, one_expert, experts_used, is_backward=batch.is_backward)
        return _FLOAT_BYTES * batch.batch_tokens * channels


def streamed_cost(
    model: Model, plan: Plan, start_bytes: int, batch: Workload, limit_bytes: int, *, moment_bytes: int = 0
) -> StreamedCost:
    """Return the first of `running.stream_memory`'s ways to run within the limit; the most frugal one if none is.

    Args:
        start_bytes: of a process that has read no weight.
        moment_bytes: second moments of the largest layer.
    """
    stages, used = list(_stages(plan)), model.hyper.n_expert_used

    def stage_bytes(number: int, keeps_experts: bool, reads_ahead: bool) -> int:
        stage, following = stages[number], number + (-1 if batch.is_backward else 1)
        total = stage.loaded_bytes
        if keeps_experts:
            total += stage.stored_bytes(keeps_experts=True) - stage.stored_bytes(keeps_experts=False)
        if reads_ahead and 0 <= following < len(stages):
            total += stages[following].stored_bytes(keeps_experts=keeps_experts)
        is_head = number == len(stages) - 1
        if is_head and batch.is_backward:
            total += 5 * _FLOAT_BYTES * batch.batch_tokens * stage.dense[0].shape[0]
        if number > 0 and not is_head:
            total += stage.activation_bytes(batch, used) + moment_bytes
        return total

    for keeps_experts, reads_ahead in WAYS_TO_RUN:
        most = max(stage_bytes(number, keeps_experts, reads_ahead) for number in range(len(stages)))
        cost = StreamedCost(start_bytes + RESERVE_BYTES + most, keeps_experts, reads_ahead)
        if cost.memory_bytes <= limit_bytes:
            break
    return cost


def _stages(plan: Plan) -> Iterator[_Stage]:
    """Yield stages in the order of a forward pass; a tied embedding is its own head."""
    embedding = [entry for entry in plan.entries if entry.role == Role.EMBEDDING]
    yield _Stage(embedding, [])
    for _, entries in sorted(_by_layer(plan).items()):
        routed = [entry for entry in entries if entry.role.is_routed_expert]
        yield _Stage([entry for entry in entries if not entry.role.is_routed_expert], routed)
    yield _Stage([entry for entry in plan.entries if entry.role == Role.OUTPUT] or embedding, [])


def _by_layer(plan: Plan) -> dict[int, list[PlanEntry]]:
    layers: dict[int, list[PlanEntry]] = {}
    for entry in plan.entries:
        if (layer := layer_of(entry.name)) is not None:
            layers.setdefault(layer, []).append(entry)
    return layers


def _output_channels(entry: PlanEntry) -> int:
    """Return channels of a matrix, or of all heads together; GGUF stores k_b the other way round."""
    return prod(entry.shape[:-2]) * entry.shape[-1 if entry.role == Role.MLA_K_B else -2]


def _linears(model: Model, entries: Iterable[PlanEntry]) -> Iterator[tuple[PlanEntry, float]]:
    """Yield matrices that tokens go through in calibration, and the share of tokens that meets each slice."""
    for entry in entries:
        if len(entry.shape) >= 2 and entry.role not in (Role.EMBEDDING, Role.OUTPUT):
            routed = entry.role.is_routed_expert and model.hyper.n_expert
            yield entry, model.hyper.n_expert_used / model.hyper.n_expert if routed else 1.0


def calibration_flop_seconds(
    model: Model, plan: Plan, matmul_flops: dict[int, float], tokens: int, window: int
) -> float:
    """Return the time of the products of one forward pass."""
    seconds = 0.0
    for entry, share in _linears(model, plan.entries):
        *slices, rows, columns = entry.shape
        operations = 2 * tokens * share * prod(slices) * rows * columns
        seconds += operations / _interpolated(matmul_flops, min(rows, columns))
        if entry.role == Role.ATTN_OUT:
            seconds += 4 * tokens * window * columns / _interpolated(matmul_flops, 64)
    return seconds


def calibration_elements(model: Model, plan: Plan, tokens: int) -> float:
    """Return channels of tokens that go in or out of linear layers in one forward pass."""
    return sum(
        tokens * share * prod(entry.shape[:-2]) * sum(entry.shape[-2:])
        for entry, share in _linears(model, plan.entries)
    )


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
    width = min(max(width, widths[0]), widths[-1])
    if width in speeds:
        return speeds[width]
    above = next(index for index, other in enumerate(widths) if other >= width)
    low, high = widths[above - 1], widths[above]
    part = (log(width) - log(low)) / (log(high) - log(low))
    return exp((1 - part) * log(speeds[low]) + part * log(speeds[high]))
