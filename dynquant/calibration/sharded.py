"""Calibration in shards of windows, here or on a Ray cluster: statistics are sums, so shards may run anywhere.

Sums of floats depend on their order. Shards are therefore cut by window number alone, each is summed from zero, and
they are merged by number: the result does not depend on how many workers there are or which of them die. It differs in
the last bits from the one sum of `collect_statistics`, and between CPUs whose products round differently. The windows
that are held back are one shard. Every worker holds the whole model and opens it by path.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from dynquant.calibration.run import Calibration, StatisticsOptions, collect_statistics, split_inputs
from dynquant.calibration.statistics import StatsProvenance
from dynquant.checkpoints.model import Model
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.running.cluster import RayPool, StoredModel, TaskNeeds
from dynquant.running.load import load_hf
from dynquant.running.weight_inputs import weight_inputs
from dynquant.running.weights import add_layer_ahead
from dynquant.session import Progress, ignore_progress

SHARD_WINDOWS = 16  # windows of a shard; its second moments travel once, whatever it holds


@dataclass(frozen=True)
class Shard:
    """Some windows; `is_held`: sampled only. `provenance` has a seed of its own."""

    number: int
    inputs: ModelInputs
    is_held: bool
    provenance: StatsProvenance


def calibrate_in_shards(
    model: Model,
    inputs: ModelInputs,
    provenance: StatsProvenance,
    options: StatisticsOptions,
    *,
    device: str = "cpu",
    pool: RayPool | None = None,
    progress: Progress = ignore_progress,
) -> Calibration:
    """Return what `collect_statistics` measures on windows of text, summed by shards; on `pool`, or here.

    Raises:
        StatsError: no window, or a model that cannot be observed.
        ClusterError: a node does not read the same checkpoint, or tasks are lost again and again.
    """
    shards = cut(inputs, provenance, options.held_back)
    task = partial(_collect, StoredModel.of(model), device, options)
    if pool is None:
        results: Iterable[tuple[Shard, Calibration]] = ((shard, task(shard)) for shard in shards)
    else:
        results = pool.run(task, shards, TaskNeeds(gpus=int(device.startswith("cuda"))), ordered=True)
    total: Calibration | None = None
    done, left_out = 0, dict[str, None]()  # a set in the order of arrival
    progress("calibrate", 0, inputs.num_tokens, unit="tokens")
    for shard, part in results:
        left_out |= dict.fromkeys(part.left_out)
        if total is None:
            total = part
        else:
            total.stats.merge(part.stats)
            if not shard.is_held and total.moments is not None and part.moments is not None:
                total.moments.merge(part.moments)  # held-back shards give samples alone
        done += shard.inputs.num_tokens
        progress("calibrate", done, inputs.num_tokens, unit="tokens")
    assert total is not None
    provenance, num_moments = split_inputs(inputs, provenance, options.held_back).provenance, 0
    total.stats.provenance = provenance
    if total.moments is not None:
        total.moments.provenance, num_moments = provenance, len(total.moments.sums)
    return replace(total, left_out=tuple(left_out), num_moments=num_moments)


def cut(inputs: ModelInputs, provenance: StatsProvenance, held_back: float) -> list[Shard]:
    """Return shards by window number, of which the last one holds back, or raise StatsError for no window."""
    summed, held, _ = split_inputs(inputs, provenance, held_back)
    parts = [(part, False) for part in summed.windows.split(SHARD_WINDOWS)] + [(held.windows, True)] * bool(len(held))
    return [
        # Copied, because a slice of a tensor would travel with all of it.
        Shard(
            number, replace(inputs, samples=part.clone()), is_held,
            provenance.model_copy(update={"seed": provenance.seed + number}),
        )
        for number, (part, is_held) in enumerate(parts)
    ]  # fmt: skip


def _collect(stored: StoredModel, device: str, options: StatisticsOptions, shard: Shard) -> Calibration:
    """Return the statistics of one shard; the process keeps the model for the next one."""
    model, hf_model = _opened(stored, device)
    return collect_statistics(
        hf_model, shard.inputs, names=weight_inputs(model, hf_model), provenance=shard.provenance,
        options=replace(options, held_back=1.0 if shard.is_held else 0.0),
    )  # fmt: skip


@cache
def _opened(stored: StoredModel, device: str) -> tuple[Model, torch.nn.Module]:
    model = stored.open()
    hf_model = load_hf(model, device=device)
    add_layer_ahead(model, hf_model)
    return model, hf_model
