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

from dynquant.checkpoints.fp8_values import FileSpan, StoredValues, spans_of
from dynquant.errors import CheckpointError
from dynquant.formats.storage_format import DTYPE_BYTES
from dynquant.storage.strict_json import parse_json

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

    def load(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        """Float32 values on the CPU; with `index`, only one expert of a stack, or some rows of a matrix."""


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

    def load(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        return (tensor if index is None else tensor[index]).to(torch.float32)


_GGML_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOAT_DTYPES = {"F32", "F16", "BF16"}
_FP8 = "F8_E4M3"
_SCALE_SUFFIX = "_scale_inv"
_SAMPLED = 64


class SafetensorsSource:
    """One `model.safetensors`, or the shards of `model.safetensors.index.json`, in a directory.

    FP8 matrices with block scales appear as one tensor of the float type that config.json states; their scales are not
    listed.

    Raises:
        CheckpointError: a file is missing, truncated or corrupt, the index names a file outside the directory, a tensor
            has a dtype that is not F32, F16, BF16 or FP8 with scales, or scales do not fit their matrix.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._spans = self._read_spans()
        self._scale_of = {name: f"{name}{_SCALE_SUFFIX}" for name, span in self._spans.items() if span.dtype == _FP8}
        self._block, self._fp8_float = _fp8_layout(directory) if self._scale_of else ((1, 1), "BF16")
        hidden = set(self._scale_of.values())
        self._info = {name: self._read_info(name) for name in self._spans if name not in hidden}

    @property
    def has_fp8(self) -> bool:
        """Whether a matrix is stored as FP8."""
        return bool(self._scale_of)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every stored tensor's name, dtype, shape and two samples of 64 values."""
        digest = hashlib.sha256()
        for name, span in sorted(self._spans.items()):
            digest.update(f"{name}{span.dtype}{span.shape}".encode())
            for row in (0, span.shape[0] // 2) if span.shape and prod(span.shape) else ():
                sample = span.read(row, count=min(_SAMPLED, span.row_values)).to(torch.float32)
                digest.update(sample.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def names(self) -> list[str]:
        return list(self._info)

    def info(self, name: str) -> TensorInfo:
        return self._info[name]

    def load(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        if not isinstance(index, slice) or name not in self._scale_of or len(self._info[name].shape) > 2:
            return self.stored(name, index).to(torch.float32)
        first = index.start // self._block[0] * self._block[0]  # the rows of a block share scales
        return self.stored(name, slice(first, index.stop)).to(torch.float32)[index.start - first :]

    def stored(self, name: str, index: int | slice | None = None) -> StoredValues:
        """The tensor, or a slice or range of its first dimension, in the types of the file.

        A range of the rows of an FP8 matrix starts with a block.
        """
        scale = self._scale_of.get(name)
        try:
            data = self._spans[name].read(index)
            if scale is None:
                return StoredValues(data)
            if isinstance(index, int) and data.dim() < 2:
                raise ValueError(f"`{name}` is one FP8 matrix; its rows share scales and are not read alone")
            if isinstance(index, slice) and data.dim() == 2:
                index = slice(index.start // self._block[0], -(-index.stop // self._block[0]))
            return StoredValues(data, self._spans[scale].read(index), self._block)
        except OSError as error:
            raise CheckpointError(
                f"`{name}` cannot be read from {self._spans[name].path} ({error}). Fetch the file again."
            ) from error

    def stored_bytes(self, name: str) -> int:
        """What `stored` takes in memory."""
        parts = [self._spans[part] for part in (name, self._scale_of.get(name)) if part is not None]
        return sum(prod(span.shape) * DTYPE_BYTES[span.dtype] for span in parts)

    def _read_spans(self) -> dict[str, FileSpan]:
        single = self.directory / SINGLE_NAME
        if not (self.directory / INDEX_NAME).is_file():
            if not single.is_file():
                raise no_weights(self.directory)
            return dict(sorted(spans_of(single).items()))
        files = read_weight_map(self.directory)
        held = {path: spans_of(path) for path in sorted(set(files.values()))}
        for name, path in files.items():
            if name not in held[path]:
                raise CheckpointError(f"{path} does not hold `{name}`, which {INDEX_NAME} places there.")
        return {name: held[path][name] for name, path in files.items()}

    def _read_info(self, name: str) -> TensorInfo:
        span = self._spans[name]
        if span.dtype == _FP8:
            self._check_scales(name)
            return TensorInfo(name, span.shape, self._fp8_float)
        if span.dtype not in _FLOAT_DTYPES:
            raise CheckpointError(
                f"{span.path} stores `{name}` as {span.dtype}; only F32, F16 and BF16 checkpoints, and FP8 (F8_E4M3) "
                "with block scales, can be read. Convert the checkpoint to bfloat16 first."
            )
        return TensorInfo(name, span.shape, span.dtype)

    def _check_scales(self, name: str) -> None:
        span, scale = self._spans[name], self._spans.get(self._scale_of[name])
        if scale is None:
            raise CheckpointError(
                f"{span.path} stores `{name}` as {_FP8}, but the checkpoint has no `{self._scale_of[name]}`, so its "
                "values are unknown. The download is incomplete, or the scales are of a kind that dynquant does not "
                "read; convert the checkpoint to bfloat16."
            )
        blocks = tuple(-(-size // block) for size, block in zip(span.shape[-2:], self._block, strict=False))
        expected = (*span.shape[:-2], *blocks)
        if len(span.shape) < 2 or scale.shape != expected or scale.dtype != "F32":
            raise CheckpointError(
                f"{scale.path} stores `{self._scale_of[name]}` as {scale.dtype} {list(scale.shape)}, but `{name}` "
                f"{list(span.shape)} in blocks of {self._block[0]} x {self._block[1]} needs F32 {list(expected)}. "
                "Check `weight_block_size` in config.json, or convert the checkpoint to bfloat16."
            )


def _fp8_layout(directory: Path) -> tuple[tuple[int, int], str]:
    """Rows and columns of a block, and the float type that the model computes in, from config.json."""
    path = directory / "config.json"
    try:
        config = parse_json(path.read_bytes()) if path.is_file() else {}
        rows, columns = (config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
        if not (isinstance(rows, int) and isinstance(columns, int) and min(rows, columns) > 0):
            raise ValueError(f"`weight_block_size` is {[rows, columns]}")
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{path} does not describe FP8 weights ({error}); `weight_block_size` is to be two positive numbers, as "
            "[128, 128]. Fetch the file again."
        ) from error
    return (rows, columns), _GGML_NAME.get(dtype, "BF16")


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
