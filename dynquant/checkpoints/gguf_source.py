"""GGUF files as a tensor source: single or split, float or quantized.

Headers are read by `gguf_reader`; data is memory-mapped. What is added are joined splits, lazy dequantization with our
decoders, and the metadata as plain typed fields that an exporter can write again.
"""

import copy
import hashlib
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from dynquant.checkpoints.gguf_reader import GGUFHeader, GGUFTensor, MetadataField, read_gguf_header
from dynquant.checkpoints.tensor_source import TensorInfo
from dynquant.errors import CheckpointError
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.resources import count_mapped
from dynquant.storage.file_kinds import GGUF, kind_of

_SPLIT_NAME = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\.gguf)$", re.IGNORECASE)


class GGUFSource:
    """The tensors and metadata of a GGUF file, or of all files of a split when given the first.

    Raises:
        CheckpointError: missing, truncated or corrupt file, missing split, or a tensor type outside the registry.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._headers = read_split(path)
        self.files = [header.path for header in self._headers]
        self._data = [np.memmap(file, np.uint8, mode="r") for file in self.files]
        self._tensors: dict[str, GGUFTensor] = {}
        self._file_of: dict[str, int] = {}
        for number, header in enumerate(self._headers):
            for tensor in header.tensors.values():
                self._add(number, tensor)
        self._all_tensors = self._tensors

    @property
    def metadata(self) -> list[MetadataField]:
        """Fields of the first file, without the split bookkeeping."""
        return [field for key, field in self._headers[0].fields.items() if not key.startswith("split.")]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, type, shape and two samples of 256 bytes."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._all_tensors.items()):
            digest.update(f"{name}{tensor.type}{list(reversed(tensor.shape))}".encode())
            raw = self._bytes(tensor)
            for start in (0, raw.size // 2):
                digest.update(raw[start : start + 256].tobytes())
        return digest.hexdigest()

    def names(self) -> list[str]:
        return list(self._tensors)

    def location(self, name: str) -> tuple[int, int]:
        """Index of the file that holds a tensor, and the byte at which its data begins there."""
        return self._file_of[name], self._tensors[name].offset

    def text_location(self, key: str) -> tuple[int, int] | None:
        """First byte and length of a string value in the first file's metadata; None when there is no such string."""
        return self._headers[0].text_spans.get(key)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(name, tensor.shape, tensor.type)

    def load(self, name: str, index: int | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        shape = tensor.shape if index is None else tensor.shape[1:]
        return decode(tensor.type, self.load_packed(name, index), shape)

    def load_packed(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        """The stored bytes, uint8 [..., row_bytes]; with `index`, only that slice of the first dimension."""
        tensor = self._tensors[name]
        packed = self._bytes(tensor).reshape(*tensor.shape[:-1], QUANT_TYPES[tensor.type].row_bytes(tensor.shape[-1]))
        chosen = torch.from_numpy((packed if index is None else packed[index]).copy())
        count_mapped(chosen.numel())
        return chosen

    def without(self, names: Collection[str]) -> "GGUFSource":
        rest = copy.copy(self)
        rest._tensors = {name: tensor for name, tensor in self._tensors.items() if name not in names}
        return rest

    def _bytes(self, tensor: GGUFTensor) -> np.ndarray:
        return self._data[self._file_of[tensor.name]][tensor.offset : tensor.offset + tensor.num_bytes]

    def _add(self, number: int, tensor: GGUFTensor) -> None:
        file, name = self.files[number], tensor.name
        if tensor.type not in QUANT_TYPES:
            raise CheckpointError(f"{file} stores `{name}` as {tensor.type}, a type that dynquant cannot decode.")
        self._tensors[name] = tensor
        self._file_of[name] = number


def is_gguf(path: Path) -> bool:
    """Return whether a path is of a GGUF file: by what it holds, or by its name where that tells nothing."""
    if (kind := kind_of(path)) != "":
        return kind == GGUF
    return path.suffix.lower() == ".gguf" and not (path / "config.json").is_file()


def read_split(path: Path) -> list[GGUFHeader]:
    """Read the headers of a GGUF file, or of all files of a split when given the first.

    Raises:
        CheckpointError: a missing, truncated or corrupt file, or files that are not the parts of one split.
    """
    headers = [read_gguf_header(file) for file in split_files(path)]
    names: set[str] = set()
    for number, header in enumerate(headers):
        says = {key: header.fields[f"split.{key}"].value for key in ("no", "count") if f"split.{key}" in header.fields}
        if says.get("count", len(headers)) not in (0, len(headers)) or says.get("no", number) != number:
            raise CheckpointError(
                f"{header.path} says that it is one of {says.get('count')!r} files, number {says.get('no')!r} from 0, "
                f"but is taken for number {number} of {len(headers)}. Give the parts of a split GGUF their names back: "
                "NAME-00001-of-0000N.gguf and so on."
            )
        if twice := names & header.tensors.keys():
            raise CheckpointError(f"{header.path} holds `{min(twice)}`, and another file of the split holds it too.")
        names |= header.tensors.keys()
    announced = headers[0].fields.get("split.tensors.count")
    if announced is not None and announced.value != len(names):
        raise CheckpointError(
            f"{path} announces {announced.value!r} tensors in all parts, which hold {len(names)}. They are of "
            "different splits; fetch them again."
        )
    return headers


def split_files(path: Path) -> list[Path]:
    """All files of a split GGUF given its first file; otherwise the file itself. Raises CheckpointError for others."""
    match = _SPLIT_NAME.match(path.name)
    if not match:
        return [path]
    stem, number, count = match[1], int(match[2]), int(match[3])
    if not 1 <= number <= count:
        raise CheckpointError(f"{path} is named as part {number} of {count}, which cannot be; check the file name.")
    files = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}{match[4]}") for i in range(1, count + 1)]
    if number != 1:
        raise CheckpointError(f"{path} is part {number} of a split GGUF; give the first part, {files[0].name}.")
    return files


def short_context(source: GGUFSource) -> int:
    """Return the largest context in which llama.cpp turns positions by the factors for short texts, where a model has
    others for long ones (longrope); else 0. What decides is the context's size, not the length of a text in it."""
    if "rope_factors_long.weight" not in source.names():
        return 0
    values = (field.value for field in source.metadata if field.key.endswith(".rope.scaling.original_context_length"))
    return int(next(values, 0))
