"""Where weights come from: lazy, read-only views of safetensors checkpoints.

A source lists names and shapes without reading data and loads one tensor, or one expert of a stacked tensor, at a
time. GGUF files are in `gguf_source.py`.
"""

import hashlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from dynquant.errors import CheckpointError
from dynquant.process_usage import count_mapped
from dynquant.safetensors_header import read_header
from dynquant.strict_json import parse_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLED = ("*model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape (last dimension is the row) and stored ggml type name (`BF16`, `Q4_K`) of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return prod(self.shape)


class TensorSource(Protocol):
    """A read-only set of named tensors."""

    @property
    def fingerprint(self) -> str:
        """Hash of names, types, shapes and sampled data; equal for equal checkpoints."""

    def names(self) -> list[str]:
        """All tensor names, in the order in which they are stored or written."""

    def info(self, name: str) -> TensorInfo:
        """Shape and type, without reading data."""

    def load(self, name: str, index: int | None = None) -> torch.Tensor:
        """Float32 values on the CPU; with `index`, only that slice of the first dimension (one expert)."""


class DictSource:
    """Tensors in memory, for tests and for models that are loaded anyway."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self._tensors.items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(name, tuple(tensor.shape), _GGML_NAME.get(str(tensor.dtype).removeprefix("torch."), "F32"))

    def load(self, name: str, index: int | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        return (tensor if index is None else tensor[index]).to(torch.float32)


_GGML_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOAT_DTYPES = {"F32", "F16", "BF16"}


class SafetensorsSource:
    """One `model.safetensors`, or the shards of `model.safetensors.index.json`, in a directory.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, the index names a file outside the directory, or a
            tensor has a dtype that is not F32, F16 or BF16.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._handles: dict[Path, object] = {}
        self._file_of = self._read_index()
        self._info = {name: self._read_info(name) for name in self._file_of}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every tensor's name, dtype, shape and two samples of 64 values."""
        digest = hashlib.sha256()
        for name in sorted(self._info):
            info = self._info[name]
            digest.update(f"{name}{info.dtype}{info.shape}".encode())
            rows = self._slice(name)
            for row in (0, info.shape[0] // 2) if info.shape and info.numel else ():
                sample = rows[row : row + 1].flatten()[:64].to(torch.float32)  # type: ignore[index]
                digest.update(sample.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def names(self) -> list[str]:
        return list(self._file_of)

    def info(self, name: str) -> TensorInfo:
        return self._info[name]

    def load(self, name: str, index: int | None = None) -> torch.Tensor:
        if not self._info[name].shape:
            return self._handle(self._file_of[name]).get_tensor(name).to(torch.float32)
        rows = self._slice(name)
        stored: torch.Tensor = rows[:] if index is None else rows[index]  # type: ignore[index]
        count_mapped(stored.nbytes)
        return stored.to(torch.float32)

    def _slice(self, name: str) -> object:
        return self._handle(self._file_of[name]).get_slice(name)

    def _handle(self, path: Path) -> safe_open:
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except FileNotFoundError as error:
                raise CheckpointError(
                    f"{path} is named by {INDEX_NAME} but does not exist. The download is incomplete; fetch it again."
                ) from error
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a complete safetensors file ({error}). It is truncated or corrupt; fetch it again."
                ) from error
        return self._handles[path]  # type: ignore[return-value]

    def _read_index(self) -> dict[str, Path]:
        single = self.directory / SINGLE_NAME
        if (self.directory / INDEX_NAME).is_file():
            files = read_weight_map(self.directory)
        elif single.is_file():
            return dict.fromkeys(sorted(read_header(single)), single)
        else:
            raise no_weights(self.directory)
        for path in sorted(set(files.values())):
            held = read_header(path).keys()
            missing = next((n for n, f in files.items() if f == path and n not in held), None)
            if missing is not None:
                raise CheckpointError(f"{path} does not hold `{missing}`, which {INDEX_NAME} places there.")
        return files

    def _read_info(self, name: str) -> TensorInfo:
        view = self._slice(name)
        dtype = view.get_dtype()  # type: ignore[attr-defined]
        if dtype not in _FLOAT_DTYPES:
            raise CheckpointError(
                f"{self._file_of[name]} stores `{name}` as {dtype}; only F32, F16 and BF16 checkpoints can be read. "
                "Convert the checkpoint to bfloat16 first."
            )
        return TensorInfo(name, tuple(view.get_shape()), dtype)  # type: ignore[attr-defined]


def read_weight_map(directory: Path) -> dict[str, Path]:
    """Tensor name -> file, of model.safetensors.index.json, in order of names.

    Raises:
        CheckpointError: damaged, or it names a file outside the directory or one that is not safetensors.
    """
    index = directory / INDEX_NAME
    try:
        weight_map = dict(parse_json(index.read_bytes(), unique_names=True)["weight_map"])
        files = {name: Path(weight_map[name]) for name in sorted(weight_map)}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error}). Fetch it again.") from error
    for name, path in files.items():
        if path.name != weight_map[name] or path.name == ".." or "\\" in path.name:
            raise CheckpointError(f"{index} points outside its directory for `{name}`: {weight_map[name]!r}.")
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{index} places {name!r} in {path.name!r}, which is no .safetensors file.")
    return {name: directory / path for name, path in files.items()}


def no_weights(directory: Path) -> CheckpointError:
    """The refusal of a directory without safetensors files. Pickled weights are named, and why they stay unopened."""
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    if pickled:
        return CheckpointError(
            f"{directory} holds its weights as {pickled[0]}, a pickle. Opening one can run any code that its author "
            "put in, so dynquant opens none. Fetch the safetensors files, which most hubs have; or, if you trust the "
            "author, load it in transformers, call `save_pretrained`, and give the directory that it writes."
        )
    return CheckpointError(
        f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; there are no weights to read. "
        "Give the directory of a Hugging Face checkpoint in safetensors format, or a .gguf file."
    )
