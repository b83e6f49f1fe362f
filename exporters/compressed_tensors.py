"""Writes a plan for vLLM as a compressed-tensors checkpoint, which vLLM and transformers load.

All files are written in a hidden directory beside the output and move to its name together at the end. A killed export
goes on where it stopped (`artifacts`) and gives the same bytes.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

import torch

from dynquant.checkpoints import checkpoint_directory as directory
from dynquant.checkpoints.published.packed_parts import has_known_schemes
from dynquant.checkpoints.safetensors_format import ShardLayout
from dynquant.checkpoints.safetensors_source import checkpoint_spans
from dynquant.encoding.parts import WeightChecks, as_slice, ranges
from dynquant.encoding.stream import Guidance
from dynquant.encoding.vllm import EncodedLayer, encode_layers, nvfp4_global_scale
from dynquant.errors import ExportError
from dynquant.exporters.compressed_config import served_config, transformers_problem
from dynquant.exporters.model_card import CARD_NAME, compressed_card, with_closing_pass
from dynquant.exporters.output import Encoding
from dynquant.families.common.config import quantization_of
from dynquant.families.linear_layers import LinearCheckpoint, LinearLayer
from dynquant.formats.plain_quants import FLOAT_DTYPES
from dynquant.recipes.build_plan import check_linears, schemes_of
from dynquant.recipes.plan import Plan, PlanEntry
from dynquant.recipes.sizes import tensors_of_checkpoint
from dynquant.resources import free_memory
from dynquant.session import Progress
from dynquant.storage.atomic import writing_folder
from dynquant.storage.work_files import STAGING, check_folder, work_path
from dynquant.workers import side_by_side

_CPU_WEIGHTS, _GPU_WEIGHTS = 1 << 23, 1 << 27
"""Float32 weights of a stack of experts that are encoded together, at least one expert."""


def export_compressed_tensors(
    encoding: Encoding, checkpoint: LinearCheckpoint, output: Path, *, shard_max_bytes: int | None = None
) -> list[Path]:
    """Write a plan for vLLM as the directory `output`, which must not exist, and return its files.

    `checkpoint` is `linear_checkpoint` of the model. Layers are searched by the dynquant encoder, on its device.

    Raises:
        PlanError: the plan is not of this model.
        EncodeError: NaN or Inf weights; partial files are removed.
        ExportError: the output exists, there is no space, or an interrupted export of something else is in the way.
    """
    plan = encoding.plan
    check_linears(plan, checkpoint, encoding.model)
    check_is_free(output)
    shards = directory.shards_of(
        tensors_of_checkpoint(checkpoint, schemes_of(plan)), shard_max_bytes or directory.SHARD_BYTES
    )
    documents = _documents(encoding, checkpoint, shards)
    staging = work_path(output, STAGING)
    if staging.is_symlink():
        staging.unlink()  # files there are not ours to replace
    places, header_hash = directory.places_of(staging, documents, shards), directory.files_hash(documents, shards)
    try:
        with encoding.writing(*places, header_hash) as (target, progress):
            directory.write_small_files(target, documents, shards)
            with closing(_tensors(encoding, checkpoint, target.finished, progress)) as tensors:
                for name, tensor in tensors:
                    target.write(name, directory.tensor_bytes(tensor))
            paths = target.commit()
    finally:
        if staging.is_dir() and not any(staging.iterdir()):
            staging.rmdir()  # nothing is left of what could not be exported
    try:
        os.rename(staging, output)
    except OSError as error:
        raise ExportError(
            f"The finished checkpoint in {staging} could not be moved to {output}: {error.strerror}. Move it yourself."
        ) from error
    if problem := transformers_problem(plan):
        encoding.session.note(f"vLLM loads this checkpoint, transformers does not: {problem}")
    return [output / path.name for path in paths]


def write_patched(source: Path, output: Path, replacements: Mapping[str, torch.Tensor], *, outcome: str) -> list[Path]:
    """Write the checkpoint `source` as the new directory `output` with other values of some stored tensors, and a card
    with the `outcome` of what made them. Raises WriteError: no space or no permission; nothing is left behind."""
    spans = checkpoint_spans(source)
    patches: dict[str, list[tuple[int, memoryview]]] = {}
    for name, values in replacements.items():
        patches.setdefault(spans[name].path.name, []).append((spans[name].offset, directory.tensor_bytes(values)))
    names = sorted(path.name for path in source.iterdir() if path.is_file())
    with writing_folder(output) as folder:
        for name in names:
            shutil.copyfile(source / name, folder / name)
            with (folder / name).open("r+b") as target:
                for offset, data in patches.get(name, ()):
                    target.seek(offset)
                    target.write(data)
                if name == CARD_NAME:
                    card = with_closing_pass(target.read().decode(), outcome).encode()
                    target.seek(0)
                    target.truncate()
                    target.write(card)
                target.flush()
                os.fsync(target.fileno())
    return [output / name for name in names]


def check_is_free(output: Path) -> None:
    """Raise ExportError for an output that exists, and WriteError for something else where it would be prepared."""
    if output.exists() or output.is_symlink():
        raise ExportError(f"{output} exists already; export to another name, or remove it first.")
    if not (staging := work_path(output, STAGING)).is_symlink():
        check_folder(staging)


def check_is_compressed(path: Path) -> None:
    """Raise ExportError for a directory that is no compressed-tensors checkpoint of schemes that are known here."""
    quantization = quantization_of(path)
    if quantization.get("quant_method") != "compressed-tensors" or not has_known_schemes(quantization):
        raise ExportError(
            f"{path} is a directory, and no compressed-tensors checkpoint with weights alone quantized. Give one of "
            "those, or a .gguf file."
        )


def encode_layer(
    entry: PlanEntry,
    linear: LinearLayer,
    experts: range,
    guidance: Guidance,
    *,
    checks: WeightChecks | None = None,
    **options: Any,
) -> list[EncodedLayer]:
    """Return some experts of an entry (of a matrix: the range 0 to 1) as they are stored.

    `options` are `global_scale` and `device` of `encode_layers`.

    Raises:
        EncodeError: NaN or Inf weights; the layer is named.
    """
    weights = torch.stack([linear.load(expert) for expert in experts])
    if checks is not None:
        checks.add(entry.name, entry.shape, experts, weights)
    part = as_slice(experts)
    importance = guidance.importance and guidance.importance(entry.name, entry.shape)
    return encode_layers(
        entry.scheme,
        weights,
        importance=None if importance is None else importance[part],
        hessian=guidance.hessian and guidance.hessian(entry.name, entry.shape, part),
        name=entry.modules[experts.start],
        **options,
    )


def global_scales(plan: Plan, checkpoint: LinearCheckpoint) -> dict[str, float]:
    """Return NVFP4's global scale by layer, of the layers that have one; those that vLLM fuses have the same."""
    names = {entry.name for entry in plan.entries if entry.scheme.strategy == "tensor_group"}
    linears = [linear for linear in checkpoint.linears if linear.name in names]
    peaks: dict[str, float] = {}
    for linear in linears:
        peak = max(float(linear.load(expert).abs().max()) for expert in range(linear.num_experts))
        peaks[linear.fusion] = max(peak, peaks.get(linear.fusion, 0.0))
    return {linear.name: nvfp4_global_scale(peaks[linear.fusion]) for linear in linears}


