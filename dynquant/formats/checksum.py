"""Checksums of weights that are read in parts: a change of one weight changes that of its tensor."""

import torch

_WEIGHTS_AT_ONCE = 1 << 16
"""Their products stay in a cache: twice as fast as larger pieces."""


def checksum(matrices: torch.Tensor, first_row: int = 0) -> int:
    """Return the sum of the float32 bits of weights [..., C], each times odd numbers of its row and column, mod 2^64.

    Parts of a tensor add up to the checksum of the whole, whatever the parts are; `first_row` is where this one begins,
    counted over all rows of the tensor. Odd factors are invertible, so no change of a single weight cancels. A scalar
    is one weight.
    """
    matrices = torch.atleast_1d(matrices.detach().to("cpu", torch.float32))
    rows = matrices.reshape(-1, matrices.shape[-1]).contiguous().view(torch.int32)
    of_columns, total = _odd_numbers(0, rows.shape[1]), 0
    step = max(1, _WEIGHTS_AT_ONCE // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        part = rows[start : start + step].to(torch.int64)
        of_rows = _odd_numbers(first_row + start, len(part))
        total += int((part.mul_(of_columns).sum(1) * of_rows).sum())  # int64 arithmetic wraps, as it should
    return total % (1 << 64)


def _odd_numbers(start: int, count: int) -> torch.Tensor:
    """Return scattered odd numbers, int64: the mixing steps of SplitMix64 (Steele and others 2014) on a counter."""
    numbers = torch.arange(start + 1, start + 1 + count, dtype=torch.int64) * -0x61C8864680B583EB
    numbers = (numbers ^ (numbers >> 30)) * -0x40A7B892E31B1A47
    return (numbers ^ (numbers >> 27)) | 1
