"""Writes a plan for vLLM as a compressed-tensors checkpoint, which vLLM and transformers load.

All files are written in a hidden directory beside the output and move to its name together at the end. A killed export
goes on where it stopped (`artifacts`) and gives the same bytes.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from dynquant import __version__
from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.checkpoint_directory import (
    SHARD_BYTES,
    as_json,
    copied_files,
    files_hash,
    index_of,
    shards_of,
    tensor_bytes,
    write_small_files,
)
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_format import ShardLayout
from dynquant.encoding.parts import as_slice, ranges
from dynquant.encoding.stream import Guidance, guidance_of
from dynquant.encoding.vllm import EncodedLayer, encode_layers, nvfp4_global_scale
from dynquant.errors import ExportError
from dynquant.exporters.compressed_config import quantization_config
from dynquant.exporters.model_card import compressed_card
from dynquant.exporters.output import writing
from dynquant.families.linear_layers import LinearCheckpoint, LinearLayer
from dynquant.recipes.build_plan import check_linears, schemes_of
from dynquant.recipes.plan import Plan, PlanEntry
from dynquant.recipes.sizes import tensors_of_checkpoint
from dynquant.resources import chosen_device
from dynquant.session import SILENT, Progress, Session
from dynquant.storage.resumable_output import Region, ResumableOutput
from dynquant.storage.strict_json import parse_json

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CPU_WEIGHTS, _GPU_WEIGHTS = 1 << 23, 1 << 27
"""Float32 weights of a stack of experts that are encoded together, at least one expert."""


@dataclass(frozen=True)
class Rounding:
    """The metric under which rounding errors are kept small; by default that of plain squared errors."""

    guidance: Guidance = field(default_factory=Guidance)
    """Importance and hessians of the inputs."""
    words: str = "rounded by their own squared error"
    """The same in words, for the model card."""
    moments: str = "none"
    """Identity of the second moments; an interrupted export goes on only under an equal one."""

    @classmethod
    def under(cls, stats: CalibrationStats, moments: SecondMoments | None) -> "Rounding":
        """Return what calibration knows of the inputs."""
        tokens = f"of {stats.provenance.num_tokens:,} calibration tokens"
        if moments is None:
            return cls(guidance_of(stats, None), f"scales fitted under the mean squares {tokens}")
        words = f"scales and error feedback under the second moments {tokens}"
        return cls(guidance_of(stats, moments), words, moments.identity)


def export_compressed_tensors(
    model: Model,
    plan: Plan,
    checkpoint: LinearCheckpoint,
    output: Path,
    *,
    rounding: Rounding | None = None,
    shard_max_bytes: int | None = None,
    resume: bool = True,
    session: Session = SILENT,
) -> list[Path]:
    """Write `plan` as the directory `output`, which must not exist, and return its files.

    Args:
        model: What the plan is of.
        plan: Schemes of all linear layers.
        checkpoint: `linear_checkpoint` of the model.
        output: The directory to make.
        rounding: What rounding errors are kept small under; default the plain squared error.
        shard_max_bytes: Largest file; default 5 GB.
        resume: False discards an interrupted export.
        session: Where to search, and who hears of weights done.

    Raises:
        PlanError: the plan is not of this model.
        EncodeError: NaN or Inf weights; partial files are removed.
        ExportError: the output exists, there is no space, or an interrupted export of something else is in the way.
    """
    rounding = rounding or Rounding()
    device = torch.device(chosen_device(session.device))
    check_linears(plan, checkpoint, model)
    if output.exists() or output.is_symlink():
        raise ExportError(f"{output} exists already; export to another name, or remove it first.")
    shards = shards_of(tensors_of_checkpoint(checkpoint, schemes_of(plan)), shard_max_bytes or SHARD_BYTES)
    documents = _documents(model, plan, checkpoint, shards, rounding.words)
    staging = output.with_name(f".{output.name}.partial")
    names = [*documents, *shards]
    sizes = [len(content) for content in documents.values()] + [shard.total_bytes for shard in shards.values()]
    identity = {
        "plan": plan.hash,
        "dynquant version": __version__,
        "torch version": torch.__version__,
        "files": files_hash(documents, shards),
        "hessians": rounding.moments,
    }
    paths, regions = [staging / name for name in names], _regions(names, documents, shards)
    target = ResumableOutput(paths, sizes, regions, identity, resume=resume)
    try:
        with writing(target, session) as progress:
            write_small_files(target, documents, shards)
            for name, tensor in _tensors(plan, checkpoint, rounding.guidance, device, target.finished, progress):
                target.write(name, tensor_bytes(tensor))
            target.commit()
    finally:
        if not any(staging.iterdir()):
            staging.rmdir()  # nothing is left of what could not be exported
    _publish(staging, output)
    return [output / name for name in names]


def encode_layer(
    entry: PlanEntry,
    linear: LinearLayer,
    experts: range,
    guidance: Guidance,
    *,
    global_scale: float | None = None,
    device: torch.device | None = None,
) -> list[EncodedLayer]:
    """Return some experts of an entry (of a matrix: the range 0 to 1) as they are stored.

    Raises:
        EncodeError: NaN or Inf weights; the layer is named.
    """
    weights = torch.stack([linear.load(expert) for expert in experts])
    importance = hessian = None
    part = as_slice(experts)
    if guidance.importance is not None:
        importance = guidance.importance(entry.name, entry.shape)
        importance = None if importance is None else importance[part]
    if guidance.hessian is not None:
        hessian = guidance.hessian(entry.name, entry.shape, part)
    return encode_layers(
        entry.scheme,
        weights,
        importance=importance,
        hessian=hessian,
        global_scale=global_scale,
        device=device,
        name=entry.modules[experts.start],
    )


def global_scales(plan: Plan, checkpoint: LinearCheckpoint) -> dict[str, float]:
    """Return NVFP4's global scale by layer, of the layers that have one; those that vLLM fuses have the same."""
    wanted = {entry.name for entry in plan.entries if entry.scheme.strategy == "tensor_group"}
    linears = [linear for linear in checkpoint.linears if linear.name in wanted]
    peaks: dict[str, float] = {}
    for linear in linears:
        peak = max(float(linear.load(expert).abs().max()) for expert in range(linear.num_experts))
        peaks[linear.fusion] = max(peak, peaks.get(linear.fusion, 0.0))
    return {linear.name: nvfp4_global_scale(peaks[linear.fusion]) for linear in linears}