def _tensors(
    encoding: Encoding, checkpoint: LinearCheckpoint, finished: set[str], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor that is not finished, with its name."""
    for tensor in checkpoint.others:
        if tensor.key not in finished:
            values = checkpoint.source.load(tensor.key)
            encoding.checks.add(tensor.key, tuple(values.shape), range(1), values)
            yield tensor.key, values.to(FLOAT_DTYPES[tensor.dtype])
    plan, device = encoding.plan, encoding.encoder.device
    linears = {linear.name: linear for linear in checkpoint.linears}
    scales = global_scales(plan, checkpoint)
    at_once = _CPU_WEIGHTS if device.type == "cpu" else _GPU_WEIGHTS
    total, done = sum(prod(entry.shape) for entry in plan.entries), 0

    def is_finished(entry: PlanEntry, experts: range) -> bool:
        suffixes = [part.key for part in entry.scheme.parts(*entry.shape[-2:])]
        modules = entry.modules[experts.start : experts.stop]
        return {f"{module}.{suffix}" for module in modules for suffix in suffixes} <= finished

    def encode(piece: tuple[PlanEntry, range]) -> dict[str, torch.Tensor]:
        entry, experts = piece
        options = {"global_scale": scales.get(entry.name), "device": device}
        layers = encode_layer(entry, linears[entry.name], experts, encoding.guidance, checks=encoding.checks, **options)
        modules = entry.modules[experts.start : experts.stop]
        pairs = zip(modules, layers, strict=True)
        return {f"{module}.{suffix}": value for module, layer in pairs for suffix, value in layer.stored().items()}

    pieces = [
        (entry, experts)
        for entry in plan.entries
        for experts in ranges(len(entry.modules), max(1, at_once // prod(entry.shape[-2:])))
    ]
    missing = [piece for piece in pieces if not is_finished(*piece)]
    limit = encoding.limits.memory
    for piece in missing:
        if limit is not None and _needed_bytes(piece) > limit:
            raise ExportError(
                f"`{piece[0].name}` takes {_needed_bytes(piece):,} bytes while it is encoded, and --max-memory leaves "
                f"{limit:,} for that. Allow more."
            )
    done = total - sum(_num_weights(*piece) for piece in missing)
    progress("quantize", done, total, unit="weights")
    if device.type == "cpu":
        budget = free_memory() // 2 if limit is None else limit
        layers = side_by_side(encode, missing, encoding.session.threads, cost=_needed_bytes, budget=budget)
    else:
        layers = map(encode, missing)
    for (entry, experts), tensors in zip(missing, layers, strict=True):
        yield from ((name, tensor) for name, tensor in tensors.items() if name not in finished)
        done += _num_weights(entry, experts)
        progress("quantize", done, total, unit="weights", tensor=entry.name)


def _num_weights(entry: PlanEntry, experts: range) -> int:
    return len(experts) * prod(entry.shape[-2:])


def _needed_bytes(piece: tuple[PlanEntry, range]) -> int:
    """Memory that encoding takes at most: what the search needs for each weight, and hessians with their factors."""
    return 80 * _num_weights(*piece) + 32 * len(piece[1]) * piece[0].shape[-1] ** 2


def _documents(encoding: Encoding, checkpoint: LinearCheckpoint, shards: Mapping[str, ShardLayout]) -> dict[str, bytes]:
    plan, stats = encoding.plan, encoding.stats
    rounding = "rounded by their own squared error"
    if stats is not None:
        used = "scales fitted under the mean squares"
        if encoding.used_moments is not None:
            used = "scales and error feedback under the second moments"
        rounding = f"{used} of {stats.provenance.num_tokens:,} calibration tokens"
    documents = {
        "config.json": directory.as_json(served_config(plan, checkpoint, encoding.model)),
        CARD_NAME: compressed_card(plan, rounding=rounding).encode(),
    }
    return documents | directory.index_of(shards) | directory.copied_files(checkpoint.directory)
