"""Cost of a streamed model, known by its plan alone: the stages of `layer_stream`, counted as `memory_limit` does.

A stage is the embedding, a layer or the head. It holds its matrices as float32 and its experts as stored (2 bytes a
weight), one tensor a second time while it is converted, and the stage that is read ahead.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from dynquant.checkpoints.tensor_roles import Role, layer_of
from dynquant.recipes.plan import Plan, PlanEntry
from dynquant.running.stream_memory import RESERVE_BYTES, WAYS_TO_RUN, activation_channels

_STORED_BYTES, _FLOAT_BYTES = 2, 4


@dataclass(frozen=True)
class StreamedPass:
    """Inputs that go through the model at a time."""

    batch_tokens: int
    experts_used: int
    is_backward: bool = False
    moment_bytes: int = 0
    """Second moments of the largest layer."""


@dataclass(frozen=True)
class StreamedCost:
    """Way to run a model within a limit, and the bytes that the process takes at its peak."""

    memory_bytes: int
    keeps_experts: bool
    reads_ahead: bool


@dataclass(frozen=True)
class _Stage:
    dense: tuple[PlanEntry, ...]
    experts: tuple[PlanEntry, ...]

    @property
    def loaded_bytes(self) -> int:
        own = [prod(entry.shape) for entry in self.dense]
        # gate and up of an expert are one matrix of the running model
        matrices = [2 * prod(entry.shape[1:]) for entry in self.experts]
        return _FLOAT_BYTES * (sum(own) + max((*own, *matrices), default=0))

    @property
    def expert_bytes(self) -> int:
        return _STORED_BYTES * sum(prod(entry.shape) for entry in self.experts)

    @property
    def dense_bytes(self) -> int:
        return _STORED_BYTES * sum(prod(entry.shape) for entry in self.dense)

    def activation_bytes(self, work: StreamedPass) -> int:
        linears = sum(_output_channels(entry) for entry in self.dense if len(entry.shape) > 1)
        one_expert = sum(entry.shape[1] for entry in self.experts)
        channels = activation_channels(linears, one_expert, work.experts_used, is_backward=work.is_backward)
        return _FLOAT_BYTES * work.batch_tokens * channels


def streamed_cost(plan: Plan, start_bytes: int, work: StreamedPass, limit_bytes: int) -> StreamedCost:
    """The first of `memory_limit`'s ways to run that stays within the limit; the most frugal one if none does.

    Args:
        start_bytes: of a process that has read no weight.
    """
    stages = list(_stages(plan))
    for keeps_experts, reads_ahead in WAYS_TO_RUN:
        most = max(_stage_bytes(stages, number, work, keeps_experts, reads_ahead) for number in range(len(stages)))
        found = StreamedCost(start_bytes + RESERVE_BYTES + most, keeps_experts, reads_ahead)
        if found.memory_bytes <= limit_bytes:
            break
    return found


def kept_bytes(plan: Plan, work: StreamedPass) -> int:
    """Return what a backward pass through the whole model keeps of its layers: half of what each holds at its own
    peak."""
    return sum(stage.activation_bytes(work) for stage in list(_stages(plan))[1:-1]) // 2


def _stages(plan: Plan) -> Iterator[_Stage]:
    """In the order of a forward pass; a tied embedding is its own head."""
    embedding = tuple(entry for entry in plan.entries if entry.role == Role.EMBEDDING)
    yield _Stage(embedding, ())
    layers = sorted({layer for entry in plan.entries if (layer := layer_of(entry.name)) is not None})
    for layer in layers:
        own = [entry for entry in plan.entries if layer_of(entry.name) == layer]
        yield _Stage(
            tuple(entry for entry in own if not entry.role.is_routed_expert),
            tuple(entry for entry in own if entry.role.is_routed_expert),
        )
    yield _Stage(tuple(entry for entry in plan.entries if entry.role == Role.OUTPUT) or embedding, ())


def _output_channels(entry: PlanEntry) -> int:
    """Return the output channels of a matrix, or of all heads together; GGUF stores k_b the other way round."""
    return prod(entry.shape[:-2]) * entry.shape[-1 if entry.role == Role.MLA_K_B else -2]


def _stage_bytes(stages: list[_Stage], number: int, work: StreamedPass, keeps_experts: bool, reads_ahead: bool) -> int:
    stage, following = stages[number], number + (-1 if work.is_backward else 1)
    total = stage.loaded_bytes + (stage.expert_bytes if keeps_experts else 0)
    if reads_ahead and 0 <= following < len(stages):
        ahead = stages[following]
        total += ahead.dense_bytes + (ahead.expert_bytes if keeps_experts else 0)
    is_head = number == len(stages) - 1
    if is_head and work.is_backward:
        total += 5 * _FLOAT_BYTES * work.batch_tokens * stage.dense[0].shape[0]
    if number > 0 and not is_head:
        total += stage.activation_bytes(work) + work.moment_bytes
    return total
