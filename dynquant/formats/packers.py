"""Writes blocks: the fields that an encoder chose, as the bytes of each quant type. The inverse of the decoders.

The byte maps stand in the decoders' docstrings (`codebooks`, `k_quants`, `ternary`, `float_formats`). Fields are
integer tensors over n blocks, as the decoders name them: `index` into the type's grid, `signs` bytes with a bit per
negative weight, `scales` and `mins` as stored (before an offset is added), `q` per weight. Scales `d` are float32
[n], already rounded to fp16.
"""

import torch
from torch import Tensor

_POWERS_OF_3 = (81, 27, 9, 3, 1)


def pack_iq1_s(d: Tensor, scales: Tensor, shifts: Tensor, index: Tensor) -> Tensor:
    """scales, shifts (1 where delta is negative) [n, 8]; index [n, 32]."""
    high = _joined(index.reshape(-1, 8, 4) >> 8, (0, 3, 6, 9))  # [n, 8]
    qh = high | (scales << 12) | (shifts << 15)
    return torch.cat((_half(d), _bytes(index & 255), _words(qh)), dim=1)


def pack_iq1_m(d: Tensor, scales: Tensor, shifts: Tensor, index: Tensor) -> Tensor:
    """scales [n, 16]; shifts, index [n, 32]."""
    qh = _nibbles((index >> 8) | (shifts << 3))
    words = _joined(scales.reshape(-1, 4, 4), (0, 3, 6, 9))  # [n, 4]
    quarters = _joined_inverse(d, words.shape[0])
    return torch.cat((_bytes(index & 255), qh, _words(words | (quarters << 12))), dim=1)


def pack_iq2_xxs(d: Tensor, scales: Tensor, index: Tensor, signs: Tensor) -> Tensor:
    """scales [n, 8]; index, signs [n, 32] with an even number of minus signs."""
    words = _sign_words(scales, signs)  # [n, 8, 4] bytes
    groups = torch.cat((_bytes(index).reshape(-1, 8, 4), words), dim=2)
    return torch.cat((_half(d), groups.flatten(1)), dim=1)


def pack_iq2_xs(d: Tensor, scales: Tensor, index: Tensor, signs: Tensor) -> Tensor:
    """scales [n, 16]; index, signs [n, 32] with an even number of minus signs."""
    return torch.cat((_half(d), _words(index | ((signs & 127) << 9)), _nibbles(scales)), dim=1)


def pack_iq2_s(d: Tensor, scales: Tensor, index: Tensor, signs: Tensor) -> Tensor:
    """scales [n, 16]; index, signs [n, 32]."""
    high = _bytes(_joined((index >> 8).reshape(-1, 8, 4), (0, 2, 4, 6)))
    return torch.cat((_half(d), _bytes(index & 255), _bytes(signs), high, _nibbles(scales)), dim=1)


def pack_iq3_xxs(d: Tensor, scales: Tensor, index: Tensor, signs: Tensor) -> Tensor:
    """scales [n, 8]; index [n, 64]; signs [n, 32] with an even number of minus signs."""
    return torch.cat((_half(d), _bytes(index), _sign_words(scales, signs).flatten(1)), dim=1)


def pack_iq3_s(d: Tensor, scales: Tensor, index: Tensor, signs: Tensor) -> Tensor:
    """scales [n, 8]; index [n, 64]; signs [n, 32]."""
    high = _bytes(_joined((index >> 8).reshape(-1, 8, 8), tuple(range(8))))
    return torch.cat((_half(d), _bytes(index & 255), high, _bytes(signs), _nibbles(scales)), dim=1)


def pack_iq4_xs(d: Tensor, scales: Tensor, q: Tensor) -> Tensor:
    """scales [n, 8] from -32 to 31; q [n, 256] index of the value."""
    stored = scales + 32
    high = _words(_joined((stored >> 4).unsqueeze(1), tuple(range(0, 16, 2))))
    return torch.cat((_half(d), high, _nibbles(stored & 15), _low_high(q, 8, 16)), dim=1)


def pack_q2_k(d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, q: Tensor) -> Tensor:
    """scales, mins [n, 16]; q [n, 256] from 0 to 3."""
    return torch.cat((_bytes(scales | (mins << 4)), _crumb_planes(q), _half(d), _half(dmin)), dim=1)


def pack_q3_k(d: Tensor, scales: Tensor, q: Tensor) -> Tensor:
    """scales [n, 16] from -32 to 31; q [n, 256] from -4 to 3."""
    stored, q = scales + 32, q + 4
    low = stored & 15
    high = _joined((stored >> 4).reshape(-1, 4, 4).transpose(1, 2), (0, 2, 4, 6))  # byte j holds scales j, 4 + j, ...
    hmask = _joined((q >> 2).reshape(-1, 8, 32).transpose(1, 2), tuple(range(8)))
    return torch.cat(
        (_bytes(hmask), _crumb_planes(q & 3), _bytes(low[:, :8] | (low[:, 8:] << 4)), _bytes(high), _half(d)), dim=1
    )


def pack_q4_k(d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, q: Tensor) -> Tensor:
    """scales, mins [n, 8] from 0 to 63; q [n, 256] from 0 to 15."""
    return torch.cat((_half(d), _half(dmin), _six_bit_pairs(scales, mins), _low_high(q, 4, 32)), dim=1)


