"""Exact bytes of what a plan becomes, GGUF or compressed-tensors files, known before any weight is read."""

import re
from collections.abc import Iterable, Mapping, Sequence

from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.checkpoint_directory import shards_of
from dynquant.checkpoints.gguf_layout import ImatrixInfo, Provenance, TensorSpec, predicted_bytes
from dynquant.checkpoints.model import Model, ModelPart
from dynquant.checkpoints.safetensors_format import StoredTensor
from dynquant.families.linear_layers import LinearCheckpoint
from dynquant.formats.vllm_schemes import Scheme
from dynquant.storage.file_names import STATS_NAME

_OFFSET_DIGITS = 14


def imatrix_info(stats: CalibrationStats | None) -> ImatrixInfo | None:
    """Return what a GGUF file says of the statistics it was made with."""
    if stats is None:
        return None
    provenance = stats.provenance
    return ImatrixInfo(
        file=_last_component(provenance.imported_from or STATS_NAME),
        dataset=_last_component(provenance.text_name),
        num_entries=len(stats.inputs.keys() | stats.aliases.keys()),
        num_chunks=provenance.num_windows,
    )


def _last_component(name: str) -> str:
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def gguf_bytes(
    model: Model, specs: Sequence[TensorSpec], recipe: str, stats: CalibrationStats | None, stats_hash: str | None
) -> int:
    """Return the size of the GGUF file, or of the files of all parts, that hold these tensors of the whole model."""
    provenance = Provenance(model.fingerprint, recipe, stats_hash=stats_hash or "")
    imatrix = imatrix_info(stats)
    if not model.parts or model.unwritten:
        return predicted_bytes(model, specs, provenance, imatrix)
    types = {spec.name: spec.type for spec in specs}
    return sum(predicted_bytes(part.model, part_specs(part, types), provenance, imatrix) for part in model.parts)


def part_specs(part: ModelPart, types: Mapping[str, str]) -> list[TensorSpec]:
    """Return the tensors of a file with the types of the whole model's tensors; what those do not hold is F32."""
    source = part.model.source
    return [
        TensorSpec(name, source.info(name).shape, types.get(part.plan_name(name), "F32")) for name in source.names()
    ]


def tensors_of_checkpoint(checkpoint: LinearCheckpoint, schemes: Mapping[str, Scheme]) -> list[StoredTensor]:
    """Return all tensors of a compressed-tensors checkpoint; `schemes` are those of its linear layers, by name."""
    linears = {linear.name: linear for linear in checkpoint.linears}
    stored = [tensor for name, scheme in schemes.items() for tensor in linears[name].stored_as(scheme)]
    return [*checkpoint.others, *stored]


def safetensors_bytes(tensors: Sequence[StoredTensor]) -> int:
    """Return the size of all safetensors files in shards of the default size."""
    return sum(shard.total_bytes for shard in shards_of(tensors).values())


def safetensors_bytes_at_most(tensors: Iterable[StoredTensor]) -> int:
    """Return the bytes of the tensors with all that headers say of them, and a few more."""
    return sum(
        tensor.num_bytes
        + len(f'"{tensor.key}":{{"dtype":"{tensor.dtype}","shape":[],"data_offsets":[,]}},')
        + sum(len(str(size)) + 1 for size in tensor.shape)
        + 2 * _OFFSET_DIGITS  # begin and end, of at most 100 TB
        for tensor in tensors
    )


def fixed_safetensors_bytes(checkpoint: LinearCheckpoint) -> int:
    """Return the bytes, at most, of what has no choice. An empty file has a header too; its padding is the 8 bytes."""
    return safetensors_bytes_at_most(checkpoint.others) + safetensors_bytes([]) + 8
