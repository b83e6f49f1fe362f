"""The stages that run the original: calibration, and the probe for super weights and sensitivities.

Both load the model whole where it fits, and stream it layer by layer where it does not or a limit is given.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dynquant.analysis.outliers.super_weights import SuperWeight, find_super_weights
from dynquant.analysis.sensitivity.closed_form import output_sensitivity, streamed_sensitivity
from dynquant.calibration.picture_collector import VisionCalibration
from dynquant.calibration.picture_stage import TEXT_ONLY, DataOptions, calibrate_on_samples, probe_inputs, remove_kinds
from dynquant.calibration.run import Calibration, Hessians, calibrate, windows_of
from dynquant.calibration.second_moments import path_beside
from dynquant.calibration.statistics import CalibrationStats
from dynquant.calibration.streamed import StreamedCalibration, calibrate_streamed
from dynquant.checkpoints.model import Model
from dynquant.cli.terminal import console
from dynquant.errors import PlanError, StatsError
from dynquant.families.common.conversion import RecipeSource
from dynquant.planning.target import parse_size
from dynquant.resources import chosen_device
from dynquant.running.layer_stream import LayerStream
from dynquant.running.load import computing_type, load_hf
from dynquant.running.staged_passes import StagedPasses
from dynquant.running.stream_memory import COMFORTABLE_SHARE, Workload, fit_within, free_memory
from dynquant.session import Progress

PROBE_TOKENS = 4096
"""Tokens of the backward pass that measures sensitivities."""

_PROBE_KEEPS = "Errors are kept; the sensitivities measured so far are lost."
_LIMIT_SHARE = 0.85
"""Of the free memory, when a model is streamed without being asked."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to run the model on (`text=None` is the built-in text), what to measure there, and in how much memory.

    With `data`, a file of samples with images, there is no text; `strict` refuses images that cannot be decoded.
    """

    text: str | None = None
    tokens: int = 131072
    window: int = 512
    seed: int = 0
    hessians: Hessians = "activations"
    hessian_memory: str = "8GiB"
    device: str | None = None
    max_memory: str | None = None
    """Limit of the process, as 8GB; the model is then streamed. None streams what does not fit into the free memory."""
    spill: Path | None = None
    """Directory for hidden states of a streamed model; None is the output's own."""
    ray: str | None = None
    """Address of a Ray cluster on which to run it in shards of windows."""
    data: str | None = None
    strict: bool = False

    @property
    def samples(self) -> DataOptions | None:
        return None if self.data is None else DataOptions(self.data, self.tokens, self.seed, self.strict)


@dataclass(frozen=True)
class Probe:
    """What a backward pass and ablations told of the original."""

    super_weights: list[SuperWeight] = field(default_factory=list)
    sensitivity: dict[str, float] = field(default_factory=dict)
    sensitivity_se: dict[str, float] = field(default_factory=dict)


def run_calibration(
    model: Model, options: CalibrationOptions, output: Path, *, base_gguf: Path | None = None
) -> CalibrationStats:
    """Write the statistics, and the second moments beside them when they are asked for.

    Raises:
        PlanError: a memory limit together with a cluster.
        StatsError: an option that a vision-language model does not take.
    """
    if options.ray is not None and (options.max_memory is not None or options.spill is not None):
        raise PlanError(
            "Every worker of a cluster holds the model whole, so --max-memory and --spill do not go with --ray; leave "
            "out one or the other."
        )
    device = chosen_device(options.device)
    _check_vision(model, options)
    limit = None if options.ray is not None else streaming_limit(model, options, device)
    if options.samples is not None:
        stats, pools_experts, left_out, count = _calibrate_on_samples(model, options, output)
    elif limit is None:
        stats, pools_experts, left_out, count = _calibrate_whole(model, options, device, output, base_gguf)
    else:
        found = _calibrate_streamed(model, options, device, output, limit)
        stats, pools_experts, left_out, count = found.stats, found.pools_experts, found.left_out, found.num_moments
    moments_path = path_beside(output)
    if options.hessians != "none":
        size = console.human_bytes(moments_path.stat().st_size)
        pooled = ", one for each layer's experts" if pools_experts else ""
        console.note(f"wrote {moments_path}: {count} second moments{pooled}, {size}")
    else:
        moments_path.unlink(missing_ok=True)
    if left_out:
        console.note(
            f"no second moments for {len(left_out)} inputs, because --hessian-memory {options.hessian_memory} is "
            f"used up; they are encoded without error feedback: {', '.join(left_out)}"
        )
    return stats


