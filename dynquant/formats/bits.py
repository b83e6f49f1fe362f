"""Taking apart packed blocks: the bit operations that several quant types share.

A block is one row of a uint8 tensor [n, block_bytes]; all functions are vectorised over n and run on any device.
What each type does with its fields lives in the family modules.
"""

import torch
from torch import Tensor


def field(blocks: Tensor, start: int, num_bytes: int, dtype: torch.dtype) -> Tensor:
    """Bytes [start, start + num_bytes) of every block, read as little-endian `dtype`.

    Always copies: a block may begin at any address, and a wider view of it needs an aligned one.
    """
    return blocks[:, start : start + num_bytes].clone(memory_format=torch.contiguous_format).view(dtype)


def half(blocks: Tensor, start: int) -> Tensor:
    """The fp16 number at byte `start` of every block as float32 [n, 1]."""
    return field(blocks, start, 2, torch.float16).float()


def nibbles(packed: Tensor, dim: int) -> Tensor:
    """Low and high four bits of every byte, side by side in a new dimension `dim` of two."""
    return torch.stack((packed & 15, packed >> 4), dim=dim)


def crumbs(packed: Tensor, dim: int) -> Tensor:
    """The four two-bit fields of every byte, lowest first, in a new dimension `dim` of four."""
    return torch.stack((packed & 3, (packed >> 2) & 3, (packed >> 4) & 3, packed >> 6), dim=dim)


def bit_planes(packed: Tensor, dim: int) -> Tensor:
    """The eight bits of every byte, lowest first, in a new dimension `dim` of eight."""
    return torch.stack([(packed >> i) & 1 for i in range(8)], dim=dim)


def shifted(words: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """`(words >> s) & mask` for every shift, in a new last dimension.

    The mask also removes the sign bits that an arithmetic shift of int16 and int32 words brings in.
    """
    return torch.stack([(words >> s) & mask for s in shifts], dim=-1)
