"""Opens a Hugging Face checkpoint of any architecture that llama.cpp's converter knows, as the families do theirs."""

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import gguf
from pydantic import TypeAdapter

from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_source import SafetensorsSource, refuse_quantized
from dynquant.checkpoints.tensor_roles import stored_ahead
from dynquant.errors import CheckpointError
from dynquant.families.common.config import check_values, read_json
from dynquant.families.common.conversion import Conversion, ConvertedSource, unchanged
from dynquant.families.common.conversion_book import COMPUTED_BUFFERS, some_of
from dynquant.families.common.metadata import recorded_fields
from dynquant.families.common.rope import yarn_magnitude
from dynquant.families.common.selection import Selection
from dynquant.families.common.settings import settings_of_config, settings_of_metadata
from dynquant.families.converter.description import Description, describe
from dynquant.families.tokenizers.tokenizer import write_tokenizer

OWN_KEYS = ("general.quantization_version", "general.file_type")
"""Keys that are said of a file, when one is written."""
_OWN_OUTPUT = (
    "apertus", "dots1", "exaone-moe", "gpt-oss", "gptneox", "minimax-m2", "nemotron", "olmo2", "olmoe", "phimoe",
    "stablelm",
)  # fmt: skip
"""Architectures of which llama.cpp loads no file without `output.weight`, also where the checkpoint ties it."""
_FLOATS = ("F32", "F16")
_OF_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|multi_modal|mm_)|projector|embed_vision|embed_audio")
_SELECTION = TypeAdapter(Selection)


def open_converted(directory: Path, tree: Path, *, mtp: bool = True) -> Model:
    """Open a checkpoint by the converter of llama.cpp's source tree; no weight but of small computed tensors is read.

    Without `mtp`, layers that predict tokens ahead are left out where the converter can.

    Raises:
        CheckpointError: missing or damaged files, an architecture that the converter does not know, a tokenizer that
            neither side can write, or a matrix that is no selection of the checkpoint.
    """
    raw = read_json(directory / "config.json")
    refuse_quantized(directory, raw.get("quantization_config"))
    check_values(directory)
    checkpoint = SafetensorsSource(directory)
    description = describe(directory, checkpoint, tree, no_mtp=not mtp)
    source = ConvertedSource(checkpoint, _with_output(list(_conversions(description, checkpoint)), description))
    metadata = _with_magnitude(field for field in description.keys.metadata if field.key not in OWN_KEYS)
    metadata = tuple(filter(_says_something, _without_unused_window(metadata)))
    fault = description.about["tokenizer_fault"]
    if fault:
        metadata = tuple(map(_without_quirk, metadata)) + _own_tokenizer(directory, source, fault, tree)
    elif description.about["asked_pre_tokenizer"]:
        for note in description.pre_tokenizer_notes:
            warnings.warn(note, stacklevel=3)
    unused = [name for name in description.about["unused"] if mtp or not stored_ahead(name, raw)]
    has_tower = isinstance(raw.get("vision_config"), dict)
    _check_width(directory, source, metadata)
    _tell_unused(directory, unused, description.about["mtp_fault"], has_tower=has_tower)
    about = {"hf_directory": directory, "settings": {**settings_of_metadata(metadata), **settings_of_config(raw)}}
    return Model(directory, source, metadata, source.checkpoint_names, has_family=False, **about)


def _conversions(description: Description, checkpoint: SafetensorsSource) -> Iterator[Conversion]:
    for entry in description.about["tensors"]:
        name, shape, parts = entry["name"], tuple(entry["shape"]), tuple(entry.get("parts", ()))
        if not parts:
            yield Conversion(name, (), shape, "F32", values=description.keys.load(name))
            continue
        selection = _SELECTION.validate_python(entry["selection"])
        dtype = entry["type"] if entry["type"] in _FLOATS else checkpoint.info(parts[0]).dtype
        yield Conversion(name, parts, shape, dtype, unchanged if selection.is_identity else selection)


def _with_output(conversions: list[Conversion], description: Description) -> list[Conversion]:
    """Return the conversions with a copy of the embedding as the output where llama.cpp does not take it itself."""
    arch = next(field.value for field in description.keys.metadata if field.key == "general.architecture")
    by_name = {conversion.name: conversion for conversion in conversions}
    if arch not in _OWN_OUTPUT or "output.weight" in by_name or "token_embd.weight" not in by_name:
        return conversions
    return [*conversions, replace(by_name["token_embd.weight"], name="output.weight")]


