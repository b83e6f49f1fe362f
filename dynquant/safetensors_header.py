"""The header of safetensors files: what it says of a file that is read, and the bytes of one that is written.

    length u64 | JSON {name: {dtype, shape, data_offsets}} padded with spaces to 8 | data without gaps

Tensors lie in order of the size of their elements, largest first, so that each is aligned.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dynquant.errors import CheckpointError, ExportError

DTYPE_BYTES = {
    "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a file that is to be written."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardLayout:
    """One file: its header; first byte, counted from the start of the file, and length of each tensor."""

    header: bytes
    spans: dict[str, tuple[int, int]]
    total_bytes: int


def lay_out(tensors: Sequence[StoredTensor], metadata: Mapping[str, str]) -> ShardLayout:
    """Header and offsets of one file."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    for tensor in ordered:
        entries[tensor.key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    header = len(text).to_bytes(8, "little") + text
    spans = {t.key: (len(header) + entries[t.key]["data_offsets"][0], t.num_bytes) for t in ordered}
    return ShardLayout(header, spans, len(header) + offset)


def group_by_size(tensors: Sequence[StoredTensor], max_bytes: int | None) -> list[list[StoredTensor]]:
    """Tensors in their order, in groups of at most `max_bytes` of data.

    Raises:
        ExportError: one tensor alone is larger.
    """
    groups: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if max_bytes is not None and tensor.num_bytes > max_bytes:
            raise ExportError(
                f"Files of at most {max_bytes:,} bytes were asked for, but `{tensor.key}` takes {tensor.num_bytes:,} "
                "and a tensor cannot be split. Give a limit of at least that."
            )
        if groups[-1] and max_bytes is not None and size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    return groups


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file.

    Raises:
        CheckpointError: no header, or a tensor whose bytes are not all there; the tensor is named.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            _check_entry(file, name, entry, size - 8 - length)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file ({error}). Fetch it again.") from error
    return header


def _check_entry(file: Path, name: str, entry: dict[str, Any], data_bytes: int) -> None:
    start, end = entry["data_offsets"]
    if end > data_bytes:
        raise CheckpointError(
            f"{file} is truncated: `{name}` ends at byte {end:,} of its data, which has {data_bytes:,}. Fetch it again."
        )
    expected = prod(entry["shape"]) * DTYPE_BYTES.get(entry["dtype"], 0)
    if entry["dtype"] in DTYPE_BYTES and end - start != expected:
        raise CheckpointError(
            f"{file} gives `{name}` {end - start:,} bytes, but {entry['dtype']} {entry['shape']} takes {expected:,}. "
            "It is corrupt; fetch it again."
        )
