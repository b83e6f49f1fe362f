"""Opens a model from wherever its files are.

A Hugging Face directory is converted lazily by its family, a GGUF file is taken as it is. For any other architecture
`--base-gguf` names a float GGUF made by llama.cpp's converter: weights, metadata and tokenizer come from it, and the
directory serves to run the model.
"""

import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import gguf

from dynquant.checkpoints.gguf_source import GGUFSource, MetadataField, is_gguf, split_files
from dynquant.checkpoints.model import Model, PrunedExperts
from dynquant.checkpoints.safetensors_source import (
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsSource,
    names_with_output,
    refuse_quantized,
)
from dynquant.checkpoints.tensor_source import TensorSource
from dynquant.errors import CheckpointError, ExportError, hub_failures
from dynquant.families.common.config import Config, quantization_of, read_config, read_json
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.common.conversion_book import ConversionBook
from dynquant.families.common.metadata import recorded_fields, write_general_keys
from dynquant.families.common.settings import Settings, differing_settings, settings_of_config, settings_of_metadata
from dynquant.families.complete_gguf import check_complete
from dynquant.families.converter.converted import OWN_KEYS, open_converted
from dynquant.families.converter.source_tree import find_tree, missing_tree
from dynquant.families.pruned import COUNTS, read_pruned, write_without_experts
from dynquant.families.text.registry import FAMILIES, SAME_CONFIG, SIZED_FAMILIES
from dynquant.families.tokenizers.tokenizer import write_tokenizer
from dynquant.families.vision.checkpoint import has_tower, is_vision_checkpoint, open_vision
from dynquant.session import Session
from dynquant.storage.file_kinds import SAFETENSORS, but_is, content_of, folder_content
from dynquant.storage.stand_ins import refuse_stand_in

