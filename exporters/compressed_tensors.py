"""Writes a plan for vLLM as a compressed-tensors checkpoint, which vLLM and transformers load.

All files are written in a hidden directory beside the output and move to its name together at the end. A killed export
goes on where it stopped (`artifacts`) and gives the same bytes.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from operator import attrgetter
from pathlib import Path

import torch

from dynquant.checkpoints import checkpoint_directory as directory
from dynquant.checkpoints.published.packed_parts import has_known_schemes
from dynquant.checkpoints.safetensors_format import ShardLayout
from dynquant.checkpoints.safetensors_source import checkpoint_spans
from dynquant.encoding.linears import LinearPiece, encode_piece, fused_scales, pieces_of
from dynquant.errors import ExportError
from dynquant.exporters.compressed_config import served_config, transformers_problem
from dynquant.exporters.model_card import CARD_NAME, compressed_card, with_closing_pass
from dynquant.exporters.output import Encoding
from dynquant.families.common.config import quantization_of
from dynquant.families.linear_layers import LinearCheckpoint
from dynquant.formats.plain_quants import FLOAT_DTYPES
from dynquant.recipes.build_plan import check_linears, schemes_of
from dynquant.recipes.sizes import tensors_of_checkpoint
from dynquant.resources import free_memory
from dynquant.session import Progress
from dynquant.storage.atomic import writing_folder
from dynquant.storage.work_files import STAGING, check_folder, work_path
from dynquant.workers import side_by_side


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


def _tensors(
    encoding: Encoding, checkpoint: LinearCheckpoint, finished: set[str], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor that is not finished, with its name."""
    for tensor in checkpoint.others:
        if tensor.key not in finished:
            values = checkpoint.source.load(tensor.key)
            encoding.checks.add(tensor.key, tuple(values.shape), range(1), values)
            yield tensor.key, values.to(FLOAT_DTYPES[tensor.dtype])
    device, linears = encoding.encoder.device, {linear.name: linear for linear in checkpoint.linears}
    schemes = schemes_of(encoding.plan)
    scales = fused_scales(linears[name] for name, scheme in schemes.items() if scheme.strategy == "tensor_group")

    def is_finished(piece: LinearPiece) -> bool:
        suffixes = [part.key for part in piece.scheme.parts(*piece.linear.shape[-2:])]
        return {f"{module}.{suffix}" for module in piece.modules for suffix in suffixes} <= finished

    def encode(piece: LinearPiece) -> dict[str, torch.Tensor]:
        how = {"global_scales": scales, "device": device, "checks": encoding.checks}
        pairs = zip(piece.modules, encode_piece(piece, encoding.guidance, **how), strict=True)
        return {f"{module}.{suffix}": value for module, layer in pairs for suffix, value in layer.stored().items()}

    pieces = [piece for name, scheme in schemes.items() for piece in pieces_of(linears[name], scheme, device)]
    missing = [piece for piece in pieces if not is_finished(piece)]
    limit = encoding.limits.memory
    for piece in missing:
        if limit is not None and piece.needed_bytes > limit:
            raise ExportError(
                f"`{piece.linear.name}` takes {piece.needed_bytes:,} bytes while it is encoded, and --max-memory "
                f"leaves {limit:,} for that. Allow more."
            )
    total = sum(piece.num_weights for piece in pieces)
    done = total - sum(piece.num_weights for piece in missing)
    progress("quantize", done, total, unit="weights")
    if device.type == "cpu":
        how = {"cost": attrgetter("needed_bytes"), "budget": free_memory() // 2 if limit is None else limit}
        layers = side_by_side(encode, missing, encoding.session.threads, **how)
    else:
        layers = map(encode, missing)
    for piece, tensors in zip(missing, layers, strict=True):
        yield from ((name, tensor) for name, tensor in tensors.items() if name not in finished)
        done += piece.num_weights
        progress("quantize", done, total, unit="weights", tensor=piece.linear.name)


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
