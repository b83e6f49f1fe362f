"""Decoders of the blocks of 32 with one fp16 scale: Q8_0, Q5_1, Q5_0, Q4_1, Q4_0.

w = d * q + m, with q unsigned where the minimum `m` is stored, and centred (q - 8, q - 16) where it is not.
In the four-bit part weight j shares a byte with weight j + 16.

Each docstring is the byte map of one block, with the number of bytes of a field in parentheses.
"""

import torch
from torch import Tensor

from dynquant.formats import tables
from dynquant.formats.bits import half, nibbles


def decode_q8_0(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs i8 (32) |"""
    return blocks[:, 2:].view(torch.int8).float() * half(blocks, 0)


def decode_q4_0(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs nibbles (16) |"""
    q = _low_then_high(blocks[:, 2:]).view(torch.int8) - 8
    return half(blocks, 0) * q.float()


def decode_q4_1(blocks: Tensor) -> Tensor:
    """| d f16 (2) | m f16 (2) | qs nibbles (16) |"""
    q = _low_then_high(blocks[:, 4:]).float()
    return (half(blocks, 0) * q).add_(half(blocks, 2))


def decode_q5_0(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qh bits (4) | qs nibbles (16) |"""
    q = _five_bits(blocks[:, 2:6], blocks[:, 6:]).view(torch.int8) - 16
    return half(blocks, 0) * q.float()


def decode_q5_1(blocks: Tensor) -> Tensor:
    """| d f16 (2) | m f16 (2) | qh bits (4) | qs nibbles (16) |"""
    q = _five_bits(blocks[:, 4:8], blocks[:, 8:]).float()
    return (half(blocks, 0) * q).add_(half(blocks, 2))


def _low_then_high(qs: Tensor) -> Tensor:
    """[n, 16] bytes -> [n, 32]: all low nibbles, then all high ones."""
    return nibbles(qs, dim=1).flatten(1)


def _five_bits(qh: Tensor, qs: Tensor) -> Tensor:
    """The fifth bits are in the order of the weights: weight 8k + i is bit i of byte k."""
    high = tables.lookup(tables.bits(qh.device), qh).view(torch.uint8)
    return _low_then_high(qs) | (high << 4)
