"""GGUF files as a tensor source: single or split, float or quantized.

Parsing is gguf-py's `GGUFReader` (memory-mapped), after a walk over the header that holds every count against the
bytes left. What is added are refusals that name the file, joined splits, lazy dequantization with our decoders, and the
metadata as plain typed fields that an exporter can write again.
"""

import hashlib
import re
import struct
from dataclasses import dataclass
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path

import gguf
import torch
from gguf import GGUF_MAGIC, GGUFReader, GGUFValueType, ReaderTensor

from dynquant.codecs import decode
from dynquant.errors import CheckpointError
from dynquant.process_usage import count_mapped
from dynquant.quant_types import quant_type_by_id
from dynquant.tensor_source import TensorInfo

_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_WEIGHTS = 1 << 63
_SCALAR_BYTES = {
    GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.BOOL: 1, GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2, GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip
_GGML_TYPE_IDS = {int(kind) for kind in gguf.GGMLQuantizationType}
_SMALLEST_KEY = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8
_SPLIT_NAME = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class MetadataField:
    """One GGUF key/value pair. `item_type` is the element type of an array."""

    key: str
    value: object
    value_type: GGUFValueType
    item_type: GGUFValueType | None = None


class GGUFSource:
    """The tensors and metadata of a GGUF file, or of all files of a split when given the first.

    Raises:
        CheckpointError: missing, truncated or corrupt file, missing split, or a tensor type outside the registry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = split_files(path)
        self._readers = [open_reader(file) for file in self.files]
        self._tensors: dict[str, ReaderTensor] = {}
        self._file_of: dict[str, int] = {}
        for file, reader in zip(self.files, self._readers, strict=True):
            for tensor in reader.tensors:
                self._add(file, tensor)
        self._check_split_count()

    @property
    def metadata(self) -> list[MetadataField]:
        """Fields of the first file, without the split bookkeeping and gguf-py's header pseudo-fields."""
        fields = []
        for field in self._readers[0].fields.values():
            if field.name.startswith(("GGUF.", "split.")):
                continue
            item_type = None
            if field.types[0] == GGUFValueType.ARRAY:
                # An empty array keeps no element type in gguf-py's reader; llama.cpp writes strings there.
                item_type = field.types[-1] if len(field.types) > 1 else GGUFValueType.STRING
            fields.append(MetadataField(field.name, field.contents(), field.types[0], item_type))
        return fields

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, type, shape and two samples of 256 bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name}{tensor.tensor_type.name}{tensor.shape.tolist()}".encode())
            raw = tensor.data.reshape(-1).view("uint8")
            for start in (0, raw.size // 2):
                digest.update(raw[start : start + 256].tobytes())
        return digest.hexdigest()

    def names(self) -> list[str]:
        return list(self._tensors)

    def location(self, name: str) -> tuple[int, int]:
        """Index of the file that holds a tensor, and the byte at which its data begins there."""
        return self._file_of[name], int(self._tensors[name].data_offset)

    def text_location(self, key: str) -> tuple[int, int] | None:
        """First byte and length of a string value in the first file's metadata; None when there is no such string."""
        field = self._readers[0].fields.get(key)
        if field is None or field.types[0] != GGUFValueType.STRING:
            return None
        value = field.parts[-1]
        return int(field.offset) + sum(part.nbytes for part in field.parts[:-1]), value.nbytes

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(name, tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type.name)

    def load(self, name: str, index: int | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        shape = self.info(name).shape
        if index is not None:
            shape = shape[1:]
        return decode(tensor.tensor_type.name, self.load_packed(name, index), shape)

    def load_packed(self, name: str, index: int | None = None) -> torch.Tensor:
        """The stored bytes, uint8 [..., row_bytes]; with `index`, only that slice of the first dimension."""
        tensor = self._tensors[name]
        data = tensor.data if index is None else tensor.data[index]
        rows = data.reshape(-1, data.shape[-1]) if data.ndim else data.reshape(1, 1)
        packed = torch.from_numpy(rows.copy().view("uint8"))
        count_mapped(packed.numel())
        return packed.reshape(*data.shape[:-1], packed.shape[-1])

    def _check_split_count(self) -> None:
        field = self._readers[0].fields.get("split.count")
        count = field.contents() if field is not None else len(self.files)
        if count not in (0, len(self.files)):
            raise CheckpointError(
                f"{self.path} says that it is one of {count} files, but its name stands for {len(self.files)}. Give "
                "the parts of a split GGUF their names back: NAME-00001-of-0000N.gguf and so on."
            )

    def _add(self, file: Path, tensor: ReaderTensor) -> None:
        if tensor.name in self._tensors:
            raise CheckpointError(f"{file} holds `{tensor.name}` twice, or another file of the split holds it too.")
        if quant_type_by_id(int(tensor.tensor_type)) is None:
            raise CheckpointError(
                f"{file} stores `{tensor.name}` as {tensor.tensor_type.name}, a type that dynquant cannot decode."
            )
        self._tensors[tensor.name] = tensor
        self._file_of[tensor.name] = self.files.index(file)


def split_files(path: Path) -> list[Path]:
    """All files of a split GGUF given its first file; otherwise the file itself."""
    match = _SPLIT_NAME.match(path.name)
    if not match:
        return [path]
    stem, number, count = match.group(1), int(match.group(2)), int(match.group(3))
    if not 1 <= number <= count:
        raise CheckpointError(f"{path} is named as part {number} of {count}, which cannot be; check the file name.")
    if number != 1:
        raise CheckpointError(f"{path} is part {number} of a split GGUF; give the first part, {stem}-00001-of-….gguf.")
    return [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def open_reader(path: Path) -> GGUFReader:
    """gguf-py's reader with every parse failure turned into one refusal that names the file."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Check the path; of a split GGUF all parts must be present.")
    try:
        _check_header(path)
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete GGUF file ({type(error).__name__}: {error}). It is truncated or corrupt; "
            "fetch or make it again."
        ) from error
    for tensor in reader.tensors:
        block_size, _ = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        if tensor.n_elements != prod(int(n) for n in tensor.shape) or int(tensor.shape[0]) % block_size:
            raise CheckpointError(f"{path} describes `{tensor.name}` with an impossible shape {tensor.shape.tolist()}.")
    return reader


def _check_header(path: Path) -> None:
    """Walk the header before gguf-py parses it. Raises ValueError for what cannot be true of the file, and
    CheckpointError for a tensor type that ggml does not have.

    gguf-py believes every count and length: one flipped bit and it loops over an array of 2^60 items that is not there.
    """
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        header = _Header(data)
        if header.number("<I") != GGUF_MAGIC:
            raise ValueError("the file does not begin with `GGUF`")
        version = header.number("<I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version:#x} is neither 2 nor 3 in little-endian order")
        num_tensors, num_keys = header.number("<Q"), header.number("<Q")
        header.expect(num_keys, _SMALLEST_KEY, "keys")
        for _ in range(num_keys):
            header.string()
            header.value(header.number("<I"))
        header.expect(num_tensors, _SMALLEST_TENSOR, "tensors")
        for _ in range(num_tensors):
            name, type_id = header.tensor()
            if type_id not in _GGML_TYPE_IDS:
                raise CheckpointError(
                    f"{path} stores `{name}` in the type number {type_id}, which stock llama.cpp does not have. Files "
                    "with types of a fork (as ik_llama.cpp's IQ4_KS) cannot be read; or the file is corrupt."
                )


class _Header:
    """A position in the file that only moves over bytes that exist."""

    def __init__(self, data: mmap) -> None:
        self._data = data
        self._at = 0

    def expect(self, count: int, item_bytes: int, what: str) -> None:
        """Refuse a count of items that the rest of the file cannot hold."""
        left = len(self._data) - self._at
        if count * item_bytes > left:
            raise ValueError(f"{count:,} {what} are announced at byte {self._at:,}, but only {left:,} bytes follow")

    def number(self, layout: str) -> int:
        size = struct.calcsize(layout)
        self.expect(size, 1, "bytes")
        self._at += size
        return struct.unpack_from(layout, self._data, self._at - size)[0]

    def string(self) -> str:
        length = self.number("<Q")
        self.expect(length, 1, "characters")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def value(self, type_id: int) -> None:
        kind = GGUFValueType(type_id)
        if kind == GGUFValueType.STRING:
            self.string()
        elif kind == GGUFValueType.ARRAY:
            self._array(GGUFValueType(self.number("<I")), self.number("<Q"))
        else:
            self._skip(1, _SCALAR_BYTES[kind])

    def tensor(self) -> tuple[str, int]:
        """Name and ggml type number."""
        name, num_dimensions = self.string(), self.number("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"`{name}` has {num_dimensions} dimensions; GGUF allows 1 to {_MAX_DIMENSIONS}")
        shape = [self.number("<Q") for _ in range(num_dimensions)]
        if not 0 < prod(shape) < _MAX_WEIGHTS:
            raise ValueError(f"`{name}` has the impossible shape {shape}")
        type_id = self.number("<I")
        offset = self.number("<Q")
        if offset > len(self._data):
            raise ValueError(f"`{name}` lies at byte {offset:,} of the data, beyond the end of the file")
        return name, type_id

    def _array(self, kind: GGUFValueType, count: int) -> None:
        if kind == GGUFValueType.ARRAY:
            raise ValueError(f"an array of arrays at byte {self._at:,}, which no model file has")
        if kind == GGUFValueType.STRING:
            self.expect(count, 8, "strings")
            for _ in range(count):
                self.string()
        else:
            self._skip(count, _SCALAR_BYTES[kind])

    def _skip(self, count: int, item_bytes: int) -> None:
        self.expect(count, item_bytes, "values")
        self._at += count * item_bytes
