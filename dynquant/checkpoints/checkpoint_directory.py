"""The files of a safetensors checkpoint: shards and their names, small files, and the hash of all but the weights."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dynquant.checkpoints.safetensors_format import ShardLayout, StoredTensor, group_by_size, lay_out
from dynquant.checkpoints.safetensors_source import INDEX_NAME, SINGLE_NAME
from dynquant.storage.resumable_output import Region, ResumableOutput

SHARD_BYTES = 5_000_000_000
_COPIED_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def shards_of(tensors: Sequence[StoredTensor], max_bytes: int = SHARD_BYTES) -> dict[str, ShardLayout]:
    """Layouts by file name. Raises ExportError: one tensor alone is larger than `max_bytes`."""
    groups = group_by_size(tensors, max_bytes)
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [SINGLE_NAME]
    return {name: lay_out(group, {"format": "pt"}) for name, group in zip(names, groups, strict=True)}


def index_of(shards: Mapping[str, ShardLayout]) -> dict[str, bytes]:
    """The index by its name, or nothing for a single shard."""
    if len(shards) == 1:
        return {}
    weight_map = {key: name for name, shard in shards.items() for key in shard.spans}
    size = sum(length for shard in shards.values() for _, length in shard.spans.values())
    return {INDEX_NAME: as_json({"metadata": {"total_size": size}, "weight_map": weight_map})}


def copied_files(directory: Path) -> dict[str, bytes]:
    """Tokenizer, processor and generation files of a checkpoint, those that are there."""
    paths = [directory / name for name in _COPIED_FILES]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def as_json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def files_hash(documents: Mapping[str, bytes], shards: Mapping[str, ShardLayout]) -> str:
    """SHA-256 over small files and headers, in their order."""
    digest = hashlib.sha256()
    for content in (*documents.values(), *(shard.header for shard in shards.values())):
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def places_of(
    output: Path, documents: Mapping[str, bytes], shards: Mapping[str, ShardLayout]
) -> tuple[dict[Path, int], dict[str, Region]]:
    """Return the sizes of the files in `output`, and what is written there: documents and headers of shards under the
    names of the files, tensors under their keys."""
    sizes, regions = {}, {}
    for number, (name, content) in enumerate(documents.items()):
        sizes[output / name], regions[name] = len(content), Region(number, 0, len(content))
    for number, (name, shard) in enumerate(shards.items(), start=len(documents)):
        sizes[output / name], regions[name] = shard.total_bytes, Region(number, 0, len(shard.header))
        regions |= {key: Region(number, *span) for key, span in shard.spans.items()}
    return sizes, regions


def write_small_files(
    output: ResumableOutput, documents: Mapping[str, bytes], shards: Mapping[str, ShardLayout]
) -> None:
    """Documents and the headers of shards, where they are not written yet; regions carry the names of the files."""
    for name, content in {**documents, **{name: shard.header for name, shard in shards.items()}}.items():
        if name not in output.finished:
            output.write(name, content)


def tensor_bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())
