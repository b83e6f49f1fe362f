"""Memory of a streamed model, and ways to run it within a limit.

The limit is for the whole process as the system counts it (resident set). Of a stage are counted its weights, those of
the stage that is read ahead, activations of one batch, and the second moments of one layer. What does not fit is given
up in this order: reading ahead, then keeping a layer's experts in memory while its batches run.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dynquant.errors import StatsError
from dynquant.resources import free_memory
from dynquant.running.expert_hooks import expert_layout, expert_modules, expert_stack
from dynquant.running.streaming.layer_stream import LayerStream

COMFORTABLE_SHARE = 0.7
"""A model whose float weights take more than this share of the free memory is streamed without being asked."""

_ACTIVATIONS_SHARE = 0.25
"""Activations of windows that go through a loaded model at a time, at most this share of the free memory: more passes
of fewer windows take seconds longer, and a mixture of 7B weights kept as much as its weights in float32."""
MOST_TOKENS_AT_ONCE = 4096
"""More at a time make a GPU no faster."""
_SHARES_INPUT = ("k_proj", "v_proj", "up_proj", "kv_a_proj_with_mqa")
WAYS_TO_RUN = ((True, True), (True, False), (False, True), (False, False))
"""Pairs of experts kept and next stage read ahead, from the fastest way to the most frugal one."""
RESERVE_BYTES = 200 * 2**20
"""For libraries that load late, and memory that the allocator holds back."""


@dataclass(frozen=True)
class Workload:
    """Inputs that go through the model at a time."""

    batch_tokens: int
    is_backward: bool = False
    moments: bool = False
    pools_experts: bool = True
    has_outputs: bool = False


def free_memory_of(device: torch.device | str) -> int:
    """Bytes that this process can still take on a device; on a GPU also what PyTorch holds back of freed tensors."""
    device = torch.device(device)
    if device.type == "cpu":
        return free_memory()
    held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held_back


def resident_memory() -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0


def fit_within(stream: LayerStream, limit_bytes: int, work: Workload) -> None:
    """Choose how `stream` is run to stay within the limit, or raise StatsError that names the least possible one."""
    fixed = resident_memory() + RESERVE_BYTES
    for keeps_experts, reads_ahead in WAYS_TO_RUN:
        stream.keeps_experts, stream.reads_ahead = keeps_experts, reads_ahead
        needed = fixed + max(_stage_bytes(stream, stage, work) for stage in range(stream.num_stages))
        if needed <= limit_bytes:
            return
    raise StatsError(
        f"A memory limit of {limit_bytes:,} bytes is too small: the largest stage of this model takes {needed:,} "
        f"({fixed:,} of them are taken before a weight is read). Give --max-memory {-(-needed // 10**8) / 10:.1f}GB or "
        "more, a shorter --window, or --hessians none."
    )


def windows_at_once(hf_model: nn.Module, window: int, free_bytes: int) -> int:
    """Return how many windows can go forward and back through a loaded model at a time, at least one."""
    work = Workload(min(window, MOST_TOKENS_AT_ONCE), is_backward=True)
    needed = 4 * work.batch_tokens * _layer_channels(hf_model, work)
    return max(1, min(MOST_TOKENS_AT_ONCE // work.batch_tokens, int(_ACTIVATIONS_SHARE * free_bytes / needed)))


def _stage_bytes(stream: LayerStream, stage: int, work: Workload) -> int:
    other = stage - 1 if work.is_backward else stage + 1
    ahead = stream.stored_bytes(other) if stream.reads_ahead and 0 <= other < stream.num_layers + 2 else 0
    # A tensor is there twice while it is converted.
    weights = stream.dense_bytes(stage) + stream.largest_tensor_bytes(stage)
    weights += stream.expert_bytes(stage) if stream.keeps_experts else 0
    is_ahead = stage == stream.num_layers + 2
    if is_ahead:
        weights += stream.dense_bytes(0) + stream.dense_bytes(stage - 1)
    hidden, moments = stream.hf_model.get_input_embeddings().embedding_dim, 0
    if stage == 0:
        channels = hidden
    else:
        channels = 0
        if stage > stream.num_layers:
            vocabulary = stream.hf_model.get_output_embeddings().out_features if work.is_backward else 0
            channels = 5 * vocabulary + 6 * hidden
        if is_ahead or stage <= stream.num_layers:
            layer = stream.ahead.root if is_ahead else stream.layers[stage - 1]
            channels += _layer_channels(layer, work)
            moments = _moment_bytes(layer, work) if work.moments else 0
    return weights + ahead + 4 * work.batch_tokens * channels + moments


def activation_channels(linears: int, experts: int, experts_used: int, *, is_backward: bool) -> int:
    """Channels of a token that a layer holds at its peak, from those that its linear layers and one expert give.

    Four times what is there once. A backward pass keeps ten times that of linear layers (norms, attention and gradients
    among it); of every used expert twice: gate and up, the activated gate, the product and the output. The third is for
    gaps between them.
    """
    return 10 * linears + 3 * experts * experts_used if is_backward else 4 * (linears + experts)


def _layer_channels(layer: nn.Module, work: Workload) -> int:
    linears = sum(module.out_features for module in layer.modules() if isinstance(module, nn.Linear))
    rows, used = 0, 1
    for experts in expert_modules(layer).values():
        layout = expert_layout(experts)
        rows += sum(
            expert_stack(experts, name).shape[2 if name in layout.transposed else 1]
            for name in (*layout.inner, layout.down)
        )
        used = getattr(getattr(experts, "config", None), "num_experts_per_tok", 1)
    return activation_channels(linears, rows, used, is_backward=work.is_backward)


def _moment_bytes(layer: nn.Module, work: Workload) -> int:
    linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    total = sum(4 * module.in_features**2 for name, module in linears.items() if not name.endswith(_SHARES_INPUT))
    if work.has_outputs:
        total += sum(4 * module.out_features**2 for module in linears.values())
    for experts in expert_modules(layer).values():
        shape = expert_stack(experts, expert_layout(experts).down).shape
        total += 4 * (1 if work.pools_experts else shape[0]) * (shape[1] ** 2 + shape[2] ** 2) * (1 + work.has_outputs)
    return total
