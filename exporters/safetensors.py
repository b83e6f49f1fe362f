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
from dynquant.checkpoints import checkpoint_directory as directory
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
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output} is a file; `-f safetensors` writes a directory.")
    if model.hf_directory is not None and output.exists() and output.samefile(model.hf_directory):
        raise ExportError(f"{output} is the model that is being read; export to another directory.")
    name = (recorded_encoder(stored) if stored is not None else "") or encoding.encoder.name
    layout = _lay_out_vision(model, plan) if model.has_vision else _lay_out_language(model, plan)
    documents, shards = _describe(model, plan, layout, name, shard_max_bytes or directory.SHARD_BYTES)
    parts = encoding.parts(whole=_rewritten(layout, plan))
    sizes, regions = directory.places_of(output, documents, shards)
    for name, place in layout.places.items():
        if place.key in regions:
            stored_whole = regions.pop(place.key)
            for part in parts[name]:
                num_bytes = stored_whole.num_bytes if part.is_whole else part.num_bytes
                regions[part.key] = Region(stored_whole.file, stored_whole.offset + part.offset, num_bytes)
    identity = encoding.identity(directory.files_hash(documents, shards))
    identity["stored"] = stored.fingerprint if stored is not None else "none"
    target = ResumableOutput(sizes, regions, identity, resume=encoding.resume)
    with writing(target, encoding.session) as progress:
        skip = layout.skipped | layout.copied.keys() | target.finished
        directory.write_small_files(target, documents, shards)
        _copy(target, model, layout.copied)
        quantized = encoding.quantized(parts, skip, progress) if stored is None else _parts_of(stored, parts, skip)
        for part, packed in quantized:
            values = layout.places[part.name].from_gguf(part.quant_type, packed) if part.is_whole else packed
            target.write(part.key, directory.tensor_bytes(values))
        files = target.commit()
    for path in output.glob("model*"):
        # Weights of an older export in the same directory, which the new index does not name.
        if _WEIGHTS_NAME.fullmatch(path.name) and path not in sizes:
            path.unlink()
    return files


def hf_config_of(model: Model) -> Config:
    """The configuration under which transformers runs `model`.

    Raises:
        CheckpointError: an architecture outside the known families.
    """
    if model.hf_directory is not None:
        config = read_config(model.hf_directory, FAMILIES)
        untied = {"tie_word_embeddings": False} if model.has_own_output else {}
        return Config(config.path, config.values | untied, config.raw | untied)
    if isinstance(model.source, GGUFSource):
        return config_from_gguf(model.source)
    raise CheckpointError(f"{model.path} has neither config.json nor GGUF metadata, so transformers cannot run it.")


def _describe(
    model: Model, plan: Plan, layout: _Layout, encoder: str, shard_max_bytes: int
) -> tuple[dict[str, bytes], dict[str, ShardLayout]]:
    """Return small files by name, config.json first, and the layouts of the weight files."""
    entries = {entry.name: entry for entry in plan.entries if entry.name in layout.places}
    tensors = {
        name: layout.copied.get(name) or layout.places[name].stored_as(entry.quant_type)
        for name, entry in entries.items()
    }
    shards = directory.shards_of(list(tensors.values()), shard_max_bytes)
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
    documents = {"config.json": directory.as_json({**layout.config, "quantization_config": quantization})}
    documents["README.md"] = packed_card(plan, encoder=encoder, stored_bytes=stored_bytes).encode()
    documents |= directory.index_of(shards)
    documents |= (
        directory.copied_files(model.hf_directory) if model.hf_directory is not None else tokenizer_files(model.path)
    )
    return documents, shards


def _lay_out_language(model: Model, plan: Plan) -> _Layout:
    config = hf_config_of(model)
    names = model.source.names()
    whole = "blk.0.attn_kv_b.weight" in names
    places, computed = find_places(config, build_meta_model(config), whole_kv_b=whole)
    lost = [name for name in names if name not in places and name not in computed]
    if lost:
        raise CheckpointError(f"{model.name} holds `{lost[0]}`, which {config.model_type} has no place for.")
    is_tied = all(entry.name != "output.weight" for entry in plan.entries)
    return _Layout(places, frozenset(computed), {}, {**config.raw, "tie_word_embeddings": is_tied})


def _lay_out_vision(model: Model, plan: Plan) -> _Layout:
    assert model.hf_directory is not None
    layout = lay_out_vision(model, plan, build_meta_vision(model))
    config = read_json(model.hf_directory / "config.json")
    if model.has_own_output:
        text = config.get("text_config")
        config |= {"tie_word_embeddings": False}
        config |= {"text_config": text | {"tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return _Layout(layout.places, layout.parts, layout.copied, config)


def _rewritten(layout: _Layout, plan: Plan) -> frozenset[str]:
    """Tensors whose entry is not the bytes of GGUF, or is none at all."""
    places, copied = layout.places, layout.copied
    return frozenset(
        entry.name
        for entry in plan.entries
        if entry.name in copied or entry.name not in places or not places[entry.name].keeps_bytes(entry.quant_type)
    )


def _copy(target: ResumableOutput, model: Model, copied: Mapping[str, StoredTensor]) -> None:
    """Tensors of the checkpoint, in its own type or the plan's, whichever takes fewer bytes."""
    for name, stored in copied.items():
        if name not in target.finished:
            assert isinstance(model.source, ConvertedSource)
            values = load_finite(model.source.checkpoint, stored.key)
            target.write(name, directory.tensor_bytes(values.to(FLOAT_DTYPES[stored.dtype])))


def _parts_of(
    source: GGUFSource, parts: Mapping[str, list[TensorPart]], skip: frozenset[str] | set[str]
) -> Iterable[QuantizedPart]:
    for part in (part for several in parts.values() for part in several):
        if part.key not in skip and part.name not in skip:
            yield QuantizedPart(part, load_packed_part(source, part))