def _check_width(directory: Path, source: ConvertedSource, metadata: tuple[MetadataField, ...]) -> None:
    """Refuse a hidden size in config.json that is not that of the embedding, which the converter does not look at."""
    width = next((field.value for field in metadata if field.key.endswith(".embedding_length")), None)
    shape = source.info("token_embd.weight").shape if "token_embd.weight" in source.names() else (0, width)
    if width is not None and shape[1] != width:
        raise CheckpointError(
            f"{directory / 'config.json'} and the tensors do not agree: with its hidden size "
            f"`{source.checkpoint_names('token_embd.weight')[0]}` would be {[shape[0], width]}, and it is stored as "
            f"{list(shape)}. Restore config.json, or fetch it with the weights."
        )


def _own_tokenizer(directory: Path, source: ConvertedSource, fault: str, tree: Path) -> tuple[MetadataField, ...]:
    """Return the tokenizer's keys by dynquant, where the converter cannot write them.

    Raises:
        CheckpointError: dynquant cannot either.
    """
    writer = gguf.GGUFWriter(None, "llama")
    try:
        write_tokenizer(writer, directory, source.info("token_embd.weight").shape[0])
    except CheckpointError as error:
        raise CheckpointError(
            f"Neither llama.cpp's converter in {tree} ({fault}) nor dynquant can write the tokenizer of {directory}. "
            f"{error}"
        ) from error
    return tuple(field for field in recorded_fields(writer) if field.key != "general.architecture")


def _without_quirk(field: MetadataField) -> MetadataField:
    """Return a field that does not make llama.cpp look for the tokens of Phi-3, which it does by the model's name."""
    if field.key != "general.name":
        return field
    return replace(field, value=re.sub(r"(?i)(phi)-?3", r"\1 3", str(field.value)))


def _with_magnitude(fields: Iterable[MetadataField]) -> tuple[MetadataField, ...]:
    """Return the keys with a checkpoint's own YaRN magnitude under the name that llama.cpp reads, as the families do.

    It takes `yarn_attn_factor`, where it reads it at all, for none, and multiplies its default by `attn_factor`.
    """
    metadata = {field.key: field for field in fields}
    rope = f"{metadata['general.architecture'].value}.rope.scaling."
    field = metadata.pop(f"{rope}yarn_attn_factor", None)
    if field is not None:
        # Grok's number is a multiplier already; of all others the converter writes transformers' `attention_factor`.
        default = 1.0 if rope.startswith("grok.") else yarn_magnitude(metadata[f"{rope}factor"].value)
        metadata[f"{rope}attn_factor"] = replace(field, key=f"{rope}attn_factor", value=field.value / default)
    return tuple(metadata.values())


def _without_unused_window(metadata: tuple[MetadataField, ...]) -> tuple[MetadataField, ...]:
    """Return the keys without a sliding window in which no layer attends: llama.cpp ends the process at one."""
    pattern = next((field for field in metadata if field.key.endswith(".attention.sliding_window_pattern")), None)
    if pattern is None or not isinstance(pattern.value, list) or any(pattern.value):
        return metadata
    window = pattern.key.removesuffix("_pattern")
    return tuple(field for field in metadata if field.key not in (pattern.key, window))


def _says_something(field: MetadataField) -> bool:
    """Return whether a key is more than a count of no layers that predict tokens ahead, which `mtp` decides on."""
    return not field.key.endswith(".nextn_predict_layers") or bool(field.value)


def _tell_unused(directory: Path, unused: list[str], fault: str, *, has_tower: bool) -> None:
    """Say which tensors the converter leaves out; a tower is said to be by who opens the model."""
    unused = [name for name in unused if not name.endswith(COMPUTED_BUFFERS)]
    if has_tower:
        unused = [name for name in unused if not _OF_TOWERS.search(name)]
    if unused:
        because = fault and f"; it fails with layers that predict tokens ahead ({fault})"
        warnings.warn(
            f"{directory}: llama.cpp's converter leaves out {len(unused)} tensors ({some_of(unused)}){because}.",
            stacklevel=4,
        )
