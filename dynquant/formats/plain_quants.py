"""Plain numbers: blocks with one fp16 scale (Q8_0 to Q1_0), floats, and the four-bit floats MXFP4 and NVFP4.

Q types: w = d * q + m, with q unsigned where the minimum `m` is stored, and centred (q - 8, q - 16) where it is not.
In the four-bit part of blocks of 32 weight j shares a byte with weight j + 16. Q2_0 (blocks of 64, q - 1 from -1 to 2)
and Q1_0 (blocks of 128, -1 or 1) have neighbours in a byte, the first in its lowest bits.

Four-bit floats are E2M1 numbers stored doubled (0, 1, 2, 3, 4, 6, 8, 12 and their negatives); the block scales are
halved to make up for it. A tensor-wide scale, which NVFP4 checkpoints may carry beside the blocks, is not applied here.

A decoder's docstring is the byte map of one block, with the number of bytes of a field in parentheses.
"""

import torch
from torch import Tensor

from dynquant.formats import tables
from dynquant.formats.bits import as_bytes, crumbs, field, half, half_bytes, joined, low_high, nibbles

DTYPE_BYTES = {
    **dict.fromkeys(("U8", "I8", "BOOL", "F8_E4M3"), 1),
    **dict.fromkeys(("F16", "BF16", "I16"), 2),
    **dict.fromkeys(("F32", "I32"), 4),
    **dict.fromkeys(("F64", "I64"), 8),
}
"""Bytes of one number, by the name that safetensors gives its type."""
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def decode_q8_0(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs i8 (32) |"""
    return blocks[:, 2:].view(torch.int8).float() * half(blocks, 0)


def decode_q4_0(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs nibbles (16) |"""
    q = _low_then_high(blocks[:, 2:]).view(torch.int8) - 8
    return half(blocks, 0) * q.float()


def pack_q4_0(d: Tensor, q: Tensor) -> Tensor:
    """q [n, 32] from -8 to 7."""
    return torch.cat((half_bytes(d), low_high(q + 8, 1, 16)), dim=1)


def decode_q4_1(blocks: Tensor) -> Tensor:
    """| d f16 (2) | m f16 (2) | qs nibbles (16) |"""
    q = _low_then_high(blocks[:, 4:]).float()
    return (half(blocks, 0) * q).add_(half(blocks, 2))


def pack_q4_1(d: Tensor, m: Tensor, q: Tensor) -> Tensor:
    """q [n, 32] from 0 to 15."""
    return torch.cat((half_bytes(d), half_bytes(m), low_high(q, 1, 16)), dim=1)


def decode_q5_0(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qh bits (4) | qs nibbles (16) |"""
    q = _five_bits(blocks[:, 2:6], blocks[:, 6:]).view(torch.int8) - 16
    return half(blocks, 0) * q.float()


def pack_q5_0(d: Tensor, q: Tensor) -> Tensor:
    """q [n, 32] from -16 to 15."""
    return torch.cat((half_bytes(d), *_five_bit_parts(q + 16)), dim=1)


def decode_q5_1(blocks: Tensor) -> Tensor:
    """| d f16 (2) | m f16 (2) | qh bits (4) | qs nibbles (16) |"""
    q = _five_bits(blocks[:, 4:8], blocks[:, 8:]).float()
    return (half(blocks, 0) * q).add_(half(blocks, 2))


def pack_q5_1(d: Tensor, m: Tensor, q: Tensor) -> Tensor:
    """q [n, 32] from 0 to 31."""
    return torch.cat((half_bytes(d), half_bytes(m), *_five_bit_parts(q)), dim=1)


def decode_q2_0(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs crumbs (16) |"""
    q = crumbs(blocks[:, 2:], dim=2).flatten(1)
    return half(blocks, 0) * (q.view(torch.int8) - 1).float()


def pack_q2_0(d: Tensor, q: Tensor) -> Tensor:
    """q [n, 64] from -1 to 2."""
    return torch.cat((half_bytes(d), as_bytes(joined((q + 1).unflatten(1, (-1, 4)), (0, 2, 4, 6)))), dim=1)


def decode_q1_0(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs bits (16): a set bit is +1, a clear one -1 |"""
    q = tables.lookup(tables.bits(blocks.device), blocks[:, 2:]) * 2 - 1
    return half(blocks, 0) * q.float()


def pack_q1_0(d: Tensor, q: Tensor) -> Tensor:
    """q [n, 128], -1 or 1."""
    is_positive = (q > 0).to(torch.int64).unflatten(1, (-1, 8))
    return torch.cat((half_bytes(d), as_bytes(joined(is_positive, tuple(range(8))))), dim=1)


def decode_f32(blocks: Tensor) -> Tensor:
    """| f32 (4) |"""
    return field(blocks, 0, 4, torch.float32)


def decode_f16(blocks: Tensor) -> Tensor:
    """| f16 (2) |"""
    return field(blocks, 0, 2, torch.float16).float()


def decode_bf16(blocks: Tensor) -> Tensor:
    """| bf16 (2) |"""
    return field(blocks, 0, 2, torch.bfloat16).float()


def decode_mxfp4(blocks: Tensor) -> Tensor:
    """| e E8M0 (1) | qs nibbles (16) |"""
    scales = tables.lookup_value(tables.e8m0_halves(blocks.device), blocks[:, :1])
    q = tables.lookup_value(tables.values("MXFP4", blocks.device), nibbles(blocks[:, 1:], dim=1))
    return scales * q.flatten(1)


def pack_mxfp4(exponents: Tensor, q: Tensor) -> Tensor:
    """exponents [n], the E8M0 byte; q [n, 32] index of the value."""
    return torch.cat((as_bytes(exponents.unsqueeze(1)), low_high(q, 1, 16)), dim=1)


def decode_nvfp4(blocks: Tensor) -> Tensor:
    """| d unsigned E4M3 (4), one for 16 weights | qs nibbles (32): 8 bytes for 16 weights |"""
    scales = tables.lookup_value(tables.ue4m3_halves(blocks.device), blocks[:, :4])
    q = tables.lookup_value(tables.values("NVFP4", blocks.device), nibbles(blocks[:, 4:].reshape(-1, 4, 8), dim=2))
    return (scales.unsqueeze(-1) * q.flatten(2)).flatten(1)


def _low_then_high(qs: Tensor) -> Tensor:
    """[n, 16] bytes -> [n, 32]: all low nibbles, then all high ones."""
    return nibbles(qs, dim=1).flatten(1)


def _five_bits(qh: Tensor, qs: Tensor) -> Tensor:
    """The fifth bits are in the order of the weights: weight 8k + i is bit i of byte k."""
    high = tables.lookup(tables.bits(qh.device), qh).view(torch.uint8)
    return _low_then_high(qs) | (high << 4)


def _five_bit_parts(q: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 32] -> bytes of the fifth bits [n, 4] and of the four lower ones [n, 16]."""
    high = joined((q >> 4).unflatten(1, (-1, 8)), tuple(range(8)))
    return as_bytes(high), low_high(q & 15, 1, 16)
