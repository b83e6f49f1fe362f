"""The bit operations that several quant types share, to take packed blocks apart and to put them together.

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


def half_bytes(d: Tensor) -> Tensor:
    return d.to(torch.float16).unsqueeze(1).view(torch.uint8)


def as_bytes(numbers: Tensor) -> Tensor:
    return numbers.to(torch.uint8)


def word_bytes(numbers: Tensor) -> Tensor:
    """16-bit numbers as little-endian bytes."""
    return numbers.to(torch.int32).to(torch.int16).contiguous().view(torch.uint8)


def joined(parts: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """The numbers of the last dimension, each moved up by its shift, in one."""
    return (parts << torch.tensor(shifts, device=parts.device)).sum(-1)


def nibble_pairs(numbers: Tensor) -> Tensor:
    """Neighbouring pairs as low and high half of a byte."""
    return as_bytes(numbers[:, 0::2] | (numbers[:, 1::2] << 4))


def low_high(q: Tensor, parts: int, half: int) -> Tensor:
    """Within each of `parts` runs, weight j is the low nibble and weight j + half the high one."""
    runs = q.reshape(q.shape[0], parts, 2, half)
    return as_bytes(runs[:, :, 0] | (runs[:, :, 1] << 4)).flatten(1)


def crumb_planes(q: Tensor) -> Tensor:
    """Within each half block of 128, byte j holds the weights j, 32 + j, 64 + j and 96 + j."""
    return as_bytes(joined(q.reshape(-1, 2, 4, 32).transpose(2, 3), (0, 2, 4, 6))).flatten(1)
