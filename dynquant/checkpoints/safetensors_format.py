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
from dynquant.formats.storage_format import DTYPE_BYTES
from dynquant.storage.strict_json import parse_json

_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_MAX_NAME_LENGTH = 512
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 1 << 63


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
    """Name -> {dtype, shape, data_offsets} of a safetensors file. Nothing but the header is read.

    Raises:
        CheckpointError: no such file, no header, names, shapes or offsets that cannot be, or a tensor whose bytes are
            not all there; the tensor is named.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = parse_json(handle.read(length), unique_names=True)
        if not isinstance(header, dict):
            raise ValueError(f"its header is a JSON {type(header).__name__}")
        header.pop("__metadata__", None)
        spans = {name: _checked_span(file, name, entry, size - 8 - length) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist. The download is incomplete; fetch it again.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not a complete safetensors file ({error}). It is truncated or corrupt; fetch it again."
        ) from error
    _check_order(file, spans, size - 8 - length)
    return header


def _checked_span(file: Path, name: str, entry: Any, data_bytes: int) -> tuple[int, int]:
    """First and last byte of one tensor. Raises ValueError, and CheckpointError for a tensor that is cut off."""
    if not name or len(name) > _MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError(f"the name {name!r:.100} is empty, longer than {_MAX_NAME_LENGTH} or has control characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"`{name}` does not have dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_counts(shape) or not _are_counts(span) or len(span) != 2:
        raise ValueError(f"`{name}` has the dtype {dtype!r:.40}, shape {shape!r:.60} and data_offsets {span!r:.60}")
    if len(shape) > _MAX_DIMENSIONS or prod(shape) >= _MAX_ELEMENTS:
        raise ValueError(f"`{name}` has the impossible shape {shape!r:.100}")
    start, end = span
    if end > data_bytes:
        raise CheckpointError(
            f"{file} is truncated: `{name}` ends at byte {end:,} of its data, which has {data_bytes:,}. Fetch it again."
        )
    if dtype in DTYPE_BYTES and end - start != prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(
            f"{file} gives `{name}` {end - start:,} bytes, but {dtype} {shape} takes "
            f"{prod(shape) * DTYPE_BYTES[dtype]:,}. It is corrupt; fetch it again."
        )
    return start, end


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_ELEMENTS for value in values)


def _check_order(file: Path, spans: dict[str, tuple[int, int]], data_bytes: int) -> None:
    """Tensors follow each other without overlaps or gaps, as the format demands: nothing hides between them."""
    at = 0
    for name, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start != at or end < start:
            raise CheckpointError(
                f"{file} places `{name}` at bytes {start:,} to {end:,} of its data, but the tensor before it ends at "
                f"{at:,}. Tensors that overlap or leave gaps are not safetensors; fetch the file again."
            )
        at = end
    if at != data_bytes:
        raise CheckpointError(
            f"{file} has {data_bytes - at:,} bytes after its last tensor. It is corrupt; fetch it again."
        )
