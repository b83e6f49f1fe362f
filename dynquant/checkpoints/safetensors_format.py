"""The safetensors format: headers read and written, tensors read from their place in a file, and files joined.

    length u64 | JSON {name: {dtype, shape, data_offsets}} padded with spaces to 8 | data without gaps

Tensors lie in order of the size of their elements, largest first, so that each is aligned.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from dynquant.errors import CheckpointError, ExportError, unreadable
from dynquant.formats.plain_quants import DTYPE_BYTES
from dynquant.formats.storage_format import StoredTensor
from dynquant.storage.atomic import checksums_of, read_tensors_header, tensors_metadata, writing
from dynquant.storage.file_kinds import SAFETENSORS, refuse_other_kind
from dynquant.storage.stand_ins import refuse_stand_in
from dynquant.storage.strict_json import parse_json

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_NAME_OF = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_WRITING_ORDER = ["I64", "F64", "F32", "I32", "BF16", "F16", "F8_E4M3", "U8"]
"""The safetensors library's order of types: larger elements first."""
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
_MAX_NAME_LENGTH = 512
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 1 << 63


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


@dataclass(frozen=True)
class FileSpan:
    """Place of a tensor: `offset` bytes from the start of a file."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def row_values(self) -> int:
        """Values of one slice of the first dimension."""
        return 1 if not self.shape else torch.Size(self.shape[1:]).numel()

    def read(self, index: int | slice | None = None, *, count: int | None = None) -> Tensor:
        """The tensor, slice or range `index` of its first dimension, or the first `count` values of that.

        Bytes go from the file into memory that the tensor owns; mapped pages would count as this process's memory for
        as long as the file is open. Safe to call from several threads.

        Raises:
            OSError: the file is gone, or ends early.
        """
        dtype = TORCH_DTYPES[self.dtype]
        first = 0
        shape = self.shape
        if isinstance(index, slice):
            first, stop, _ = index.indices(shape[0])
            shape = (max(0, stop - first), *shape[1:])
        elif index is not None:
            first, shape = index, shape[1:]
        total = torch.Size(shape).numel()
        if count is not None and count < total:
            shape, total = (count,), count
        start = first * self.row_values
        buffer = torch.empty(total * dtype.itemsize, dtype=torch.uint8)
        rest = memoryview(buffer.numpy())
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * dtype.itemsize)
            while rest:
                taken = file.readinto(rest[: 1 << 28])  # type: ignore[attr-defined]
                if not taken:
                    raise OSError(f"{self.path} ends {len(rest):,} bytes early")
                rest = rest[taken:]
        return buffer.view(dtype).reshape(shape)


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file. Nothing but the header is read.

    Raises:
        CheckpointError: no such file, no header, names, shapes or offsets that cannot be, or a tensor whose bytes are
            not all there; the tensor is named.
    """
    try:
        refuse_stand_in(file)
        refuse_other_kind(file, SAFETENSORS, SAFETENSORS)
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
            unreadable(file, error)
            or f"{file} is not a complete safetensors file ({error}). It is truncated or corrupt; fetch it again."
        ) from error
    _check_order(file, spans, size - 8 - length)
    return header


def spans_of(path: Path) -> dict[str, FileSpan]:
    """Return the place of each tensor of a safetensors file.

    Raises:
        CheckpointError: not a complete safetensors file.
    """
    header = read_header(path)
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    return {
        name: FileSpan(path, start + begin, entry["dtype"], tuple(entry["shape"]), end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def merge_tensor_files(
    path: Path,
    parts: Sequence[Path],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, object],
    stop: Event | None = None,
) -> None:
    """Write all tensors of `parts`, and `tensors`, to `path`, with the bytes that the safetensors library would write.

    One tensor is in memory at a time, and the file appears whole or not at all; `stop` ends it before the next tensor.

    Raises:
        WriteError: no space or no permission.
        CancelledError: `stop` was set.
    """
    spans = {name: span for part in parts for name, span in spans_of(part).items()}
    entries = [StoredTensor(name, span.dtype, span.shape) for name, span in spans.items()]
    entries += [StoredTensor(name, _NAME_OF[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    entries.sort(key=lambda entry: (_WRITING_ORDER.index(entry.dtype), entry.key))
    sums = checksums_of(tensors)
    for part in parts:  # written by `save_tensors`
        sums |= read_tensors_header(part)["crc32"]
    layout = lay_out(entries, tensors_metadata(header, sums))
    with writing(path) as temporary, temporary.open("wb") as file:
        file.write(layout.header)
        for entry in entries:
            if stop is not None and stop.is_set():
                raise CancelledError
            values = spans[entry.key].read() if entry.key in spans else tensors[entry.key]
            file.write(memoryview(values.contiguous().view(-1).view(torch.uint8).numpy()))


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