def run_probe(model: Model, options: CalibrationOptions, directory: Path, *, finds_super_weights: bool = True) -> Probe:
    """Super weights, and the sensitivity of the output to every tensor; computed in float32 on the CPU.

    Raises:
        CheckpointError: transformers cannot load the model.
        StatsError: a memory limit that is too small for it.
    """
    if options.samples is not None:
        inputs = probe_inputs(model, replace(options.samples, tokens=PROBE_TOKENS))
        hf_model = load_hf(model)
        with console.stage_progress(_PROBE_KEEPS) as progress:
            found_on_samples = output_sensitivity(
                hf_model, model.arch, model.hyper.n_layer, inputs, seed=options.seed, progress=progress
            )
        return Probe([], *found_on_samples)  # super weights are looked for with text alone
    windows, _ = windows_of(model, options.text, tokens=PROBE_TOKENS, window=options.window, seed=options.seed)
    arch, n_layer = model.arch, model.hyper.n_layer
    limit = streaming_limit(model, options, "cpu")
    if limit is None:
        hf_model = load_hf(model)
        found = find_super_weights(hf_model, arch, n_layer, windows[0]) if finds_super_weights else []
        with console.stage_progress(_PROBE_KEEPS) as progress:
            return Probe(
                found, *output_sensitivity(hf_model, arch, n_layer, windows, seed=options.seed, progress=progress)
            )
    stream = LayerStream(model)
    fit_within(stream, limit, Workload(windows.shape[1], is_backward=True))
    with stream.running(), _scratch((options.spill or directory) / ".probe.streaming") as scratch:
        found = []
        if finds_super_weights:
            found = find_super_weights(stream.hf_model, arch, n_layer, windows[0], zeroed=stream.zeroed)
        passes = StagedPasses(stream, windows.split(1), scratch)
        with console.stage_progress(_PROBE_KEEPS) as progress:
            return Probe(found, *streamed_sensitivity(passes, arch, n_layer, seed=options.seed, progress=progress))


def streaming_limit(model: Model, options: CalibrationOptions, device: str) -> int | None:
    """Bytes within which the model is to be streamed, or None to load it whole."""
    if model.has_vision:
        return None
    if options.max_memory is not None:
        return parse_size(options.max_memory)
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory()
    needed = model.num_weights * (2 if on_gpu else 4)
    if needed <= COMFORTABLE_SHARE * free or not isinstance(model.source, RecipeSource):
        return None
    limit = int(_LIMIT_SHARE * free_memory())
    console.note(
        f"{model.name} takes {console.human_bytes(needed)} as floats and {console.human_bytes(free)} are free: it is "
        f"streamed layer by layer within {console.human_bytes(limit)}. --max-memory sets another limit"
    )
    return limit


def _check_vision(model: Model, options: CalibrationOptions) -> None:
    if not model.has_vision:
        return
    for option, given in (("--max-memory", options.max_memory), ("--ray", options.ray)):
        if given is not None:
            raise StatsError(f"{model.name} has a vision tower and is run whole, in one process; leave {option} out.")
    if options.samples is not None and options.hessians == "gradients":
        raise StatsError("--hessians gradients runs on text; with --data give activations or none.")


def _calibrate_on_samples(
    model: Model, options: CalibrationOptions, output: Path
) -> tuple[CalibrationStats, bool, tuple[str, ...], int]:
    hessian_bytes = parse_size(options.hessian_memory) if options.hessians == "activations" else None
    found = calibrate_on_samples(model, options.samples, output, device=options.device, hessian_bytes=hessian_bytes)
    return _saved(found, output)


def _calibrate_whole(
    model: Model, options: CalibrationOptions, device: str, output: Path, base_gguf: Path | None
) -> tuple[CalibrationStats, bool, tuple[str, ...], int]:
    remove_kinds(output)
    if model.has_vision:
        console.note(TEXT_ONLY)
    with console.stage_progress("Calibration is not kept: what it has measured so far is lost.") as progress:
        if options.ray is not None:
            found = _calibrate_on_ray(model, options, base_gguf, progress)
        else:
            found = calibrate(model, options.text, progress=progress, **_measured(options, device), **_read(options))
    return _saved(found, output)


def _saved(found: Calibration | VisionCalibration, output: Path) -> tuple[CalibrationStats, bool, tuple[str, ...], int]:
    """Write what was measured in one piece."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if found.moments is not None:
        found.moments.save(path_beside(output))
    found.stats.save(output)
    return found.stats, found.pools_experts, found.left_out, len(found.moments.sums) if found.moments else 0


def _calibrate_on_ray(
    model: Model, options: CalibrationOptions, base_gguf: Path | None, progress: Progress
) -> Calibration:
    from dynquant.calibration.sharded import calibrate_in_shards
    from dynquant.running.cluster import open_ray

    windows, provenance = windows_of(model, options.text, **_read(options))
    with open_ray(str(options.ray)) as pool:
        device = options.device or ("cuda" if pool.has_gpus else "cpu")
        return calibrate_in_shards(
            model, windows, provenance, base_gguf=base_gguf, pool=pool, progress=progress,
            **_measured(options, "cuda" if device.startswith("cuda") else device),
        )  # fmt: skip


def _calibrate_streamed(
    model: Model, options: CalibrationOptions, device: str, output: Path, limit: int
) -> StreamedCalibration:
    windows, provenance = windows_of(model, options.text, **_read(options))
    dtype = computing_type(model, device)
    with console.stage_progress("Finished layers are kept.") as progress:
        found = calibrate_streamed(
            model, windows, provenance, output, limit_bytes=limit, spill=options.spill, dtype=dtype, progress=progress,
            **_measured(options, device),
        )  # fmt: skip
    if found.first_stage:
        console.note(f"went on with an interrupted calibration, {found.first_stage} of its stages were there")
    return found


def _read(options: CalibrationOptions) -> dict[str, Any]:
    return {"tokens": options.tokens, "window": options.window, "seed": options.seed}


def _measured(options: CalibrationOptions, device: str) -> dict[str, Any]:
    return {
        "device": device,
        "batch_size": 16 if device.startswith("cuda") else 4,
        "hessians": options.hessians,
        "hessian_bytes": parse_size(options.hessian_memory),
    }


@contextmanager
def _scratch(directory: Path) -> Iterator[Path]:
    """An empty directory that is gone afterwards."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
