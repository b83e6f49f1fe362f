"""The header of a GGUF file, read as what a stranger wrote: counts, lengths and offsets are checked before use.

    magic, version, number of tensors, number of keys | keys | tensors | padding | data, each tensor aligned

gguf-py's reader believes what it reads: one flipped bit and it loops over an array of 2^60 items. What is refused here
can be in no file that llama.cpp loads. Values are copies; nothing refers to the file afterwards.
"""

import struct
from dataclasses import dataclass
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType

from dynquant.errors import CheckpointError, unreadable
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.storage.file_kinds import GGUF, refuse_other_kind
from dynquant.storage.stand_ins import refuse_stand_in

_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_WEIGHTS = 1 << 63
_MAX_NAME_BYTES = 63
"""llama.cpp's GGML_MAX_NAME is 64 with the closing zero."""
_MAX_KEY_BYTES = 65_535
_MAX_HEADER_BYTES = 1 << 28
"""The largest headers hold a vocabulary of 260,000 tokens with its merges: 11 MB."""
_MAX_ARRAY_ITEMS = 1 << 22
"""Limit for all arrays together; that vocabulary has 1.3 million."""
_MAX_ALIGNMENT = 1 << 20
_SMALLEST_KEY = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8
_SCALARS = {
    GGUFValueType.UINT8: "u1", GGUFValueType.INT8: "i1", GGUFValueType.BOOL: "u1", GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2", GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip
"""numpy's name of each value type that has a fixed size."""


@dataclass(frozen=True)
class MetadataField:
    """One GGUF key/value pair. `item_type` is the element type of an array."""

    key: str
    value: object
    value_type: GGUFValueType
    item_type: GGUFValueType | None = None


@dataclass(frozen=True)
class GGUFTensor:
    """One stored tensor. `shape` has the row length last; `offset` counts bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Keys and tensors of one file in its order. `text_spans` are first byte and length of the string values."""

    path: Path
    fields: dict[str, MetadataField]
    tensors: dict[str, GGUFTensor]
    text_spans: dict[str, tuple[int, int]]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check the header of one file.

    Raises:
        CheckpointError: no such file, a header that cannot be true of the file, or a tensor type that ggml does not
            have.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, not a GGUF file. Give the file in it.")
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Check the path; of a split GGUF all parts must be present.")
    try:
        refuse_stand_in(path)
        refuse_other_kind(path, GGUF, GGUF)
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return _Parser(path, data).header()
    except (ValueError, OSError) as error:
        raise CheckpointError(
            unreadable(path, error)
            or f"{path} is not a complete GGUF file ({error}). It is truncated or corrupt; fetch or make it again."
        ) from error


class _Parser:
    """A position in the file that only moves over bytes that exist. Raises ValueError for what cannot be true."""

    def __init__(self, path: Path, data: mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0
        self._items_left = _MAX_ARRAY_ITEMS

    def header(self) -> GGUFHeader:
        if self._number("<I") != GGUF_MAGIC:
            raise ValueError("the file does not begin with `GGUF`")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version:#x} is neither 2 nor 3 in little-endian order")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        self._expect(num_keys, _SMALLEST_KEY, "keys")
        fields: dict[str, MetadataField] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(num_keys):
            field = self._field()
            if field.key in fields:
                raise ValueError(f"the key `{field.key}` is there twice")
            fields[field.key] = field
            if field.value_type == GGUFValueType.STRING:
                length = len(field.value.encode())  # type: ignore[attr-defined]
                spans[field.key] = self._at - length, length
        self._expect(num_tensors, _SMALLEST_TENSOR, "tensors")
        described = [self._tensor() for _ in range(num_tensors)]
        return GGUFHeader(self._path, fields, self._placed(described, _alignment(fields)), spans)

    def _expect(self, count: int, item_bytes: int, what: str) -> None:
        """Refuse a count of items that the rest of the file, or any sensible header, cannot hold."""
        left = min(len(self._data), _MAX_HEADER_BYTES) - self._at
        if count * item_bytes > left:
            raise ValueError(f"{count:,} {what} are announced at byte {self._at:,}, but only {left:,} bytes can follow")

    def _number(self, layout: str) -> int:
        size = struct.calcsize(layout)
        self._expect(size, 1, "bytes")
        self._at += size
        return struct.unpack_from(layout, self._data, self._at - size)[0]

    def _string(self) -> str:
        length = self._number("<Q")
        self._expect(length, 1, "characters")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _name(self, max_bytes: int) -> str:
        """A string that may be printed in a message or be part of a file name."""
        name = self._string()
        if not name or len(name.encode()) > max_bytes or not name.isprintable() or {"/", "\\"} & set(name):
            shown = repr(name if len(name) <= 80 else f"{name[:80]}...")
            raise ValueError(
                f"the name {shown} before byte {self._at:,} is empty, longer than {max_bytes:,} bytes, or has control "
                "characters or slashes"
            )
        return name

    def _field(self) -> MetadataField:
        key = self._name(_MAX_KEY_BYTES)
        kind = GGUFValueType(self._number("<I"))
        if kind == GGUFValueType.STRING:
            return MetadataField(key, self._string(), kind)
        if kind == GGUFValueType.ARRAY:
            item_kind = GGUFValueType(self._number("<I"))
            return MetadataField(key, self._array(key, item_kind, self._number("<Q")), kind, item_kind)
        return MetadataField(key, self._scalars(kind, 1)[0], kind)

    def _array(self, key: str, kind: GGUFValueType, count: int) -> list[object]:
        if kind == GGUFValueType.ARRAY:
            raise ValueError(f"`{key}` is an array of arrays, which no model file has")
        if count > self._items_left:
            raise ValueError(f"`{key}` has {count:,} items; {_MAX_ARRAY_ITEMS:,} are allowed in all arrays together")
        self._items_left -= count
        if kind != GGUFValueType.STRING:
            return self._scalars(kind, count)
        self._expect(count, 8, "strings")
        return [self._string() for _ in range(count)]

    def _scalars(self, kind: GGUFValueType, count: int) -> list[object]:
        dtype = np.dtype(_SCALARS[kind])
        self._expect(count, dtype.itemsize, "values")
        self._at += count * dtype.itemsize
        values = np.frombuffer(self._data[self._at - count * dtype.itemsize : self._at], dtype)
        return (values.astype(bool) if kind == GGUFValueType.BOOL else values).tolist()

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, ggml type number and offset in the data."""
        name, num_dimensions = self._name(_MAX_NAME_BYTES), self._number("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"`{name}` has {num_dimensions} dimensions; GGUF allows 1 to {_MAX_DIMENSIONS}")
        shape = tuple(reversed([self._number("<Q") for _ in range(num_dimensions)]))
        if not 0 < prod(shape) < _MAX_WEIGHTS:
            raise ValueError(f"`{name}` has the impossible shape {list(shape)}")
        return name, shape, self._number("<I"), self._number("<Q")

    def _placed(self, described: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> dict[str, GGUFTensor]:
        """Tensors with their places in the file, which must lie in it, be aligned and not overlap."""
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_id, offset in described:
            stored, block_size, block_bytes = self._ggml_type(name, type_id)
            if shape[-1] % block_size:
                raise ValueError(f"`{name}` has rows of {shape[-1]}, which blocks of {block_size} do not divide")
            if offset % alignment:
                raise ValueError(f"`{name}` begins at byte {offset:,} of the data, no multiple of {alignment}")
            if name in tensors:
                raise ValueError(f"the tensor `{name}` is there twice")
            tensors[name] = GGUFTensor(name, shape, stored, start + offset, prod(shape) // block_size * block_bytes)
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        ends = [*(tensor.offset for tensor in ordered[1:]), len(self._data)]
        for tensor, end in zip(ordered, ends, strict=False):
            if tensor.offset + tensor.num_bytes > end:
                raise ValueError(
                    f"`{tensor.name}` takes {tensor.num_bytes:,} bytes from byte {tensor.offset:,} on, but the next "
                    f"tensor or the end of the file is at {end:,}"
                )
        end = max((tensor.offset + tensor.num_bytes for tensor in ordered), default=len(self._data))
        if (left := len(self._data) - end) > alignment:
            magic = GGUF_MAGIC.to_bytes(4, "little")
            joined = self._data.find(magic, end, end + alignment + len(magic)) >= 0
            raise ValueError(
                "parts of a split file were joined with `cat`; llama.cpp's `llama-gguf-split --merge` joins them"
                if joined
                else f"{left:,} bytes follow its last tensor"
            )
        return tensors

    def _ggml_type(self, name: str, type_id: int) -> tuple[str, int, int]:
        layout = next((layout for layout in QUANT_TYPES.values() if layout.ggml_id == type_id), None)
        if layout is not None:
            return layout.name, layout.block_size, layout.block_bytes
        try:
            kind = GGMLQuantizationType(type_id)  # integers, and what models are not stored in
        except ValueError as error:
            raise CheckpointError(
                f"{self._path} stores `{name}` in the type number {type_id}, which stock llama.cpp does not have. "
                "Files with types of a fork (as ik_llama.cpp's IQ4_KS) cannot be read; or the file is corrupt."
            ) from error
        return kind.name, *GGML_QUANT_SIZES[kind]


def _alignment(fields: dict[str, MetadataField]) -> int:
    field = fields.get("general.alignment")
    if field is None:
        return GGUF_DEFAULT_ALIGNMENT
    value = field.value
    if field.value_type != GGUFValueType.UINT32 or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):  # type: ignore[operator]
        raise ValueError(f"`general.alignment` is {value!r}, no power of two up to {_MAX_ALIGNMENT:,}")
    return value  # type: ignore[return-value]