def pack_q5_k(d: Tensor, dmin: Tensor, scales: Tensor, mins: Tensor, q: Tensor) -> Tensor:
    """scales, mins [n, 8] from 0 to 63; q [n, 256] from 0 to 31."""
    high = _joined((q >> 4).reshape(-1, 8, 32).transpose(1, 2), tuple(range(8)))
    pairs = _six_bit_pairs(scales, mins)
    return torch.cat((_half(d), _half(dmin), pairs, _bytes(high), _low_high(q & 15, 4, 32)), dim=1)


def pack_q6_k(d: Tensor, scales: Tensor, q: Tensor) -> Tensor:
    """scales [n, 16] from -128 to 127; q [n, 256] from -32 to 31."""
    q = q + 32
    high = _joined((q >> 4).reshape(-1, 2, 4, 32).transpose(2, 3), (0, 2, 4, 6)).flatten(1)
    return torch.cat((_low_high(q & 15, 2, 64), _bytes(high), _bytes(scales & 255), _half(d)), dim=1)


def pack_tq2_0(d: Tensor, q: Tensor) -> Tensor:
    """q [n, 256] from -1 to 1."""
    return torch.cat((_crumb_planes(q + 1), _half(d)), dim=1)


def pack_tq1_0(d: Tensor, q: Tensor) -> Tensor:
    """q [n, 256] from -1 to 1; a byte is its base-3 number as a fraction of 3^5, rounded up."""
    digits = q + 1
    parts = digits[:, :160].reshape(-1, 5, 32), digits[:, 160:240].reshape(-1, 5, 16), digits[:, 240:].reshape(-1, 4, 4)
    numbers = torch.cat([_base_3(part) for part in parts], dim=1)
    return torch.cat((_bytes((numbers * 256 + 242) // 243), _half(d)), dim=1)


def _base_3(digits: Tensor) -> Tensor:
    """[n, digits, bytes] -> the number that five digits make, missing ones being 0."""
    powers = torch.tensor(_POWERS_OF_3[: digits.shape[1]], device=digits.device)
    return (digits * powers[:, None]).sum(1)


def pack_mxfp4(exponents: Tensor, q: Tensor) -> Tensor:
    """exponents [n], the E8M0 byte; q [n, 32] index of the value."""
    return torch.cat((_bytes(exponents.unsqueeze(1)), _low_high(q, 1, 16)), dim=1)


def _half(d: Tensor) -> Tensor:
    return d.to(torch.float16).unsqueeze(1).view(torch.uint8)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.to(torch.uint8)


def _words(numbers: Tensor) -> Tensor:
    """16-bit numbers as little-endian bytes."""
    return numbers.to(torch.int32).to(torch.int16).contiguous().view(torch.uint8)


def _joined(parts: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """The numbers of the last dimension, each moved up by its shift, in one."""
    return (parts << torch.tensor(shifts, device=parts.device)).sum(-1)


def _nibbles(numbers: Tensor) -> Tensor:
    """Neighbouring pairs as low and high half of a byte."""
    return _bytes(numbers[:, 0::2] | (numbers[:, 1::2] << 4))


def _low_high(q: Tensor, parts: int, half: int) -> Tensor:
    """Within each of `parts` runs, weight j is the low nibble and weight j + half the high one."""
    runs = q.reshape(q.shape[0], parts, 2, half)
    return _bytes(runs[:, :, 0] | (runs[:, :, 1] << 4)).flatten(1)


def _crumb_planes(q: Tensor) -> Tensor:
    """Within each half block of 128, byte j holds the weights j, 32 + j, 64 + j and 96 + j."""
    return _bytes(_joined(q.reshape(-1, 2, 4, 32).transpose(2, 3), (0, 2, 4, 6))).flatten(1)


def _sign_words(scales: Tensor, signs: Tensor) -> Tensor:
    """Four bytes for 32 weights: 4 x 7 sign bits, the scale on top; [n, 8, 4]."""
    words = _joined((signs & 127).to(torch.int64).reshape(-1, 8, 4), (0, 7, 14, 21)) | (scales.to(torch.int64) << 28)
    return words.to(torch.int32).unsqueeze(2).view(torch.uint8)


def _joined_inverse(d: Tensor, num_blocks: int) -> Tensor:
    """The four quarters of the fp16 number, lowest first [n, 4]."""
    bits = d.to(torch.float16).view(torch.int16).to(torch.int32) & 0xFFFF
    return torch.stack([(bits >> s) & 15 for s in (0, 4, 8, 12)], dim=1).reshape(num_blocks, 4)


def _six_bit_pairs(scales: Tensor, mins: Tensor) -> Tensor:
    """Eight scales and eight minimums of six bits in 12 bytes; the map is in `k_quants`."""
    sc = (scales[:, :4] & 63) | ((scales[:, 4:] >> 4) << 6)
    m = (mins[:, :4] & 63) | ((mins[:, 4:] >> 4) << 6)
    low = (scales[:, 4:] & 15) | ((mins[:, 4:] & 15) << 4)
    return _bytes(torch.cat((sc, m, low), dim=1))