CHECKPOINT_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""Patterns of files that are downloaded: neither code nor pickles."""
_OWN_PREFIXES = ("quantize.imatrix.", "dynquant.", "split.")


def open_model(path: str | Path, *, base_gguf: str | Path | None = None, mtp: bool = True) -> Model:
    """Open a Hugging Face directory or hub id, or a GGUF file.

    Without `mtp`, llama.cpp's converter leaves out layers that predict tokens ahead; else they are there.

    Raises:
        CheckpointError: nothing is there, it is damaged, or its architecture has no converter here.
    """
    directory = locate_model(path)
    if not directory.is_dir():
        return _open_gguf(directory)
    if base_gguf is not None:
        model = _open_gguf(Path(base_gguf))
        _refuse_quantized_base(model.source, Path(base_gguf), directory)
        paths = {"path": directory, "hf_directory": directory, "gguf_file": None, "base_gguf": Path(base_gguf)}
        settings, has_family = {**model.settings, **settings_of(directory)}, _unknown_type(directory) is None
        return replace(model, **paths, settings=settings, has_family=has_family)
    if is_vision_checkpoint(directory):
        return replace(open_vision(directory), settings=settings_of(directory))
    model = replace(open_hf(directory, mtp=mtp), pruned=read_pruned(directory))
    if has_tower(directory):
        warnings.warn(
            f"{directory} has a vision tower of a kind that dynquant has no place for: only its language model is "
            "opened. llama.cpp's converter writes the tower (--mmproj).",
            stacklevel=2,
        )
    return model


def _refuse_quantized_base(source: TensorSource, file: Path, directory: Path) -> None:
    """Refuse a quantized file as the base of a directory, save in types that are the directory's own.

    llama.cpp's converter keeps the blocks of experts that are stored in FP4. It also writes Q8_0, whose rounding is
    told where the two sides are compared.
    """
    floats = ("F32", "F16", "BF16", "Q8_0", *(("MXFP4", "NVFP4") if quantization_of(directory) else ()))
    for info in map(source.info, source.names()):
        if info.dtype not in floats:
            raise CheckpointError(
                f"{file} (--base-gguf) is quantized: `{info.name}` is of type {info.dtype}. A file in F32, F16 or BF16 "
                "is needed, as llama.cpp's converter writes it (`--outtype bf16`)."
            )


def open_and_announce(path: str | Path, session: Session, *, base_gguf: Path | None = None, mtp: bool = True) -> Model:
    """Open a model and say what it is; without `mtp`, its layers that predict tokens ahead are left out."""
    model = open_model(path, base_gguf=base_gguf, mtp=mtp)
    if not mtp and model.mtp_tensors:
        session.note(f"left out: {len(model.mtp_tensors)} tensors of layers that predict tokens ahead")
        model = model.without_mtp()
    experts = f", {model.hyper.n_expert} experts" if model.hyper.n_expert else ""
    session.note(
        f"{model.name}: {model.arch}, {model.hyper.n_layer} layers{experts}, {model.num_weights / 1e6:,.1f} M weights"
    )
    return model


def open_pruned(model: Model, pruned: PrunedExperts | None, folder: Path, session: Session) -> Model:
    """Return a model without the experts of a plan, as a checkpoint that lies in the plan's folder or is written there;
    one that never had them, or of which none go, as it is.

    Raises:
        CheckpointError: the experts are of another model, or stored in a way that is not known.
    """
    if pruned is None or model.pruned == pruned:
        return model
    if pruned.fingerprint != model.fingerprint:
        raise CheckpointError(
            f"The plan is of {pruned.original} (checkpoint {pruned.fingerprint[:12]}) without some of its experts, and "
            f"{model.name} has fingerprint {model.fingerprint[:12]}. Give that checkpoint, or plan again."
        )
    directory = folder / f"pruned-{pruned.hash[:12]}" / model.name  # files are named after the directory
    if not directory.is_dir():
        write_without_experts(model, pruned, directory)
        session.note(f"wrote {directory}: the checkpoint without routed experts, {pruned}")
    return replace(open_model(directory), original=model)


def open_language_model(path: str | Path, session: Session) -> Model:
    """`open_and_announce` for steps that have no place for a vision tower. Raises ExportError: the model has one."""
    model = open_and_announce(path, session)
    if model.has_vision:
        raise ExportError(
            f"{model.name} has a vision tower, for which this command has no place. Such models are calibrated, "
            "planned and evaluated on pictures (--data FILE) and exported as GGUF or packed safetensors."
        )
    return model


def open_hf(directory: Path, *, mtp: bool = True) -> Model:
    """Open a Hugging Face checkpoint; nothing but headers, configuration and tokenizer is read.

    Raises:
        CheckpointError: missing or damaged files, missing or unknown tensors, or something that llama.cpp cannot run.
    """
    if (model_type := _unknown_type(directory)) is not None:
        tree = find_tree()
        if tree is None:
            raise missing_tree(directory, model_type)
        return open_converted(directory, tree, mtp=mtp)
    config = read_config(directory, FAMILIES)
    refuse_quantized(directory, config.raw.get("quantization_config"))
    source = SafetensorsSource(directory)
    return _build(directory, ConversionBook(config, source), source)


def _unknown_type(directory: Path) -> str | None:
    """Return the `model_type` of a directory when no family here has it."""
    model_type = read_json(directory / "config.json").get("model_type")
    return model_type if isinstance(model_type, str) and model_type not in FAMILIES else None


def open_config(directory: Path, *, whole_kv_b: bool = False) -> Model:
    """Open only a configuration: names, shapes and keys without weights, all stored as BF16.

    For planning sizes. The tokenizer is taken along when it is there, and the names in model.safetensors.index.json are
    checked against those that the configuration calls for. Loading a tensor raises CheckpointError. `whole_kv_b` keeps
    MLA's `attn_kv_b` in one piece, as published files have it; such a model can only be sized.

    Raises:
        CheckpointError: missing or damaged files, an unknown architecture, or an index of another model.
    """
    config = read_config(directory, SIZED_FAMILIES, same_as=SAME_CONFIG)
    book = ConversionBook(config, None, names=_indexed_names(directory), whole_kv_b=whole_kv_b)
    book.drop(lambda name: name.endswith("_scale_inv"), "they scale weights that are stored as FP8.")
    return _build(directory, book, None)


def locate_model(path: str | Path) -> Path:
    """Return the local path of a Hugging Face directory, a GGUF file or a hub id, which is downloaded.

    Raises:
        CheckpointError: nothing is there, a directory that is no model or not one alone, or a later part of a split.
    """
    local = Path(path)
    split_files(local)  # refuses a later part of a split
    if not local.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not is_gguf(local):
        local = _download(str(path))
    if local.is_dir():
        _check_small_files(local)
        return local
    if is_gguf(local) and local.is_file():
        refuse_stand_in(local)
        return local
    way_out = "give the directory that it is in" if content_of(local) == SAFETENSORS else "check the path"
    raise CheckpointError(
        f"{path} is neither a Hugging Face model directory, nor a .gguf file, nor a hub id of the form owner/name"
        f"{but_is(local)}; {way_out}."
    )


def _check_small_files(directory: Path) -> None:
    """Refuse a directory without config.json, files that were not fetched, and what transformers reads otherwise."""
    for file in (file for pattern in CHECKPOINT_FILES[1:] for file in directory.glob(pattern) if file.is_file()):
        refuse_stand_in(file)
    adapter, config = directory / "adapter_config.json", directory / "config.json"
    if adapter.is_file():
        if config.is_file():
            raise CheckpointError(
                f"{directory} holds a model and an adapter for it (adapter_config.json). transformers would run both "
                "together, and only the model would be written. Merge them (`merge_and_unload` of PEFT), or move the "
                "adapter to a directory of its own."
            )
        raise CheckpointError(
            f"{directory} is an adapter, not a model. Give its base model, "
            f"{read_json(adapter).get('base_model_name_or_path')!r:.200}, or what `merge_and_unload` of PEFT makes of "
            "both; `dynquant eval` takes an adapter as --adapter beside a packed model."
        )
    if not config.is_file():
        what = f"is {content}, not a model" if (content := folder_content(directory)) else "holds no config.json"
        raise CheckpointError(f"{directory} {what}; give the directory of a Hugging Face model.")
    weights = read_json(config).get("transformers_weights")
    if weights not in (None, SINGLE_NAME, INDEX_NAME):
        raise CheckpointError(
            f"{config} names {weights!r:.200} as the weights that transformers reads (`transformers_weights`); "
            f"dynquant reads {SINGLE_NAME} or {INDEX_NAME}. Rename the file, and take the entry out of config.json."
        )


def check_original(path: Path, original: Model, option: str = "--reference") -> None:
    """Refuse an original from which dynquant did not make the file or directory at `path`, where that is recorded.

    `option` is what gave the original.

    Raises:
        CheckpointError: the two fingerprints differ, or what the two configurations compute.
    """
    if is_gguf(path):
        metadata = GGUFSource(path).metadata
        fields = {field.key: str(field.value) for field in metadata}
        fields = {key.removeprefix("dynquant."): value for key, value in fields.items()}
        settings = settings_of_metadata(metadata)
    else:
        provenance, settings = quantization_of(path).get("provenance"), settings_of(path)
        fields = provenance if isinstance(provenance, dict) else {}
    recorded = fields.get("fingerprint")
    # A model without some of its experts is healed towards the one with all, but does not load on top of it.
    if option == "--reference" and fields.get("original_fingerprint") == original.fingerprint:
        recorded = original.fingerprint
        settings = {key: value for key, value in settings.items() if key not in COUNTS}
    if recorded and recorded != original.fingerprint:
        raise CheckpointError(
            f"{path} was made from the checkpoint with fingerprint {recorded[:12]}; {original.name} is another, "
            f"{original.fingerprint[:12]}. Give the checkpoint that it was made from as {option}."
        )
    if recorded and (difference := differing_settings(settings, original.settings)):
        raise CheckpointError(
            f"{path} was made from the weights of {original.name} under another configuration than that of "
            f"{original.path}: {difference}. Restore the one that was edited, or export again."
        )


def fault_of(path: Path) -> str:
    """Return why no model can be made of a GGUF file that can be looked at; empty for a whole one, and for others."""
    if not is_gguf(path):
        return ""
    try:
        source = GGUFSource(path)
        kind = next((field.value for field in source.metadata if field.key == "general.type"), "model")
        if kind == "model" and source.names():
            check_complete(source)
    except CheckpointError as error:
        return str(error)
    return ""


def settings_of(path: Path) -> Settings:
    """Return what decides the computation of a GGUF file or directory, packed or not, beside its weights."""
    if is_gguf(path):
        return settings_of_metadata(GGUFSource(path).metadata)
    raw = read_json(path / "config.json")
    if raw.get("model_type") not in FAMILIES or is_vision_checkpoint(path):
        return settings_of_config(raw)
    config = read_config(path, FAMILIES)
    family = FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(None, family.arch)
    try:
        family.write_keys(config, writer)
    except CheckpointError:  # a setting that the family refuses to convert, beside --base-gguf
        return settings_of_config(raw)
    return _settings(recorded_fields(writer), config)


def _settings(metadata: Iterable[MetadataField], config: Config) -> Settings:
    # Factors of long contexts are a tensor in GGUF.
    rope = {"rope_parameters": config.get("rope_parameters", {})}
    return {**settings_of_metadata(metadata), **settings_of_config(rope)}


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=CHECKPOINT_FILES))
    except hub_failures() as error:
        raise CheckpointError(
            f"There is no directory {repo_id} and the hub did not give a model of that name ({error}). Check the "
            "spelling, log in for gated models, or download it and give the directory."
        ) from error


def _open_gguf(path: Path) -> Model:
    source = GGUFSource(path)
    check_complete(source)
    metadata = tuple(
        field for field in source.metadata if field.key not in OWN_KEYS and not field.key.startswith(_OWN_PREFIXES)
    )
    arch = next((field.value for field in metadata if field.key == "general.architecture"), None)
    has_family = arch in {family.arch for family in FAMILIES.values()}
    about = {"settings": settings_of_metadata(metadata), "has_family": has_family}
    return Model(path, source, metadata, lambda name: (name,), gguf_file=path, **about)


def _indexed_names(directory: Path) -> list[str] | None:
    index = directory / INDEX_NAME
    if not index.is_file():
        return None
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise CheckpointError(f"{index} has no `weight_map`, so it is not a safetensors index. Fetch it again.")
    return list(names_with_output(name.removeprefix("language_model.") for name in names).values())


def _build(directory: Path, book: ConversionBook, checkpoint: TensorSource | None) -> Model:
    config = book.config
    family = SIZED_FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(None, family.arch)
    family.add_tensors(book)
    source = ConvertedSource(checkpoint or NoWeights(directory), book.finish())
    write_general_keys(writer, directory, source)
    family.write_keys(config, writer)
    if checkpoint is not None or any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        write_tokenizer(writer, directory, config.integer("vocab_size"))
    metadata = recorded_fields(writer)
    about = {"hf_directory": directory, "settings": _settings(metadata, config)}
    return Model(directory, source, metadata, source.checkpoint_names, **about)


class NoWeights:
    """Stands in for weights where a configuration alone is opened."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def fingerprint(self) -> str:
        return "config-only"

    def names(self) -> list[str]:
        return []

    def info(self, name: str) -> NoReturn:
        self.load(name)

    def load(self, name: str, index: int | None = None) -> NoReturn:
        raise CheckpointError(f"{self._directory} was opened for its configuration only; `{name}` cannot be read.")
