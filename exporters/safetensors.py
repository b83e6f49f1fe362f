"""Writes a plan as a checkpoint that transformers loads packed: GGUF blocks as uint8 tensors.

The tensors hold the bytes of the GGUF export of the same plan; rows of rotary heads are in transformers' order
(`packed.places`); such tensors are written whole, all others part by part. Everything that the directory gets is one
`ResumableOutput`: config.json is the last to get its name, so a directory that an interrupted export left cannot be
loaded, and the same call goes on.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch

from dynquant import __version__
from dynquant.checkpoints import checkpoint_directory as directory
from dynquant.checkpoints.gguf_layout import recorded_encoder
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_format import TORCH_DTYPES, ShardLayout
from dynquant.encoding.parts import TensorPart, load_packed_part
from dynquant.encoding.stream import QuantizedPart
from dynquant.errors import CheckpointError, ExportError
from dynquant.exporters.model_card import CARD_NAME, packed_card, with_closing_pass
from dynquant.exporters.output import Encoding
from dynquant.families.common.config import Config, quantization_of, read_config, read_json
from dynquant.families.common.conversion import ConvertedSource, load_finite
from dynquant.families.from_gguf import config_from_gguf, tokenizer_files
from dynquant.families.text.registry import FAMILIES
from dynquant.formats.plain_quants import FLOAT_DTYPES
from dynquant.packed.places import Layout, build_meta_model, build_meta_vision, find_places, lay_out_vision
from dynquant.packed.traced_places import lay_out_traced, recorded
from dynquant.recipes.plan import Plan
from dynquant.running.load import empty_hf
from dynquant.storage.journal import Journal
from dynquant.storage.resumable_output import Region, ResumableOutput

_WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.partial)?")


def export_safetensors(
    encoding: Encoding,
    output: Path,
    *,
    shard_max_bytes: int | None = None,
    stored: GGUFSource | None = None,
    came_of_tuning: str = "",
) -> list[Path]:
    """Write a plan into the directory `output` and return its files.

    With `stored`, a GGUF file of the same plan, its bytes are taken instead of encoding again; the card says what
    `came_of_tuning` that file, if it was.

    Raises:
        CheckpointError: an architecture that cannot be loaded packed.
        PlanError, StatsError, EncodeError, ExportError, ClusterError: as `export_gguf`.
    """
    model, plan = encoding.model, encoding.plan
    encoding.check()
    if output.exists() and not output.is_dir():
        raise ExportError(f"{output} is a file; `-f safetensors` writes a directory.")
    if model.hf_directory is not None and output.exists() and output.samefile(model.hf_directory):
        raise ExportError(f"{output} is the model that is being read; export to another directory.")
    _check_is_free(output)
    name = (recorded_encoder(stored) if stored is not None else "") or encoding.encoder.name
    layout, config = _lay_out(model, plan, stored)
    types = {entry.name: entry.quant_type for entry in plan.entries}
    documents, shards = _describe(encoding, layout, config, name, shard_max_bytes or directory.SHARD_BYTES)
    if came_of_tuning:
        documents[CARD_NAME] = with_closing_pass(documents[CARD_NAME].decode(), came_of_tuning).encode()
    keeping = {
        name for name, place in layout.places.items() if name in types and place.keeps_bytes(types[name])
    } - layout.copied.keys()
    parts = encoding.parts(whole=types.keys() - keeping)  # an entry that is not the bytes of GGUF is made at once
    sizes, regions = directory.places_of(output, documents, shards)
    for name, place in layout.places.items():
        if whole := regions.pop(place.key, None):  # a tensor is written part by part
            for part in parts[name]:
                num_bytes = whole.num_bytes if part.is_whole else part.num_bytes
                regions[part.key] = Region(whole.file, whole.offset + part.offset, num_bytes)
    header_hash, source = directory.files_hash(documents, shards), "none" if stored is None else stored.fingerprint
    with encoding.writing(sizes, regions, header_hash, stored=source) as (target, progress):
        skip = layout.skipped | layout.copied.keys() | target.finished
        directory.write_small_files(target, documents, shards)
        _copy(target, model, layout)
        quantized = encoding.quantized(parts, skip, progress) if stored is None else _parts_of(stored, parts, skip)
        with closing(quantized):
            for part, packed in quantized:
                values = layout.places[part.name].from_gguf(part.quant_type, packed) if part.is_whole else packed
                target.write(part.key, directory.tensor_bytes(values))
        files = target.commit()
    for path in output.glob("model*"):
        # Weights of an older or interrupted export in the same directory, which the new index does not name.
        if _WEIGHTS_NAME.fullmatch(path.name) and path not in sizes:
            path.unlink()
    return files


def _check_is_free(output: Path) -> None:
    """Raise ExportError for a directory that holds a checkpoint, or weights, which were not packed here."""
    weights = [path for path in output.glob("model*") if _WEIGHTS_NAME.fullmatch(path.name)]
    is_unfinished = any(Journal(path).identity is not None for path in output.glob("*.journal"))
    if (output / "config.json").is_file():
        is_own = quantization_of(output).get("quant_method") == "dynquant"
    else:
        is_own = is_unfinished or not weights
    if not is_own:
        raise ExportError(
            f"{output} holds another checkpoint, whose weights and config.json would be replaced. Export to a new "
            "directory."
        )


def hf_config_of(model: Model) -> Config:
    """The configuration under which transformers runs `model`. Raises CheckpointError: an architecture outside the
    known families."""
    if model.hf_directory is not None:
        config = read_config(model.hf_directory, FAMILIES)
        untied = {"tie_word_embeddings": False} if model.has_own_output else {}
        return Config(config.path, config.values | untied, config.raw | untied)
    if isinstance(model.source, GGUFSource):
        return config_from_gguf(model.source)
    raise CheckpointError(f"{model.path} has neither config.json nor GGUF metadata, so transformers cannot run it.")


def _describe(
    encoding: Encoding, layout: Layout, config: Mapping[str, object], encoder: str, shard_max_bytes: int
) -> tuple[dict[str, bytes], dict[str, ShardLayout]]:
    """Return small files by name, config.json first, and the layouts of the weight files."""
    model, plan = encoding.model, encoding.plan
    entries = {entry.name: entry for entry in plan.entries if entry.name in layout.places}
    tensors = {
        name: layout.copied.get(name) or layout.places[name].stored_as(entry.quant_type)
        for name, entry in entries.items()
    }
    stored_tensors = [*tensors.values(), *layout.kept.values()]
    shards = directory.shards_of(stored_tensors, shard_max_bytes)
    stored_bytes = sum(tensor.num_bytes for tensor in stored_tensors)
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
    if plan.pruned is not None:
        gone = {"original_fingerprint": plan.pruned.fingerprint, "pruned_experts": str(plan.pruned)}
        quantization["provenance"] |= gone
    quantization |= recorded(layout, model.arch)
    documents = {"config.json": directory.as_json({**config, "quantization_config": quantization})}
    documents[CARD_NAME] = packed_card(plan, encoder=encoder, stored_bytes=stored_bytes).encode()
    documents |= directory.index_of(shards)
    documents |= (
        directory.copied_files(model.hf_directory) if model.hf_directory is not None else tokenizer_files(model.path)
    )
    return documents, shards


def _lay_out(model: Model, plan: Plan, stored: GGUFSource | None) -> tuple[Layout, dict[str, object]]:
    """Return where tensors go, and config.json without `quantization_config`."""
    if model.has_vision:
        assert model.hf_directory is not None
        raw = read_json(model.hf_directory / "config.json")
        if model.has_own_output:
            text = raw.get("text_config")
            for part in (raw, text) if isinstance(text, dict) else (raw,):
                part["tie_word_embeddings"] = False
        return lay_out_vision(model, plan, build_meta_vision(model)), raw
    if (traced := _lay_out_traced(model, plan, stored)) is not None:
        return traced
    config = hf_config_of(model)
    names = model.source.names()
    places, computed = find_places(config, build_meta_model(config), whole_kv_b="blk.0.attn_kv_b.weight" in names)
    lost = [name for name in names if name not in places and name not in computed]
    if lost:
        raise CheckpointError(f"{model.name} holds `{lost[0]}`, which {config.model_type} has no place for.")
    is_tied = all(entry.name != "output.weight" for entry in plan.entries)
    return Layout(places, frozenset(computed)), {**config.raw, "tie_word_embeddings": is_tied}


def _lay_out_traced(model: Model, plan: Plan, stored: GGUFSource | None) -> tuple[Layout, dict[str, object]] | None:
    """Return the same for a directory of an architecture without a family; None for one with."""
    if not model.is_converted:
        return None
    assert model.hf_directory is not None
    raw = read_json(model.hf_directory / "config.json")
    raw.pop("quantization_config", None)
    hf_model = empty_hf(model, dtype=torch.float32)
    text = raw.get("text_config")
    for part in (raw, text) if isinstance(text, dict) else (raw,):
        part["tie_word_embeddings"] = bool(hf_model.config.get_text_config().tie_word_embeddings)
    return lay_out_traced(model, plan.entries, hf_model, stored), raw


def _copy(target: ResumableOutput, model: Model, layout: Layout) -> None:
    """Tensors of the checkpoint, in its own type or the plan's, whichever takes fewer bytes."""
    for name, stored in layout.copied.items():
        if name not in target.finished:
            assert isinstance(model.source, ConvertedSource)
            values = load_finite(model.source.checkpoint, stored.key)
            target.write(name, directory.tensor_bytes(values.to(FLOAT_DTYPES[stored.dtype])))
    for key, stored in layout.kept.items():
        if key not in target.finished:
            assert layout.read is not None
            target.write(key, directory.tensor_bytes(layout.read(key).to(TORCH_DTYPES[stored.dtype])))


def _parts_of(
    source: GGUFSource, parts: Mapping[str, list[TensorPart]], skip: frozenset[str] | set[str]
) -> Iterator[QuantizedPart]:
    for part in (part for several in parts.values() for part in several):
        if part.key not in skip and part.name not in skip:
            yield QuantizedPart(part, load_packed_part(source, part))