def _tensors(
    plan: Plan,
    checkpoint: LinearCheckpoint,
    guidance: Guidance,
    device: torch.device,
    finished: set[str],
    progress: Progress,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor that is not finished, with its name."""
    for tensor in checkpoint.others:
        if tensor.key not in finished:
            yield tensor.key, checkpoint.source.load(tensor.key).to(_TORCH_DTYPES[tensor.dtype])
    linears = {linear.name: linear for linear in checkpoint.linears}
    scales = global_scales(plan, checkpoint)
    at_once = _CPU_WEIGHTS if device.type == "cpu" else _GPU_WEIGHTS
    total, done = sum(prod(entry.shape) for entry in plan.entries), 0
    for entry in plan.entries:
        progress("quantize", done, total, unit="weights", tensor=entry.name)
        suffixes = [part.key for part in entry.scheme.parts(*entry.shape[-2:])]
        for experts in ranges(len(entry.modules), max(1, at_once // prod(entry.shape[-2:]))):
            modules = entry.modules[experts.start : experts.stop]
            if not {f"{module}.{suffix}" for module in modules for suffix in suffixes} <= finished:
                encoded = encode_layer(
                    entry, linears[entry.name], experts, guidance, global_scale=scales.get(entry.name), device=device
                )
                for module, one in zip(modules, encoded, strict=True):
                    for suffix, tensor in one.stored().items():
                        if f"{module}.{suffix}" not in finished:
                            yield f"{module}.{suffix}", tensor
            done += len(experts) * prod(entry.shape[-2:])
            progress("quantize", done, total, unit="weights", tensor=entry.name)


def _documents(
    model: Model, plan: Plan, checkpoint: LinearCheckpoint, shards: Mapping[str, ShardLayout], rounding: str
) -> dict[str, bytes]:
    """Return the small files by name."""
    config = parse_json((checkpoint.directory / "config.json").read_bytes())
    config.pop("torch_dtype", None)
    config |= {"dtype": "bfloat16", "quantization_config": quantization_config(plan, checkpoint, model.hyper.n_layer)}
    documents = {"config.json": as_json(config), "README.md": compressed_card(plan, rounding=rounding).encode()}
    return documents | index_of(shards) | copied_files(checkpoint.directory)


def _regions(names: list[str], documents: Mapping[str, bytes], shards: Mapping[str, ShardLayout]) -> dict[str, Region]:
    number = {name: index for index, name in enumerate(names)}
    regions = {name: Region(number[name], 0, len(content)) for name, content in documents.items()}
    for name, shard in shards.items():
        regions[name] = Region(number[name], 0, len(shard.header))
        regions |= {key: Region(number[name], *span) for key, span in shard.spans.items()}
    return regions


def _publish(staging: Path, output: Path) -> None:
    try:
        os.rename(staging, output)
    except OSError as error:
        raise ExportError(
            f"The finished checkpoint in {staging} could not be moved to {output}: {error.strerror}. Move it yourself."
        ) from error
