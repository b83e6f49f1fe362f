"""Vision-language checkpoints under the names of `vision_names`: language model, tower and projector in one view.

The view serves calibration, error tables and plans. Tensors are taken as they are stored, without the permutations of
rotary heads that llama.cpp wants: those move whole rows, which no error depends on. Convolutions over two frames are
split by frame, and what has no GGUF name keeps a readable one and stays precise.
"""

import warnings
from pathlib import Path
from typing import Any

import gguf
import torch

from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.model import Model, ModelPart
from dynquant.checkpoints.safetensors_source import SafetensorsSource, refuse_quantized
from dynquant.checkpoints.tensor_roles import gguf_name_of
from dynquant.checkpoints.vision_names import keys_of, language_name
from dynquant.errors import CheckpointError
from dynquant.families.common.config import Config, hf_config, read_json
from dynquant.families.common.conversion import Conversion, ConvertedSource, differ, unchanged
from dynquant.families.common.conversion_book import some_of
from dynquant.families.common.metadata import recorded_fields, write_general_keys
from dynquant.families.tokenizers.tokenizer import write_tokenizer
from dynquant.families.vision.parts import open_language_part, open_projector_part

VISION_TYPES = ("qwen2_vl", "qwen2_5_vl", "mllama", "llava", "mistral3", "gemma3")
"""`model_type` of the checkpoints that can be opened. Pixtral is a LLaVA with Pixtral's vision tower."""

_LANGUAGE_ARCH = {
    "qwen2_vl_text": "qwen2vl", "qwen2_5_vl_text": "qwen2vl", "mllama_text_model": "llama", "llama": "llama",
    "mistral": "llama", "ministral": "llama", "ministral3": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}  # fmt: skip


def has_tower(directory: Path) -> bool:
    """Return whether config.json describes a model with a vision tower."""
    path = directory / "config.json"
    return path.is_file() and isinstance(read_json(path).get("vision_config"), dict)


def is_vision_checkpoint(directory: Path) -> bool:
    """Return whether config.json describes a model whose vision tower is opened; of others the language model is."""
    if not has_tower(directory):
        return False
    raw = read_json(directory / "config.json")
    text = raw.get("text_config")
    stated = text.get("model_type") if isinstance(text, dict) else None
    return raw.get("model_type") in VISION_TYPES and (stated is None or stated in _LANGUAGE_ARCH)


def open_vision(directory: Path) -> Model:
    """Open a vision-language checkpoint; nothing but headers, configuration and tokenizer is read. Raises
    CheckpointError: missing or damaged files, or a family or language model that is not known."""
    config = _read_config(directory)
    text = config.get_text_config()
    arch = _LANGUAGE_ARCH.get(str(text.model_type))
    if arch is None:
        raise CheckpointError(
            f"{directory / 'config.json'} has a language model of type {text.model_type!r}, which dynquant does not "
            f"know inside a vision-language model (it knows: {', '.join(sorted(_LANGUAGE_ARCH))})."
        )
    stored = SafetensorsSource(directory)
    _check_complete(directory, config, stored)
    copy = _tied_copy(config, stored)
    conversions = [
        conversion
        for name in stored.names()
        if name != copy
        for conversion in _conversions(stored, name, arch, text.num_hidden_layers)
    ]
    source = ConvertedSource(stored, conversions)
    parts, unwritten = _parts(directory, config, stored)
    language = next((part.model for part in parts if not part.is_projector), None)
    metadata = language.metadata if language is not None else _sizes(directory, text, arch, source)
    return Model(
        directory, source, metadata, source.checkpoint_names, hf_directory=directory, parts=parts, unwritten=unwritten
    )


def _parts(directory: Path, config: Any, stored: SafetensorsSource) -> tuple[tuple[ModelPart, ...], tuple[str, ...]]:
    """The GGUF files that llama.cpp has a place for, the small mmproj first, and why others are missing."""
    values = config.to_dict()
    whole = Config(directory / "config.json", values, values)
    parts, unwritten = [], []
    openers = {"Vision tower and projector": open_projector_part, "Language model": open_language_part}
    for what, open_part in openers.items():
        try:
            parts.append(open_part(directory, whole, stored))
        except CheckpointError as error:
            unwritten.append(f"{what}: {error}")
    return tuple(parts), tuple(unwritten)


def _check_complete(directory: Path, config: Any, stored: SafetensorsSource) -> None:
    """Raise CheckpointError for a checkpoint without some of the weights that its configuration calls for."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        hf_model = AutoModelForImageTextToText.from_config(config)
    held = keys_of(stored.names(), hf_model.state_dict()).values()
    lost = {name for name, _ in hf_model.named_parameters()} - set(held)
    if lost:
        raise CheckpointError(
            f"{directory} lacks {len(lost)} weights that its configuration calls for: {some_of(lost)}. The download is "
            "incomplete, or config.json belongs to another model."
        )


def _tied_copy(config: Any, stored: SafetensorsSource) -> str | None:
    """Return the stored copy of the embedding that a configuration with tied matrices does without."""
    by_name = {language_name(name): name for name in stored.names()}
    head, embedding = by_name.get("lm_head.weight"), by_name.get("model.embed_tokens.weight")
    if not config.to_dict().get("tie_word_embeddings") or head is None or embedding is None:
        return None
    return None if differ(stored, head, embedding) else head


def _sizes(directory: Path, text: Any, arch: str, source: ConvertedSource) -> tuple[MetadataField, ...]:
    """Keys of a model that is not written as GGUF: what planning needs, and the tokenizer as part of the size."""
    writer = gguf.GGUFWriter(None, arch)
    write_general_keys(writer, directory, source)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads or text.num_attention_heads)
    writer.add_vocab_size(text.vocab_size)
    try:
        write_tokenizer(writer, directory, text.vocab_size)
    except CheckpointError as error:
        warnings.warn(f"the plan's size leaves the tokenizer out: {error}", stacklevel=2)
    return recorded_fields(writer)


def _read_config(directory: Path) -> Any:
    refuse_quantized(directory, read_json(directory / "config.json").get("quantization_config"))
    return hf_config(directory)


def _conversions(stored: SafetensorsSource, name: str, arch: str, n_layer: int) -> list[Conversion]:
    info = stored.info(name)
    # What has no GGUF name keeps its own: `model.layers.3.some_gate` becomes `blk.3.some_gate`.
    plain = language_name(name).removeprefix("model.").replace("layers.", "blk.", 1)
    target = gguf_name_of(name, arch, n_layer) or plain
    if len(info.shape) == 5:
        shape = (*info.shape[:2], *info.shape[3:])
        names = [target, *(f"{target}.{frame}" for frame in range(1, info.shape[2]))]
        frames = [lambda values, frame=frame: values[:, :, frame] for frame in range(info.shape[2])]
        return [Conversion(part, (name,), shape, info.dtype, frame) for part, frame in zip(names, frames, strict=True)]
    if target == "mm.input_projection.weight" and name.endswith("mm_input_projection_weight"):
        return [Conversion(target, (name,), info.shape[::-1], info.dtype, torch.t)]
    if not info.shape:
        return [Conversion(target, (name,), (1,), info.dtype, lambda values: values.reshape(1))]
    return [Conversion(target, (name,), info.shape, info.dtype, unchanged)]
