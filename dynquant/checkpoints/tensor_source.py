"""The protocol of weights that are read lazily, whatever files hold them.

A source lists names and shapes without reading data and loads one tensor, or one expert of a stacked tensor, at a
time: see `safetensors_source` and `gguf_source`.
"""

import copy
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Protocol, Self

import torch

from dynquant.errors import CheckpointError

GGML_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""PyTorch's names of float types -> ggml's."""


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape (last dimension is the row) and stored ggml type name (`BF16`, `Q4_K`) of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def float_type(self) -> str:
        """The float type that loses nothing: its own, or F16 for quantized tensors."""
        return self.dtype if self.dtype in GGML_NAMES.values() else "F16"


def is_finite(tensor: torch.Tensor) -> bool:
    """Return False for a tensor with NaN or infinite values; needs no memory of the tensor's size."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def checked_finite(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return the values of a checkpoint's tensor. Raises CheckpointError: some are NaN or infinite."""
    if not is_finite(values):
        raise CheckpointError(
            f"`{name}` holds NaN or infinite values; a model with such weights cannot be quantized. Fetch the "
            "checkpoint again or repair that tensor."
        )
    return values


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


class ModelSource(TensorSource, Protocol):
    """The tensors of a model, some of which it may do without."""

    def without(self, names: Collection[str]) -> Self:
        """The same source, with its fingerprint, as if these tensors were not there."""


class DictSource:
    """Tensors in memory, for tests and for models that are loaded anyway."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors, self._all_tensors = tensors, tensors

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in self._all_tensors.items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(name, tuple(tensor.shape), GGML_NAMES.get(str(tensor.dtype).removeprefix("torch."), "F32"))

    def load(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        return (tensor if index is None else tensor[index]).to(torch.float32)

    def without(self, names: Collection[str]) -> "DictSource":
        rest = copy.copy(self)
        rest._tensors = {name: tensor for name, tensor in self._tensors.items() if name not in names}
        return rest
