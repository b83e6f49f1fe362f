"""Blocks to planes and back: a permutation of bytes, done when weights reach a GPU, undone when they are saved."""

import torch
from torch import Tensor

from dynquant.formats.quant_types import quant_type
from dynquant.kernels.formats import plane_starts, planes


def pack_planes(type_name: str, blocks: Tensor) -> Tensor:
    """Planar copy of packed rows: uint8 [..., row_bytes] -> uint8 of the same shape (see `formats`).

    The planes span the whole tensor, so that a planar tensor cannot be sliced; only its shape is kept.

    Raises:
        PlanError: no quant type has this name.
        ValueError: a plain float type, or `blocks` are not uint8 rows of whole blocks.
    """
    flat = _as_blocks(type_name, blocks)
    parts = [flat[:, f.offset : f.offset + f.num_bytes].reshape(-1) for f in planes(type_name)]
    return torch.cat(parts).reshape(blocks.shape)


def unpack_planes(type_name: str, planar: Tensor) -> Tensor:
    """The blocks that a planar tensor was made of; raises like `pack_planes`."""
    flat = _as_blocks(type_name, planar)
    fields = planes(type_name)
    parts = planar.reshape(-1).split([len(flat) * f.num_bytes for f in fields])
    blocks = torch.empty_like(flat, memory_format=torch.contiguous_format)
    for field, part in zip(fields, parts, strict=True):
        blocks[:, field.offset : field.offset + field.num_bytes] = part.reshape(len(flat), field.num_bytes)
    return blocks.reshape(planar.shape)


def block_rows(type_name: str, planar: Tensor, rows: slice | Tensor) -> Tensor:
    """Some rows of a planar tensor as blocks.

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
        chosen = plane[rows] if isinstance(rows, slice) else plane.index_select(0, rows)
        columns.append(chosen.reshape(-1, per_row, field.num_bytes))
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
