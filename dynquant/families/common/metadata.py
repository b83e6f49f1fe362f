"""GGUF metadata of a converted checkpoint: gguf-py's writer is used as the recorder of keys and value types."""

from pathlib import Path

import gguf
from gguf import GGUFValueType

from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.tensor_source import TensorSource


def write_general_keys(
    writer: gguf.GGUFWriter, directory: Path, source: TensorSource, kind: str = gguf.GGUFType.MODEL
) -> None:
    """`general.*` keys: type, and what the directory name and model card tell (name, size label, license, …)."""
    total, shared, expert, count = _parameter_counts(source)
    metadata = gguf.Metadata.load(None, directory, None, total)
    metadata.name = metadata.name or directory.name
    metadata.size_label = metadata.size_label or gguf.size_label(total, shared, expert, count)
    writer.add_type(kind)
    metadata.set_gguf_meta_model(writer)


def recorded_fields(writer: gguf.GGUFWriter) -> tuple[MetadataField, ...]:
    """All keys that a writer was given, in order, with the types under which it would store them."""
    fields = []
    for key, entry in writer.kv_data[0].items():
        item_type = None
        if entry.type == GGUFValueType.ARRAY:
            item_type = entry.sub_type or GGUFValueType.get_type(entry.value[0])
        fields.append(MetadataField(key, entry.value, entry.type, item_type))
    return tuple(fields)


def _parameter_counts(source: TensorSource) -> tuple[int, int, int, int]:
    """Parameters in all, outside routed experts, in one expert of each stack; and the number of experts."""
    total = shared = expert = count = 0
    for info in map(source.info, source.names()):
        total += info.numel
        if "_exps." in info.name:
            count = info.shape[0]
            expert += info.numel // count
        else:
            shared += info.numel
    return total, shared, expert, count
