"""The K types: super-blocks of 256 whose fp16 scale multiplies small integer scales of sub-blocks.

w = d * sc * q, or d * sc * q - dmin * m for the types with a minimum. Sub-blocks hold 16 weights (Q2_K, Q3_K, Q6_K)
or 32 (Q4_K, Q5_K). The products are formed left to right as ggml does, so float32 results are bit-equal.

A decoder's docstring is the byte map of one block, with the number of bytes of a field in parentheses. A packer is its
inverse, of integer fields over n blocks: `scales` and `mins` as stored (before an offset is added), `q` per weight.
Scales `d` and `dmin` are float32 [n], already rounded to fp16.
"""

import torch
from torch import Tensor

from dynquant.formats.bits import (
    as_bytes,
    bit_planes,
    crumb_planes,
    crumbs,
    half,
    half_bytes,
    joined,
    low_high,
    nibbles,
)


def decode_q2_k(blocks: Tensor) -> Tensor:
    """| scales (16): low nibble sc, high nibble m | qs crumbs (64) | d f16 (2) | dmin f16 (2) |"""
    scales = blocks[:, :16]
    q = crumbs(blocks[:, 16:80].reshape(-1, 2, 32), dim=2).reshape(-1, 16, 16)
    return _scaled(half(blocks, 80), scales & 15, q, half(blocks, 82), scales >> 4)


def pack_q2_k(d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, q: Tensor) -> Tensor:
    """scales, mins [n, 16]; q [n, 256] from 0 to 3."""
    return torch.cat((as_bytes(scales | (mins << 4)), crumb_planes(q), half_bytes(d), half_bytes(dmin)), dim=1)


def decode_q3_k(blocks: Tensor) -> Tensor:
    """| hmask bits (32) | qs crumbs (64) | scales 16 x 6 bit (12) | d f16 (2) |

    scales, byte i of 0-7: low nibble = low bits of scale i, high nibble = low bits of scale i + 8;
    byte 8 + j: crumb k = high bits of scale 4k + j. Stored with an offset of 32.
    """
    low = nibbles(blocks[:, 96:104], dim=1).flatten(1)
    high = crumbs(blocks[:, 104:108], dim=1).flatten(1)
    scales = (low | (high << 4)).view(torch.int8) - 32
    q_low = crumbs(blocks[:, 32:96].reshape(-1, 2, 32), dim=2).reshape(-1, 16, 16)
    q_high = bit_planes(blocks[:, :32], dim=1).reshape(-1, 16, 16)
    q = (q_low | (q_high << 2)).view(torch.int8) - 4
    return _scaled(half(blocks, 108), scales, q)


def pack_q3_k(d: Tensor, scales: Tensor, q: Tensor) -> Tensor:
    """scales [n, 16] from -32 to 31; q [n, 256] from -4 to 3."""
    stored, q = scales + 32, q + 4
    low = stored & 15
    high = joined((stored >> 4).reshape(-1, 4, 4).transpose(1, 2), (0, 2, 4, 6))  # byte j holds scales j, 4 + j, ...
    hmask = joined((q >> 2).reshape(-1, 8, 32).transpose(1, 2), tuple(range(8)))
    return torch.cat(
        (as_bytes(hmask), crumb_planes(q & 3), as_bytes(low[:, :8] | (low[:, 8:] << 4)), as_bytes(high), half_bytes(d)),
        dim=1,
    )


def decode_q4_k(blocks: Tensor) -> Tensor:
    """| d f16 (2) | dmin f16 (2) | scales 8 x (6 + 6) bit (12) | qs nibbles (128) |"""
    scales, mins = _six_bit_pairs(blocks[:, 4:16])
    q = nibbles(blocks[:, 16:].reshape(-1, 4, 32), dim=2).reshape(-1, 8, 32)
    return _scaled(half(blocks, 0), scales, q, half(blocks, 2), mins)


