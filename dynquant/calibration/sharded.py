"""Calibration in shards of windows, here or on a Ray cluster: statistics are sums, so shards may run anywhere.

Sums of floats depend on their order. Shards are therefore cut by window number alone, each is summed from zero, and
they are merged by number: the result does not depend on how many workers there are or which of them die. It differs in
the last bits from the one sum of `collect_statistics`, and between CPUs whose products round differently. The windows
that are held back are one shard. Every worker holds the whole model and opens it by path.
"""

import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from dynquant.calibration.run import HELD_BACK, Calibration, Hessians, collect_statistics, num_held_back
from dynquant.calibration.statistics import StatsProvenance
from dynquant.checkpoints.model import Model
from dynquant.errors import ClusterError, DynquantError, StatsError
from dynquant.families.open import open_model
from dynquant.running.cluster import RayPool, TaskNeeds
from dynquant.running.load import load_hf
from dynquant.session import Progress

SHARD_WINDOWS = 16
"""Windows of a shard; its second moments travel once, whatever it holds."""


@dataclass(frozen=True)
class ShardSettings:
    """What all shards of a calibration share."""

    model: Path
    fingerprint: str
    base_gguf: Path | None
    device: str
    batch_size: int
    hessians: Hessians
    hessian_bytes: int


@dataclass(frozen=True)
class Shard:
    """Token ids [n, window]; `is_held`: sampled only. `provenance` has a seed of its own."""

    number: int
    windows: torch.Tensor
    is_held: bool
    provenance: StatsProvenance


def calibrate_in_shards(
    model: Model,
    windows: torch.Tensor,
    provenance: StatsProvenance,
    *,
    base_gguf: Path | None = None,
    held_back: float = HELD_BACK,
    device: str = "cpu",
    batch_size: int = 4,
    hessians: Hessians = "none",
    hessian_bytes: int,
    pool: RayPool | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """What `collect_statistics` measures on token ids [windows, window], summed by shards; on `pool`, or here.

    Raises:
        StatsError: no window, or a model that cannot be observed.
        ClusterError: a node does not read the same checkpoint, or tasks are lost again and again.
    """
    shards = cut(windows, provenance, held_back)
    settings = ShardSettings(
        model.path.resolve(), model.fingerprint, base_gguf and base_gguf.resolve(), device, batch_size, hessians,
        hessian_bytes,
    )  # fmt: skip
    task = partial(collect_shard, settings)
    if pool is None:
        results: Iterable[tuple[Shard, Calibration]] = ((shard, task(shard)) for shard in shards)
    else:
        results = pool.run(task, shards, TaskNeeds(gpus=int(device.startswith("cuda"))), ordered=True)
    return _merged(results, windows, provenance, progress)


def cut(windows: torch.Tensor, provenance: StatsProvenance, held_back: float) -> list[Shard]:
    """Shards by window number; the last one holds back.

    Raises:
        StatsError: no window.
    """
    if windows.ndim != 2 or not len(windows):
        raise StatsError("The calibration text gives no window of tokens; give a longer text.")
    num_held = num_held_back(len(windows), held_back)
    summed, held = windows[: len(windows) - num_held], windows[len(windows) - num_held :]
    parts = [(part, False) for part in summed.split(SHARD_WINDOWS)] + [(held, True)] * bool(num_held)
    return [
        Shard(number, part.clone(), is_held, provenance.model_copy(update={"seed": provenance.seed + number}))
        for number, (part, is_held) in enumerate(parts)
    ]


def collect_shard(settings: ShardSettings, shard: Shard) -> Calibration:
    """Statistics of one shard; the process keeps the model for the next one."""
    model, hf_model = _opened(settings.model, settings.fingerprint, settings.base_gguf, settings.device)
    return collect_statistics(
        hf_model, shard.windows,
        arch=model.arch, n_layer=model.hyper.n_layer, provenance=shard.provenance,
        held_back=1.0 if shard.is_held else 0.0, batch_size=settings.batch_size, hessians=settings.hessians,
        hessian_bytes=settings.hessian_bytes,
    )  # fmt: skip


def _merged(
    results: Iterable[tuple[Shard, Calibration]],
    windows: torch.Tensor,
    provenance: StatsProvenance,
    progress: Progress | None,
) -> Calibration:
    rest: Iterator[tuple[Shard, Calibration]] = iter(results)
    shard, total = next(rest)
    done, left_out, num_held = shard.windows.numel(), dict.fromkeys(total.left_out), 0
    for shard, found in rest:
        if progress is not None:
            progress("calibrate", done, windows.numel(), unit="tokens")
        total.stats.merge(found.stats)
        left_out |= dict.fromkeys(found.left_out)
        if shard.is_held:
            num_held = shard.windows.numel()
        elif total.moments is not None and found.moments is not None:
            total.moments.merge(found.moments)
        done += shard.windows.numel()
    if progress is not None:
        progress("calibrate", done, windows.numel(), unit="tokens")
    counted = {
        "num_windows": len(windows),
        "num_tokens": windows.numel() - num_held,
        "num_held_back_tokens": num_held,
        "window": windows.shape[1],
    }
    total.stats.provenance = provenance.model_copy(update=counted)
    if total.moments is not None:
        total.moments.provenance = total.stats.provenance
    return Calibration(total.stats, total.moments, total.pools_experts, tuple(left_out))


@cache
def _opened(path: Path, fingerprint: str, base_gguf: Path | None, device: str) -> tuple[Model, torch.nn.Module]:
    try:
        model = open_model(path, base_gguf=base_gguf)
        if model.fingerprint == fingerprint:
            return model, load_hf(model, device=device)
    except DynquantError as error:
        raise ClusterError(
            f"{socket.gethostname()} cannot open the model: {error} Put it on storage that every node has at the same "
            "path."
        ) from error
    raise ClusterError(
        f"{socket.gethostname()} has another checkpoint at {path} (fingerprint {model.fingerprint[:12]} instead of "
        f"{fingerprint[:12]}). Put the same one there on every node."
    )
