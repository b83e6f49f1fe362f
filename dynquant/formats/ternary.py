"""Decoders of the ternary types TQ1_0 and TQ2_0: w = d * q with q in {-1, 0, 1}, super-blocks of 256.

TQ2_0 spends two bits on a weight. TQ1_0 keeps five base-3 digits in a byte, as a fraction of 256 so that the first
digit is the integer part of 3 * byte / 256, and multiplying the byte by 3 (modulo 256) brings up the next one.

Each docstring is the byte map of one block, with the number of bytes of a field in parentheses.
"""

import torch
from torch import Tensor

from dynquant.formats.bits import crumbs, half


def decode_tq1_0(blocks: Tensor) -> Tensor:
    """| qs 32 bytes x 5 digits | qs 16 bytes x 5 digits | qh 4 bytes x 4 digits | d f16 (2) |"""
    parts = (
        _digit_bytes(blocks[:, :32], num_digits=5),
        _digit_bytes(blocks[:, 32:48], num_digits=5),
        _digit_bytes(blocks[:, 48:52], num_digits=4),
    )
    shifted = torch.cat(parts, dim=1)
    # The leading digit, 3 * byte // 256, without leaving eight bits: it grows by one at 86 and at 171.
    digit = (shifted >= 86).view(torch.int8) + (shifted >= 171).view(torch.int8)
    return half(blocks, 52) * (digit - 1).float()


def decode_tq2_0(blocks: Tensor) -> Tensor:
    """| qs crumbs (64) | d f16 (2) |"""
    q = crumbs(blocks[:, :64].reshape(-1, 2, 32), dim=2).flatten(1)
    return half(blocks, 64) * (q.view(torch.int8) - 1).float()


def _digit_bytes(packed: Tensor, *, num_digits: int) -> Tensor:
    """[n, k] -> [n, num_digits * k]: the bytes with each digit in turn moved to the front."""
    return torch.stack([packed * 3**i for i in range(num_digits)], dim=1).flatten(1)