def pack_q4_k(d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, q: Tensor) -> Tensor:
    """scales, mins [n, 8] from 0 to 63; q [n, 256] from 0 to 15."""
    return torch.cat((half_bytes(d), half_bytes(dmin), _pack_six_bit_pairs(scales, mins), low_high(q, 4, 32)), dim=1)


def decode_q5_k(blocks: Tensor) -> Tensor:
    """| d f16 (2) | dmin f16 (2) | scales 8 x (6 + 6) bit (12) | qh bits (32) | qs nibbles (128) |"""
    scales, mins = _six_bit_pairs(blocks[:, 4:16])
    q_low = nibbles(blocks[:, 48:].reshape(-1, 4, 32), dim=2).reshape(-1, 8, 32)
    q_high = bit_planes(blocks[:, 16:48], dim=1)
    return _scaled(half(blocks, 0), scales, q_low | (q_high << 4), half(blocks, 2), mins)


def pack_q5_k(d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, q: Tensor) -> Tensor:
    """scales, mins [n, 8] from 0 to 63; q [n, 256] from 0 to 31."""
    high = joined((q >> 4).reshape(-1, 8, 32).transpose(1, 2), tuple(range(8)))
    pairs = _pack_six_bit_pairs(scales, mins)
    return torch.cat((half_bytes(d), half_bytes(dmin), pairs, as_bytes(high), low_high(q & 15, 4, 32)), dim=1)


def decode_q6_k(blocks: Tensor) -> Tensor:
    """| ql nibbles (128) | qh crumbs (64) | scales i8 (16) | d f16 (2) |"""
    q_low = nibbles(blocks[:, :128].reshape(-1, 2, 64), dim=2).reshape(-1, 16, 16)
    q_high = crumbs(blocks[:, 128:192].reshape(-1, 2, 32), dim=2).reshape(-1, 16, 16)
    q = (q_low | (q_high << 4)).view(torch.int8) - 32
    return _scaled(half(blocks, 208), blocks[:, 192:208].view(torch.int8), q)


def pack_q6_k(d: Tensor, scales: Tensor, q: Tensor) -> Tensor:
    """scales [n, 16] from -128 to 127; q [n, 256] from -32 to 31."""
    q = q + 32
    high = joined((q >> 4).reshape(-1, 2, 4, 32).transpose(2, 3), (0, 2, 4, 6)).flatten(1)
    return torch.cat((low_high(q & 15, 2, 64), as_bytes(high), as_bytes(scales & 255), half_bytes(d)), dim=1)


def _scaled(d: Tensor, scales: Tensor, q: Tensor, dmin: Tensor | None = None, mins: Tensor | None = None) -> Tensor:
    """(d * scales) * q - (dmin * mins): d [n, 1], scales [n, s], q [n, s, 256 / s] -> [n, 256]."""
    w = (d * scales.float()).unsqueeze(-1) * q.float()
    if dmin is not None and mins is not None:
        w.sub_((dmin * mins.float()).unsqueeze(-1))
    return w.flatten(1)


def _six_bit_pairs(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minimums of six bits from 12 bytes.

    byte 0-3:  | high 2 bits of sc 4-7 | sc 0-3 |      byte 4-7: the same for m
    byte 8-11: | low 4 bits of m 4-7 | low 4 bits of sc 4-7 |
    """
    sc, m, low = scales.reshape(-1, 3, 4).unbind(1)
    return (
        torch.cat((sc & 63, (low & 15) | ((sc >> 2) & 48)), dim=1),
        torch.cat((m & 63, (low >> 4) | ((m >> 2) & 48)), dim=1),
    )


def _pack_six_bit_pairs(scales: Tensor, mins: Tensor) -> Tensor:
    sc = (scales[:, :4] & 63) | ((scales[:, 4:] >> 4) << 6)
    m = (mins[:, :4] & 63) | ((mins[:, 4:] >> 4) << 6)
    low = (scales[:, 4:] & 15) | ((mins[:, 4:] & 15) << 4)
    return as_bytes(torch.cat((sc, m, low), dim=1))
