"""The two GGUF files of a vision-language checkpoint: its language model in a family of its own, and the mmproj file.

llama.cpp keeps them apart: the first is a text model, the second holds vision tower and projector (`projector`).
"""

from pathlib import Path

import gguf

from dynquant.checkpoints.model import Model, ModelPart
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.checkpoints.vision_names import language_name, vision_name
from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config, finite, read_json
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.common.conversion_book import ConversionBook
from dynquant.families.common.metadata import recorded_fields, write_general_keys
from dynquant.families.text.qwen import add_qwen_tensors, write_qwen_keys
from dynquant.families.text.registry import FAMILIES, Family
from dynquant.families.tokenizers.files import read_tokenizer_files
from dynquant.families.tokenizers.tokenizer import write_tokenizer
from dynquant.families.vision.projector import ARCH, IMG_BREAK, projector_of, write_projector_keys
from dynquant.families.vision.renamed_source import RenamedSource

_QWEN_VL = ("qwen2_vl_text", "qwen2_5_vl_text")
_EMBEDDING = "model.embed_tokens.weight"


def open_language_part(directory: Path, config: Config, stored: SafetensorsSource) -> ModelPart:
    """The language model as a GGUF file of its own. Raises CheckpointError: a family that llama.cpp does not have, or
    cannot run faithfully."""
    text = config.part("text_config")
    kind = text.model_type
    family = Family("qwen2vl", _write_qwen2vl_keys, add_qwen_tensors) if kind in _QWEN_VL else FAMILIES.get(kind)
    if family is None:
        raise CheckpointError(f"llama.cpp has no graph for the language model of {config.path}, of type {kind!r}.")
    values = {**text.values, "tie_word_embeddings": bool(config.get("tie_word_embeddings", False))}
    if kind in _QWEN_VL:
        values["model_type"] = "qwen2"
    text_config = Config(config.path, values, values)
    names = {language_name(name): name for name in stored.names() if vision_name(name) is None}
    view = RenamedSource(stored, names)
    book = ConversionBook(text_config, view)
    family.add_tensors(book)
    writer = gguf.GGUFWriter(None, family.arch)
    source = ConvertedSource(view, book.finish())
    write_general_keys(writer, directory, source)
    family.write_keys(text_config, writer)
    write_tokenizer(writer, directory, text_config.integer("vocab_size"))
    return ModelPart(_model(directory, source, view, writer), lambda name: name)


def open_projector_part(directory: Path, config: Config, stored: SafetensorsSource) -> ModelPart:
    """Vision tower and projector as llama.cpp's mmproj file. Raises CheckpointError: a tower or projector that
    llama.cpp does not have, or a missing image processor."""
    projector = projector_of(config)
    names = {vision: name for name in stored.names() if (vision := vision_name(name)) is not None}
    embedding = next((name for name in stored.names() if language_name(name) == _EMBEDDING), None)
    rows = {}
    if projector.type == "pixtral" and embedding is not None:
        rows[IMG_BREAK] = embedding, _token_id(directory, "[IMG_BREAK]", stored.info(embedding).shape[0])
    view = RenamedSource(stored, names, rows)
    book = ConversionBook(config, view)
    projector.add_tensors(book)
    writer = gguf.GGUFWriter(None, ARCH)
    source = ConvertedSource(view, book.finish())
    write_general_keys(writer, directory, source, gguf.GGUFType.MMPROJ)
    write_projector_keys(config, writer, *_mean_and_std(directory))
    model = _model(directory, source, view, writer)
    return ModelPart(model, lambda name: next(iter(source.checkpoint_names(name))), is_projector=True)


def _model(directory: Path, source: ConvertedSource, view: RenamedSource, writer: gguf.GGUFWriter) -> Model:
    def checkpoint_names(name: str) -> tuple[str, ...]:
        return tuple(map(view.stored_name, source.checkpoint_names(name)))

    return Model(directory, source, recorded_fields(writer), checkpoint_names, hf_directory=directory)


def _write_qwen2vl_keys(config: Config, writer: gguf.GGUFWriter) -> None:
    write_qwen_keys(config, writer)
    parameters = config.get("rope_parameters")
    sections = parameters.get("mrope_section") if isinstance(parameters, dict) else None
    if not isinstance(sections, list) or len(sections) != 3 or not all(isinstance(part, int) for part in sections):
        config.refuse(f"`mrope_section` is {sections!r}; three parts of a head are needed, for time, height and width")
    writer.add_rope_dimension_sections([*sections, 0])


def _token_id(directory: Path, text: str, vocab_size: int) -> int:
    for token_id, token in read_tokenizer_files(directory).added.items():
        if token.content == text and token_id < vocab_size:
            return token_id
    raise CheckpointError(
        f"The tokenizer files of {directory} give the token {text}, which Pixtral puts behind each row, no id below "
        f"{vocab_size:,}. Fetch the file again."
    )


def _mean_and_std(directory: Path) -> tuple[list[float], list[float]]:
    """Return what the image processor subtracts and divides by."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (directory / name).is_file():
            continue
        values = read_json(directory / name)
        inner = values.get("image_processor")
        values = inner if isinstance(inner, dict) else values
        mean, std = values.get("image_mean"), values.get("image_std")
        if isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3:
            finite_mean = [finite(value, "image_mean", directory / name) for value in mean]
            return finite_mean, [finite(value, "image_std", directory / name) for value in std]
    raise CheckpointError(
        f"{directory} has no preprocessor_config.json or processor_config.json with `image_mean` and `image_std` of "
        "three numbers each, which an mmproj file needs. Copy it from the original checkpoint."
    )
