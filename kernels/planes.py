"""Layout of the blocks of each quant type for kernels: the same bytes, one plane per field.

A ggml block interleaves scales, codes and high bits, so that fields of neighbouring blocks lie at odd strides and, in
blocks of 50, 66 or 210 bytes, at odd addresses. In a planar tensor all bytes of one field lie together, block after
block; nothing is added or dropped, so a planar tensor is as large as its blocks, and the way back is exact.

    blocks   [ d0 qs0 | d1 qs1 | d2 qs2 | ... ]       block i at i * block_bytes
    planes   [ qs0 qs1 qs2 ... | d0 d1 d2 ... ]       field f of block i at plane_starts(f) + i * num_bytes(f)

Planes are ordered by the power of two that divides their size, largest first: every field is then aligned to that power
(at most 16 bytes) whatever the number of blocks, provided the tensor's first byte is. Weights are packed when they
reach a GPU and unpacked when they are saved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynquant.formats.quant_types import QUANT_TYPES, QuantType, quant_type


@dataclass(frozen=True)
class Field:
    """One field of a block: `num_bytes` from byte `offset`. The byte maps are in `dynquant.formats`."""

    name: str
    offset: int
    num_bytes: int


_LAYOUTS: dict[str, tuple[tuple[str, int], ...]] = {
    "Q8_0": (("d", 2), ("qs", 32)),
    "Q5_1": (("dm", 4), ("qh", 4), ("qs", 16)),
    "Q5_0": (("d", 2), ("qh", 4), ("qs", 16)),
    "Q4_1": (("dm", 4), ("qs", 16)),
    "Q4_0": (("d", 2), ("qs", 16)),
    "MXFP4": (("e", 1), ("qs", 16)),
    "NVFP4": (("d", 4), ("qs", 32)),
    "Q6_K": (("ql", 128), ("qh", 64), ("scales", 16), ("d", 2)),
    "Q5_K": (("dm", 4), ("scales", 12), ("qh", 32), ("qs", 128)),
    "Q4_K": (("dm", 4), ("scales", 12), ("qs", 128)),
    "Q3_K": (("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2)),
    "Q2_K": (("scales", 16), ("qs", 64), ("dm", 4)),
    "IQ4_NL": (("d", 2), ("qs", 16)),
    "IQ4_XS": (("d", 2), ("scales_h", 2), ("scales_l", 4), ("qs", 128)),
    "IQ3_S": (("d", 2), ("qs", 64), ("qh", 8), ("signs", 32), ("scales", 4)),
    "IQ3_XXS": (("d", 2), ("qs", 64), ("scales", 32)),
    "IQ2_S": (("d", 2), ("qs", 32), ("signs", 32), ("qh", 8), ("scales", 8)),
    "IQ2_XS": (("d", 2), ("qs", 64), ("scales", 8)),
    "IQ2_XXS": (("d", 2), ("qs", 64)),
    "IQ1_M": (("qs", 32), ("qh", 16), ("scales", 8)),
    "IQ1_S": (("d", 2), ("qs", 32), ("qh", 16)),
    "Q2_0": (("d", 2), ("qs", 16)),
    "Q1_0": (("d", 2), ("qs", 16)),
    "TQ2_0": (("qs", 64), ("d", 2)),
    "TQ1_0": (("qs", 48), ("qh", 4), ("d", 2)),
}
"""Fields in the order in which a block stores them."""


def is_packed(stored: QuantType) -> bool:
    """Return True for types that kernels multiply by; F32, F16 and BF16 are left to PyTorch."""
    return stored.name in _LAYOUTS


def _planes_of(name: str) -> tuple[Field, ...]:
    fields, offset = [], 0
    for field_name, num_bytes in _LAYOUTS[name]:
        fields.append(Field(field_name, offset, num_bytes))
        offset += num_bytes
    assert offset == QUANT_TYPES[name].block_bytes, name
    return tuple(sorted(fields, key=lambda field: -min(field.num_bytes & -field.num_bytes, 16)))  # n & -n: lowest bit


PLANES: dict[str, tuple[Field, ...]] = {name: _planes_of(name) for name in _LAYOUTS}
"""Fields of every packed type in the order of their planes."""


def plane_starts(type_name: str, num_blocks: int) -> dict[str, int]:
    """Return field name -> byte at which its plane begins in a planar tensor of `num_blocks` blocks. Raises ValueError:
    kernels do not know the type."""
    starts, start = {}, 0
    for field in planes(type_name):
        starts[field.name] = start
        start += num_blocks * field.num_bytes
    return starts


def planes(type_name: str) -> tuple[Field, ...]:
    """Return the planes of a type.

    Raises:
        PlanError: no quant type has this name.
        ValueError: the type is a plain float.
    """
    stored = quant_type(type_name)
    if not is_packed(stored):
        raise ValueError(f"{stored.name} is not a packed type; give kernels one of {', '.join(PLANES)}")
    return PLANES[stored.name]


def pack_planes(type_name: str, blocks: Tensor) -> Tensor:
    """Return a planar copy of packed rows: uint8 [..., row_bytes] -> uint8 of the same shape.

    The planes span the whole tensor, so that a planar tensor cannot be sliced; only its shape is kept.

    Raises:
        PlanError: no quant type has this name.
        ValueError: a plain float type, or `blocks` are not uint8 rows of whole blocks.
    """
    flat = _as_blocks(type_name, blocks)
    parts = [flat[:, f.offset : f.offset + f.num_bytes].reshape(-1) for f in planes(type_name)]
    return torch.cat(parts).reshape(blocks.shape)


def unpack_planes(type_name: str, planar: Tensor) -> Tensor:
    """Return the blocks that a planar tensor was made of; raises like `pack_planes`."""
    flat = _as_blocks(type_name, planar)
    fields = planes(type_name)
    parts = planar.reshape(-1).split([len(flat) * f.num_bytes for f in fields])
    blocks = torch.empty_like(flat, memory_format=torch.contiguous_format)
    for field, part in zip(fields, parts, strict=True):
        blocks[:, field.offset : field.offset + field.num_bytes] = part.reshape(len(flat), field.num_bytes)
    return blocks.reshape(planar.shape)


def block_rows(type_name: str, planar: Tensor, rows: slice | Tensor) -> Tensor:
    """Return some rows of a planar tensor as blocks.

    Args:
        type_name: the quant type.
        planar: uint8 [..., row_bytes] of `pack_planes`.
        rows: which rows, counted over all leading dimensions; a slice or indices [n].

    Returns:
        A new uint8 tensor [n, row_bytes].

    Raises:
        PlanError, ValueError: like `pack_planes`.
    """
    num_blocks = len(_as_blocks(type_name, planar))
    per_row = planar.shape[-1] // quant_type(type_name).block_bytes
    starts, flat = plane_starts(type_name, num_blocks), planar.reshape(-1)
    columns = []
    for field in sorted(planes(type_name), key=lambda f: f.offset):
        start = starts[field.name]
        plane = flat[start : start + num_blocks * field.num_bytes].reshape(-1, per_row * field.num_bytes)
        part = plane[rows] if isinstance(rows, slice) else plane.index_select(0, rows)
        columns.append(part.reshape(-1, per_row, field.num_bytes))
    return torch.cat(columns, dim=-1).reshape(-1, planar.shape[-1])


def _as_blocks(type_name: str, packed: Tensor) -> Tensor:
    stored = quant_type(type_name)
    planes(type_name)
    if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] % stored.block_bytes:
        raise ValueError(
            f"`blocks` of {stored.name} must be uint8 rows of whole blocks of {stored.block_bytes} bytes, got "
            f"{packed.dtype} {list(packed.shape)}"
        )
    return packed.reshape(-1, stored.block_bytes)
