"""Conversions of checkpoint tensors into GGUF tensors, and a tensor source that follows those conversions lazily.

Nothing is read until a tensor is asked for, and one expert of a stacked tensor is read without its neighbours, whether
the checkpoint stores experts one by one or fused.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import prod

import torch

from dynquant.checkpoints.published.packed_parts import MXFP4_BLOCK, ggml_blocks
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.checkpoints.tensor_source import TensorInfo, TensorSource, checked_finite
from dynquant.families.common.selection import Selection
from dynquant.families.common.strided_maps import StridedMap, joined, whole
from dynquant.families.common.traced_tensor import TracedTensor

Transform = Callable[[torch.Tensor], torch.Tensor]
_COMPARED_VALUES = 1 << 24


def unchanged(values: torch.Tensor) -> torch.Tensor:
    return values


@dataclass(frozen=True)
class Conversion:
    """One GGUF tensor. With several `parts`, each part is one slice of the first dimension (one expert)."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    transform: Transform = unchanged
    values: torch.Tensor | None = None  # the tensor itself, where it is computed from the configuration

    def load(self, source: TensorSource, index: int | slice | None) -> torch.Tensor:
        """Float32 values of `shape`; with `index`, of one expert of a stack, or of some rows of a matrix."""
        if self.values is not None:
            return self.values if index is None else self.values[index]
        if len(self.parts) > 1:
            if index is not None:
                return self.transform(load_finite(source, self.parts[index]))
            return torch.stack([self.transform(load_finite(source, part)) for part in self.parts])
        if self.transform is unchanged:
            return load_finite(source, self.parts[0], index).contiguous()
        if isinstance(self.transform, Selection) and index is not None:
            rows = index if isinstance(index, slice) else slice(index, index + 1)
            stored_rows, transform = self.transform.of_rows(rows)
            values = transform(load_finite(source, self.parts[0], stored_rows)).contiguous()
            return values if isinstance(index, slice) else values[0]
        whole = self.transform(load_finite(source, self.parts[0]))
        return (whole if index is None else whole[index]).contiguous()


def load_finite(source: TensorSource, name: str, index: int | slice | None = None) -> torch.Tensor:
    """A checkpoint tensor as float32. Raises CheckpointError when it holds NaN or infinite values."""
    return checked_finite(name, source.load(name, index))


def differ(source: TensorSource, name: str, other: str) -> bool:
    """Return whether two tensors of a checkpoint differ in shape or in any value, read some rows at a time."""
    shape = source.info(name).shape
    if shape != source.info(other).shape:
        return True
    step = max(1, _COMPARED_VALUES // prod(shape[1:]))
    rows = (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))
    return not all(torch.equal(source.load(name, part), source.load(other, part)) for part in rows)


class ConvertedSource:
    """The GGUF tensors of a Hugging Face checkpoint, as a TensorSource."""

    def __init__(self, source: TensorSource, conversions: list[Conversion]) -> None:
        self._source = source
        self._conversions = {conversion.name: conversion for conversion in conversions}
        self._keeps_blocks: dict[str, bool] = {}

    @property
    def checkpoint(self) -> TensorSource:
        """Source from which the parts of conversions are read."""
        return self._source

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def names(self) -> list[str]:
        return list(self._conversions)

    def info(self, name: str) -> TensorInfo:
        conversion = self._conversions[name]
        return TensorInfo(name, conversion.shape, conversion.dtype)

    def load(self, name: str, index: int | slice | None = None) -> torch.Tensor:
        return self._conversions[name].load(self._source, index)

    def without(self, names: Collection[str]) -> "ConvertedSource":
        return ConvertedSource(self._source, [c for name, c in self._conversions.items() if name not in names])

    def checkpoint_names(self, name: str) -> tuple[str, ...]:
        """The checkpoint tensors that a GGUF tensor is made of: every expert of a stack, none if it is computed."""
        return self._conversions[name].parts

    def holds_mxfp4(self, name: str) -> bool:
        """Return whether a GGUF tensor's MXFP4 blocks are those of the checkpoint, moved as a whole."""
        if name not in self._keeps_blocks:
            conversion, stored = self._conversions[name], self._source
            is_moved = conversion.transform is unchanged or isinstance(conversion.transform, Selection)
            can_be = is_moved and len(conversion.parts) == 1 and isinstance(stored, SafetensorsSource)
            self._keeps_blocks[name] = can_be and stored.is_mxfp4(conversion.parts[0]) and self._moves_blocks(name)
        return self._keeps_blocks[name]

    def load_packed(self, name: str, index: int | None = None) -> torch.Tensor:
        """Return ggml's blocks of a tensor for which `holds_mxfp4` is true, uint8 [..., row_bytes]; with `index`, those
        of one expert."""
        if index is None:
            return torch.stack([self.load_packed(name, expert) for expert in range(self.info(name).shape[0])])
        assert isinstance(self._source, SafetensorsSource)
        codes, powers = self._source.mxfp4_codes(self._conversions[name].parts[0], index)
        powers = powers.repeat_interleave(MXFP4_BLOCK, -1)
        codes, powers = (self._moved(name, part.transpose(-1, -2)) for part in (codes, powers))
        return ggml_blocks(codes, powers[..., ::MXFP4_BLOCK])

    def _moves_blocks(self, name: str) -> bool:
        _, columns, rows = self._source.info(self._conversions[name].parts[0]).shape
        blocks = torch.arange(rows * columns // MXFP4_BLOCK, dtype=torch.int32)
        moved = self._moved(name, blocks.repeat_interleave(MXFP4_BLOCK).view(rows, columns).T)
        if moved.dim() != 2 or moved.shape[1] % MXFP4_BLOCK:
            return False
        of_blocks = moved.unflatten(1, (-1, MXFP4_BLOCK))
        return bool((of_blocks == of_blocks[..., :1]).all())

    def _moved(self, name: str, expert: torch.Tensor) -> torch.Tensor:
        """Return what the conversion makes of one expert of a stored stack."""
        transform = self._conversions[name].transform
        return transform.of_rows(slice(1))[1](expert[None])[0] if isinstance(transform, Selection) else expert

    def entries(self, name: str, stored_shape: tuple[int, ...]) -> StridedMap:
        """Return a GGUF tensor as entries of its parts, which have `stored_shape`.

        Raises:
            NotImplementedError: its values are computed.
        """
        conversion, transform = self._conversions[name], self._conversions[name].transform
        if isinstance(transform, Selection):
            each = transform.entries
        else:
            each = transform(TracedTensor(whole("", stored_shape))).map  # type: ignore[attr-defined]
        each = each.viewed((1, *each.shape))
        return joined([each.renamed(part) for part in conversion.parts], 0).viewed(conversion.shape)

    def transform(self, name: str) -> Transform:
        """Return the transform that makes a GGUF tensor of its checkpoint tensor, or of each of them."""
        return self._conversions[name].transform
