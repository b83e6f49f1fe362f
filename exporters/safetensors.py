"""Writes a plan as a checkpoint that transformers loads packed: GGUF blocks as uint8 tensors.

The tensors hold the bytes of the GGUF export of the same plan; rows of rotary heads are in transformers' order
(`packed_model`); such tensors are written whole, all others part by part. Everything that the directory gets is one
`ResumableOutput`: config.json is the last to get its name, so a directory that an interrupted export left cannot be
loaded, and the same call goes on.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dynquant import __version__
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
from dynquant.checkpoints.gguf_layout import recorded_encoder
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_format import ShardLayout, StoredTensor
from dynquant.encoding.parts import TensorPart, load_packed_part
from dynquant.encoding.stream import QuantizedPart
from dynquant.errors import CheckpointError, ExportError
from dynquant.exporters.model_card import packed_card
from dynquant.exporters.output import Encoding, writing
from dynquant.families.common.config import Config, read_config, read_json
from dynquant.families.common.conversion import ConvertedSource, load_finite
from dynquant.families.from_gguf import config_from_gguf, tokenizer_files
from dynquant.families.text.registry import FAMILIES
from dynquant.packed.places import FLOAT_DTYPES, Place, build_meta_model, build_meta_vision, find_places, lay_out_vision
from dynquant.recipes.plan import Plan
from dynquant.storage.resumable_output import Region, ResumableOutput

_WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class _Layout:
    """Files that tensors go to, which differ with the kind of model."""

    places: Mapping[str, Place]
    skipped: frozenset[str]
    """GGUF names of tensors that are computed, or parts of one that is copied."""
    copied: Mapping[str, StoredTensor]
    """Entries that hold a tensor of the original checkpoint, by GGUF name."""
    config: Mapping[str, object]
    """config.json without `quantization_config`."""


@dataclass(frozen=True)
class _Checkpoint:
    """Everything of the directory that is known before a weight is encoded."""

    layout: _Layout
    shards: dict[str, ShardLayout]
    documents: dict[str, bytes]
    """Small files by name; config.json is the first."""
    file_of: dict[str, str]
    """state_dict key -> shard."""


def export_safetensors(
    encoding: Encoding, output: Path, *, shard_max_bytes: int | None = None, stored: GGUFSource | None = None
) -> list[Path]:
    """Write a plan into the directory `output` and return its files.

    With `stored`, a GGUF file of the same plan, its bytes are taken instead of encoding again.

    Raises:
        PlanError: the plan is not of this model.
        StatsError: the statistics are missing, superfluous, or of another checkpoint.
        EncodeError: NaN or Inf weights, or a type without the statistics it needs; partial files are removed.
        CheckpointError: an architecture that cannot be loaded packed.
        ExportError: no space, an output that is no directory, or an interrupted export of something else.
        ClusterError: `elsewhere` cannot go on; what is done is kept.
    """
    model, plan = encoding.model, encoding.plan
    encoding.check()
    _check_output(model, output)
    name = (recorded_encoder(stored) if stored is not None else "") or encoding.encoder.name
    checkpoint = _describe(model, plan, name, shard_max_bytes or SHARD_BYTES)
    parts = encoding.parts(whole=_rewritten(checkpoint, plan))
    regions, paths, sizes = _regions(output, checkpoint, parts)
    identity = encoding.identity(files_hash(checkpoint.documents, checkpoint.shards))
    identity["stored"] = stored.fingerprint if stored is not None else "none"
    target = ResumableOutput(paths, sizes, regions, identity, resume=encoding.resume)
    with writing(target, encoding.session) as progress:
        skip = checkpoint.layout.skipped | checkpoint.layout.copied.keys() | target.finished
        write_small_files(target, checkpoint.documents, checkpoint.shards)
        _copy(target, model, checkpoint.layout.copied)
        quantized = encoding.quantized(parts, skip, progress) if stored is None else _parts_of(stored, parts, skip)
        _write(target, checkpoint.layout.places, quantized)
        files = target.commit()
    _remove_old_shards(output, checkpoint)
    return files


def hf_config_of(model: Model) -> Config:
    """The configuration under which transformers runs `model`.

    Raises:
        CheckpointError: an architecture outside the known families.
    """
    if model.hf_directory is not None:
        return read_config(model.hf_directory, FAMILIES)
    if isinstance(model.source, GGUFSource):
        return config_from_gguf(model.source)
    raise CheckpointError(f"{model.path} has neither config.json nor GGUF metadata, so transformers cannot run it.")


def _describe(model: Model, plan: Plan, encoder: str, shard_max_bytes: int) -> _Checkpoint:
    layout = _lay_out_vision(model, plan) if model.has_vision else _lay_out_language(model, plan)
    entries = {entry.name: entry for entry in plan.entries if entry.name in layout.places}
    tensors = {
        name: layout.copied.get(name) or layout.places[name].stored_as(entry.quant_type)
        for name, entry in entries.items()
    }
    shards = shards_of(list(tensors.values()), shard_max_bytes)
    file_of = {key: name for name, shard in shards.items() for key in shard.spans}
    stored_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    types = {
        layout.places[name].key: layout.places[name].stored_type(entry.quant_type).name
        for name, entry in entries.items()
        if len(entry.shape) > 1 and name not in layout.copied
    }
    quantization = {
        "quant_method": "dynquant",
        "version": 1,
        "types": types,
        "provenance": {
            "dynquant_version": __version__, "encoder": encoder, "recipe": plan.recipe, "plan_hash": plan.hash,
            "fingerprint": plan.fingerprint, "stats_hash": plan.stats_hash or "",
        },
    }  # fmt: skip
    documents = {"config.json": as_json({**layout.config, "quantization_config": quantization})}
    documents["README.md"] = packed_card(plan, encoder=encoder, stored_bytes=stored_bytes).encode()
    documents |= index_of(shards)
    documents |= copied_files(model.hf_directory) if model.hf_directory is not None else tokenizer_files(model.path)
    return _Checkpoint(layout, shards, documents, file_of)


def _lay_out_language(model: Model, plan: Plan) -> _Layout:
    config = hf_config_of(model)
    names = model.source.names()
    whole = "blk.0.attn_kv_b.weight" in names
    found, computed = find_places(config, build_meta_model(config), whole_kv_b=whole)
    lost = [name for name in names if name not in found and name not in computed]
    if lost:
        raise CheckpointError(f"{model.name} holds `{lost[0]}`, which {config.model_type} has no place for.")
    is_tied = all(entry.name != "output.weight" for entry in plan.entries)
    return _Layout(found, frozenset(computed), {}, {**config.raw, "tie_word_embeddings": is_tied})


def _lay_out_vision(model: Model, plan: Plan) -> _Layout:
    assert model.hf_directory is not None
    found = lay_out_vision(model, plan, build_meta_vision(model))
    return _Layout(found.places, found.parts, found.copied, read_json(model.hf_directory / "config.json"))


def _rewritten(checkpoint: _Checkpoint, plan: Plan) -> frozenset[str]:
    """Tensors whose entry is not the bytes of GGUF, or is none at all."""
    places = checkpoint.layout.places
    return frozenset(
        entry.name
        for entry in plan.entries
        if entry.name not in places
        or entry.name in checkpoint.layout.copied
        or not places[entry.name].keeps_bytes(entry.quant_type)
    )


def _regions(
    output: Path, checkpoint: _Checkpoint, parts: Mapping[str, list[TensorPart]]
) -> tuple[dict[str, Region], list[Path], list[int]]:
    """Regions by part, by shard for headers, and by name for small files; with paths and sizes of all files."""
    sizes = {name: len(content) for name, content in checkpoint.documents.items()}
    sizes |= {name: shard.total_bytes for name, shard in checkpoint.shards.items()}
    number = {name: index for index, name in enumerate(sizes)}
    regions = {name: Region(number[name], 0, len(content)) for name, content in checkpoint.documents.items()}
    for name, shard in checkpoint.shards.items():
        regions[name] = Region(number[name], 0, len(shard.header))
    for name, place in checkpoint.layout.places.items():
        file = checkpoint.file_of.get(place.key)
        if file is None:
            continue
        start, length = checkpoint.shards[file].spans[place.key]
        for part in parts[name]:
            regions[part.key] = Region(number[file], start + part.offset, length if part.is_whole else part.num_bytes)
    return regions, [output / name for name in sizes], list(sizes.values())


def _write(target: ResumableOutput, places: Mapping[str, Place], quantized: Iterable[QuantizedPart]) -> None:
    for quantized_part in quantized:
        part, packed = quantized_part.part, quantized_part.packed
        values = places[part.name].from_gguf(part.quant_type, packed) if part.is_whole else packed
        target.write(part.key, tensor_bytes(values))


def _copy(target: ResumableOutput, model: Model, copied: Mapping[str, StoredTensor]) -> None:
    """Tensors of the checkpoint, in its own type or the plan's, whichever takes fewer bytes."""
    for name, stored in copied.items():
        if name not in target.finished:
            assert isinstance(model.source, ConvertedSource)
            values = load_finite(model.source.checkpoint, stored.key)
            target.write(name, tensor_bytes(values.to(FLOAT_DTYPES[stored.dtype])))


def _parts_of(
    source: GGUFSource, parts: Mapping[str, list[TensorPart]], skip: frozenset[str] | set[str]
) -> Iterable[QuantizedPart]:
    for part in (part for several in parts.values() for part in several):
        if part.key not in skip and part.name not in skip:
            yield QuantizedPart(part, load_packed_part(source, part))


def _check_output(model: Model, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output} is a file; `-f safetensors` writes a directory.")
    if model.hf_directory is not None and output.exists() and output.samefile(model.hf_directory):
        raise ExportError(f"{output} is the model that is being read; export to another directory.")


def _remove_old_shards(output: Path, checkpoint: _Checkpoint) -> None:
    """Weights of an older export in the same directory, which the new index no longer names."""
    for path in output.glob("model*"):
        if _WEIGHTS_NAME.fullmatch(path.name) and path.name not in (*checkpoint.shards, *checkpoint.documents):
            path.unlink()
