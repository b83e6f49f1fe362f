"""Types whose weights come from a fixed set: vectors of a grid (IQ1_S to IQ4_XS), or -1, 0 and 1 (TQ1_0, TQ2_0).

w = scale * magnitude * sign (IQ2, IQ3), scale * (ternary + delta) (IQ1), scale * value (IQ4), d * q (TQ). Super-blocks
hold 256 weights (IQ4_NL: 32); a grid entry stands for 8 neighbouring weights (IQ1, IQ2), 4 (IQ3) or 1 (IQ4).
The grids themselves come from the gguf package, see `tables`.

A decoder's docstring is the byte map of one block, with the number of bytes of a field in parentheses. A packer is its
inverse, of integer fields over n blocks: `index` into the grid, `signs` bytes with a bit per negative weight, `scales`
as stored, `q` per weight. Scales `d` are float32 [n], already rounded to fp16.
"""

import torch
from torch import Tensor

from dynquant.formats import tables
from dynquant.formats.bits import (
    as_bytes,
    crumb_planes,
    crumbs,
    field,
    half,
    half_bytes,
    joined,
    low_high,
    nibble_pairs,
    nibbles,
    shifted,
    word_bytes,
)
from dynquant.formats.scale_fields import read_scales, with_scales

_SIGN_SHIFTS = (0, 7, 14, 21)
_IQ1_SHIFTS = (0, 3, 6, 9)
_POWERS_OF_3 = (81, 27, 9, 3, 1)


