"""The tensors of a compressed-tensors checkpoint and their places in its files, known before any weight is read."""

from collections.abc import Iterable, Sequence

from dynquant.checkpoints.checkpoint_directory import shards_of
from dynquant.checkpoints.safetensors_format import StoredTensor
from dynquant.families.linear_layers import LinearLayer, ServedCheckpoint
from dynquant.formats.vllm_schemes import Scheme
from dynquant.recipes.serving_plan import ServingEntry

_OFFSET_DIGITS = 14


def tensors_of_layer(linear: LinearLayer, scheme: Scheme, group: int) -> list[StoredTensor]:
    """What a linear layer, or each expert of a stack, is stored as."""
    parts = scheme.parts(linear.shape[-2], linear.shape[-1], group)
    return [
        StoredTensor(f"{module}.{part.suffix}", part.dtype, part.shape) for module in linear.modules for part in parts
    ]


def tensors_of_checkpoint(checkpoint: ServedCheckpoint, entries: Iterable[ServingEntry]) -> list[StoredTensor]:
    """All tensors, linear layers in the order of the entries."""
    linears = {linear.name: linear for linear in checkpoint.linears}
    found = list(checkpoint.others)
    for entry in entries:
        found += tensors_of_layer(linears[entry.name], entry.stored_as, entry.group_size)
    return found


def file_bytes(tensors: Sequence[StoredTensor]) -> int:
    """Size of all safetensors files in shards of the default size."""
    return sum(shard.total_bytes for shard in shards_of(tensors).values())


def bytes_at_most(tensors: Iterable[StoredTensor]) -> int:
    """Data, and no less than what headers say of these tensors."""
    return sum(
        tensor.num_bytes + len(f'"{tensor.key}":{{"dtype":"{tensor.dtype}","shape":[],"data_offsets":[,]}},')
        + sum(len(str(size)) + 1 for size in tensor.shape) + 2 * _OFFSET_DIGITS
        for tensor in tensors
    )  # fmt: skip
