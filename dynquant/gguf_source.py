"""GGUF files as a tensor source: single or split, float or quantized.

Parsing is gguf-py's `GGUFReader` (memory-mapped); what is added are refusals that name the file, joined splits, lazy
dequantization with our decoders, and the metadata as plain typed fields that an exporter can write again.
"""

import hashlib
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import torch
from gguf import GGUFReader, GGUFValueType, ReaderTensor

from dynquant.codecs import decode
from dynquant.errors import CheckpointError
from dynquant.quant_types import quant_type_by_id
from dynquant.tensor_source import TensorInfo

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
        for file, reader in zip(self.files, self._readers, strict=True):
            for tensor in reader.tensors:
                self._add(file, tensor)

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
        return packed.reshape(*data.shape[:-1], packed.shape[-1])

    def _add(self, file: Path, tensor: ReaderTensor) -> None:
        if tensor.name in self._tensors:
            raise CheckpointError(f"{file} holds `{tensor.name}` twice, or another file of the split holds it too.")
        if quant_type_by_id(int(tensor.tensor_type)) is None:
            raise CheckpointError(
                f"{file} stores `{tensor.name}` as {tensor.tensor_type.name}, a type that dynquant cannot decode."
            )
        self._tensors[tensor.name] = tensor


def split_files(path: Path) -> list[Path]:
    """All files of a split GGUF given its first file; otherwise the file itself."""
    match = _SPLIT_NAME.match(path.name)
    if not match:
        return [path]
    stem, number, count = match.group(1), int(match.group(2)), int(match.group(3))
    if number != 1:
        raise CheckpointError(f"{path} is part {number} of a split GGUF; give the first part, {stem}-00001-of-….gguf.")
    return [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def open_reader(path: Path) -> GGUFReader:
    """gguf-py's reader with every parse failure turned into one refusal that names the file."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Check the path; of a split GGUF all parts must be present.")
    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError) as error:
        raise CheckpointError(
            f"{path} is not a complete GGUF file ({type(error).__name__}: {error}). It is truncated or corrupt; "
            "fetch or make it again."
        ) from error
    for tensor in reader.tensors:
        block_size, _ = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        if tensor.n_elements != prod(int(n) for n in tensor.shape) or int(tensor.shape[0]) % block_size:
            raise CheckpointError(f"{path} describes `{tensor.name}` with an impossible shape {tensor.shape.tolist()}.")
    return reader