def decode_iq1_s(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs low 8 index bits (32) | qh u16 x 8 (16) |

    qh: bit 15 sign of delta | bits 14-12 scale | 4 x 3 high index bits; one for 32 weights.
    """
    qh = field(blocks, 34, 16, torch.int16).to(torch.int32)
    scales = ((qh >> 12) & 7) * 2 + 1
    high = shifted(qh, _IQ1_SHIFTS, 7) | (((qh >> 15) & 1) << 3).unsqueeze(-1)
    return _ternary(half(blocks, 0), scales, blocks[:, 2:34] | (high.flatten(1) << 8))


def pack_iq1_s(d: Tensor, scales: Tensor, shifts: Tensor, index: Tensor) -> Tensor:
    """scales, shifts (1 where delta is negative) [n, 8]; index [n, 32]."""
    high = joined(index.reshape(-1, 8, 4) >> 8, _IQ1_SHIFTS)  # [n, 8]
    qh = high | (scales << 12) | (shifts << 15)
    return torch.cat((half_bytes(d), as_bytes(index & 255), word_bytes(qh)), dim=1)


def decode_iq1_m(blocks: Tensor) -> Tensor:
    """| qs low 8 index bits (32) | qh nibbles (16) | scales u16 x 4 (8) |

    qh nibble, one for 8 weights: bit 3 sign of delta | 3 high index bits.
    scales: bits 15-12 = a quarter of the fp16 scale d, lowest first | 4 x 3 bit scale, one for 16 weights.
    """
    scales = field(blocks, 48, 8, torch.int16).to(torch.int32)
    scales = shifted(scales, _IQ1_SHIFTS, 7).flatten(1) * 2 + 1
    high = nibbles(blocks[:, 32:48], dim=-1).flatten(1).to(torch.int32)
    return _ternary(read_scales("IQ1_M", blocks), scales, blocks[:, :32] | (high << 8))


def pack_iq1_m(d: Tensor, scales: Tensor, shifts: Tensor, index: Tensor) -> Tensor:
    """scales [n, 16]; shifts, index [n, 32]."""
    qh = nibble_pairs((index >> 8) | (shifts << 3))
    words = joined(scales.reshape(-1, 4, 4), _IQ1_SHIFTS)  # [n, 4]
    return with_scales("IQ1_M", torch.cat((as_bytes(index & 255), qh, word_bytes(words)), dim=1), d.unsqueeze(1))


def decode_iq2_xxs(blocks: Tensor) -> Tensor:
    """| d f16 (2) | 8 x [ 4 indices u8 (4) | bits 31-28 scale, 4 x 7 sign bits (4) ] |"""
    groups = blocks[:, 2:].reshape(-1, 8, 8)
    words = groups[..., 4:].clone(memory_format=torch.contiguous_format).view(torch.int32).squeeze(-1)
    signs = tables.lookup(tables.even_signs(blocks.device), shifted(words, _SIGN_SHIFTS, 127).flatten(1))
    grid = tables.lookup(tables.grid("IQ2_XXS", blocks.device), groups[..., :4].flatten(1))
    return _signed(half(blocks, 0) * _plus_half(words >> 28 & 15) * 0.25, grid, signs)


def pack_iq2_xxs(d: Tensor, scales: Tensor, index: Tensor, signs: Tensor) -> Tensor:
    """scales [n, 8]; index, signs [n, 32] with an even number of minus signs."""
    words = _sign_words(scales, signs)  # [n, 8, 4] bytes
    groups = torch.cat((as_bytes(index).reshape(-1, 8, 4), words), dim=2)
    return torch.cat((half_bytes(d), groups.flatten(1)), dim=1)


def decode_iq2_xs(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs u16 x 32 (64): bits 15-9 signs, 8-0 index | scales nibbles (8), one for 16 weights |"""
    qs = field(blocks, 2, 64, torch.int16)
    signs = tables.lookup(tables.even_signs(blocks.device), (qs >> 9) & 127)
    grid = tables.lookup(tables.grid("IQ2_XS", blocks.device), qs & 511)
    scales = nibbles(blocks[:, 66:], dim=-1).flatten(1)
    return _signed(half(blocks, 0) * _plus_half(scales) * 0.25, grid, signs)


def pack_iq2_xs(d: Tensor, scales: Tensor, index: Tensor, signs: Tensor) -> Tensor:
    """scales [n, 16]; index, signs [n, 32] with an even number of minus signs."""
    return torch.cat((half_bytes(d), word_bytes(index | ((signs & 127) << 9)), nibble_pairs(scales)), dim=1)


def decode_iq2_s(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs low 8 index bits (32) | signs (32) | qh crumbs, high index bits (8) | scales nibbles (8) |"""
    high = crumbs(blocks[:, 66:74], dim=-1).flatten(1).to(torch.int32)
    grid = tables.lookup(tables.grid("IQ2_S", blocks.device), blocks[:, 2:34] | (high << 8))
    signs = tables.lookup(tables.signs(blocks.device), blocks[:, 34:66])
    scales = nibbles(blocks[:, 74:], dim=-1).flatten(1)
    return _signed(half(blocks, 0) * _plus_half(scales) * 0.25, grid, signs)


def pack_iq2_s(d: Tensor, scales: Tensor, index: Tensor, signs: Tensor) -> Tensor:
    """scales [n, 16]; index, signs [n, 32]."""
    high = as_bytes(joined((index >> 8).reshape(-1, 8, 4), (0, 2, 4, 6)))
    return torch.cat((half_bytes(d), as_bytes(index & 255), as_bytes(signs), high, nibble_pairs(scales)), dim=1)


def decode_iq3_xxs(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs indices u8 (64) | scales u32 x 8 (32): bits 31-28 scale, 4 x 7 sign bits |"""
    words = field(blocks, 66, 32, torch.int32)
    signs = tables.lookup(tables.even_signs(blocks.device), shifted(words, _SIGN_SHIFTS, 127).flatten(1))
    grid = tables.lookup(tables.grid("IQ3_XXS", blocks.device), blocks[:, 2:66])
    return _signed(half(blocks, 0) * _plus_half(words >> 28 & 15) * 0.5, grid, signs)


def pack_iq3_xxs(d: Tensor, scales: Tensor, index: Tensor, signs: Tensor) -> Tensor:
    """scales [n, 8]; index [n, 64]; signs [n, 32] with an even number of minus signs."""
    return torch.cat((half_bytes(d), as_bytes(index), _sign_words(scales, signs).flatten(1)), dim=1)


def decode_iq3_s(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs low 8 index bits (64) | qh 9th index bits (8) | signs (32) | scales nibbles (4) |"""
    high = tables.lookup(tables.bits(blocks.device), blocks[:, 66:74]).to(torch.int32)
    grid = tables.lookup(tables.grid("IQ3_S", blocks.device), blocks[:, 2:66] | (high << 8))
    signs = tables.lookup(tables.signs(blocks.device), blocks[:, 74:106])
    scales = nibbles(blocks[:, 106:], dim=-1).flatten(1) * 2 + 1
    return _signed(half(blocks, 0) * scales.float(), grid, signs)


def pack_iq3_s(d: Tensor, scales: Tensor, index: Tensor, signs: Tensor) -> Tensor:
    """scales [n, 8]; index [n, 64]; signs [n, 32]."""
    high = as_bytes(joined((index >> 8).reshape(-1, 8, 8), tuple(range(8))))
    return torch.cat((half_bytes(d), as_bytes(index & 255), high, as_bytes(signs), nibble_pairs(scales)), dim=1)


def decode_iq4_nl(blocks: Tensor) -> Tensor:
    """| d f16 (2) | qs nibbles (16) |"""
    q = tables.lookup_value(tables.values("IQ4_NL", blocks.device), nibbles(blocks[:, 2:], dim=1))
    return half(blocks, 0) * q.flatten(1)


def pack_iq4_nl(d: Tensor, q: Tensor) -> Tensor:
    """q [n, 32] index of the value."""
    return torch.cat((half_bytes(d), low_high(q, 1, 16)), dim=1)


def decode_iq4_xs(blocks: Tensor) -> Tensor:
    """| d f16 (2) | scales_h u16 (2): 8 x 2 high bits | scales_l nibbles (4) | qs nibbles (128) |

    The six-bit scales, one for 32 weights, are stored with an offset of 32.
    """
    high = shifted(field(blocks, 2, 2, torch.int16), tuple(range(0, 16, 2)), 3).flatten(1)
    low = nibbles(blocks[:, 4:8], dim=-1).flatten(1)
    scales = half(blocks, 0) * ((low | (high << 4)) - 32).float()
    q = nibbles(blocks[:, 8:].reshape(-1, 8, 16), dim=2)
    q = tables.lookup_value(tables.values("IQ4_NL", blocks.device), q).flatten(2)
    return (scales.unsqueeze(-1) * q).flatten(1)


def pack_iq4_xs(d: Tensor, scales: Tensor, q: Tensor) -> Tensor:
    """scales [n, 8] from -32 to 31; q [n, 256] index of the value."""
    stored = scales + 32
    high = word_bytes(joined((stored >> 4).unsqueeze(1), tuple(range(0, 16, 2))))
    return torch.cat((half_bytes(d), high, nibble_pairs(stored & 15), low_high(q, 8, 16)), dim=1)


def decode_tq1_0(blocks: Tensor) -> Tensor:
    """| qs 32 bytes x 5 digits | qs 16 bytes x 5 digits | qh 4 bytes x 4 digits | d f16 (2) |

    A byte holds base-3 digits as a fraction of 256, so that the first digit is the integer part of 3 * byte / 256, and
    multiplying the byte by 3 (modulo 256) brings up the next one.
    """
    # [n, digits * bytes]: the bytes with each digit in turn moved to the front.
    fields = ((blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4))
    shifted = torch.cat([packed * 3**i for packed, num_digits in fields for i in range(num_digits)], dim=1)
    # The leading digit, 3 * byte // 256, without leaving eight bits: it grows by one at 86 and at 171.
    digit = (shifted >= 86).view(torch.int8) + (shifted >= 171).view(torch.int8)
    return half(blocks, 52) * (digit - 1).float()


def pack_tq1_0(d: Tensor, q: Tensor) -> Tensor:
    """q [n, 256] from -1 to 1; a byte is its base-3 number as a fraction of 3^5, rounded up."""
    digits = q + 1
    parts = digits[:, :160].reshape(-1, 5, 32), digits[:, 160:240].reshape(-1, 5, 16), digits[:, 240:].reshape(-1, 4, 4)
    powers = torch.tensor(_POWERS_OF_3, device=q.device).unsqueeze(1)
    numbers = torch.cat([(part * powers[: part.shape[1]]).sum(1) for part in parts], dim=1)  # missing digits are 0
    return torch.cat((as_bytes((numbers * 256 + 242) // 243), half_bytes(d)), dim=1)


def decode_tq2_0(blocks: Tensor) -> Tensor:
    """| qs crumbs (64) | d f16 (2) |"""
    q = crumbs(blocks[:, :64].reshape(-1, 2, 32), dim=2).flatten(1)
    return half(blocks, 64) * (q.view(torch.int8) - 1).float()


def pack_tq2_0(d: Tensor, q: Tensor) -> Tensor:
    """q [n, 256] from -1 to 1."""
    return torch.cat((crumb_planes(q + 1), half_bytes(d)), dim=1)


def _plus_half(scales: Tensor) -> Tensor:
    return scales.float() + 0.5


def _signed(scales: Tensor, magnitudes: Tensor, signs: Tensor) -> Tensor:
    """scales [n, s] times signed int8 magnitudes [n, 256]; a sign never changes how a product rounds."""
    q = (magnitudes * signs).float().reshape(*scales.shape, -1)
    return (scales.unsqueeze(-1) * q).flatten(1)


def _ternary(d: Tensor, scales: Tensor, index: Tensor) -> Tensor:
    """d * scale * (ternary + delta), from a table in eighths: taking the 1/8 out of the sum is exact."""
    q = tables.lookup(tables.ternary_grid(index.device), index).float().reshape(*scales.shape, -1)
    return ((d * scales.float() * 0.125).unsqueeze(-1) * q).flatten(1)


def _sign_words(scales: Tensor, signs: Tensor) -> Tensor:
    """Four bytes for 32 weights: 4 x 7 sign bits, the scale on top; [n, 8, 4]."""
    words = joined((signs & 127).to(torch.int64).reshape(-1, 8, 4), _SIGN_SHIFTS) | (scales.to(torch.int64) << 28)
    return words.to(torch.int32).unsqueeze(2).view(torch.uint8)
