"""Dot products of one chunk of a row of bit-field types (no codebook): planar bytes in, float32 partial sums out.

A chunk is 64 weights of a super-block type, a block of Q2_0 or Q1_0, or 32 weights of any other. `block` [T, BN] is
the block of the chunk, counted from `w.first`; `chunk` [T, 1] is its number within the row. Each function returns M
tiles [T, BN].
Sums inside a group are integers; scales are applied to them, never to single weights. Codes are masked in place where
that saves a shift: the power of two is taken out of the activation scale. Constant offsets of codes and minimums are
taken from sums of activations, which all rows share. Crumbs, nibbles, words and units: `bit_words`.
Byte maps: `dynquant.formats`. Planes: `planes`; fields are numbered in the order of a block.
"""

import triton
import triton.language as tl

from dynquant.kernels.triton.bit_words import (
    add_scaled,
    add_sums,
    and4,
    half,
    in_place,
    load2,
    load4,
    minus_times,
    move4,
    or4,
    plane,
    signs_of,
    table16,
    times,
    unit_dots,
    zeros,
)

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def _table_word(values: tuple[int, ...], start: int) -> tl.constexpr:
    word = sum((v & 255) << (8 * i) for i, v in enumerate(values[start : start + 4]))
    return tl.constexpr(word - (1 << 32) if word >= 1 << 31 else word)


IQ4_0, IQ4_1, IQ4_2, IQ4_3 = (_table_word(_IQ4_VALUES, start) for start in (0, 4, 8, 12))
E2M1_0, E2M1_1, E2M1_2, E2M1_3 = (_table_word(_E2M1_DOUBLED, start) for start in (0, 4, 8, 12))


@triton.jit
def crumb_chunk(w, block, chunk, x, grid_ptr, TYPE: tl.constexpr):
    """Q2_K, Q3_K, Q6_K, TQ2_0: chunk 2h + i of a block is 16 bytes of crumbs; crumb s of them is unit 8h + 2s + i."""
    inner = chunk % 4
    h, i = inner // 2, inner % 2
    unit = (chunk // 4) * 16 + h * 8 + i
    group = (chunk // 4) * 8 + h * 4
    parts = zeros(block, x.M)
    minus = zeros(block, x.M)
    QS: tl.constexpr = 0 if TYPE == "TQ2_0" else 1
    words = load4(plane(w, QS, 64, tl.int32), block * 4 + inner)
    if TYPE == "Q2_K":
        lower, upper = load2(plane(w, 0, 16, tl.int32), block * 2 + h)
        lower, upper = lower >> (8 * i), upper >> (8 * i)
        d, dmin = load2(plane(w, 2, 4, tl.float16), block)
        d, dmin = d.to(tl.float32), dmin.to(tl.float32)
    elif TYPE == "Q3_K":
        masks = [mask >> (4 * h) for mask in load4(plane(w, 0, 32, tl.int32), block * 2 + i)]
        scales_ptr = plane(w, 2, 12, tl.int32) + block * 3
        lower = tl.load(scales_ptr) >> (4 * h + 8 * i)
        upper = tl.load(scales_ptr + 1) >> (4 * h + 8 * i)
        high = tl.load(scales_ptr + 2) >> (4 * h + 8 * i)
        d = half(w, 3, 2, block)
    elif TYPE == "Q6_K":
        ql_ptr = plane(w, 0, 128, tl.int32)
        front = load4(ql_ptr, block * 8 + 4 * h + i)
        back = load4(ql_ptr, block * 8 + 4 * h + i + 2)
        lower, upper = load2(plane(w, 2, 16, tl.int32), block * 2 + h)
        lower, upper = lower << (8 - 8 * i), upper << (8 - 8 * i)
        d = half(w, 3, 2, block)
    else:
        d = half(w, 1, 2, block)
    for s in tl.static_range(4):
        if TYPE == "TQ2_0":
            dots, _ = unit_dots(x, unit + 2 * s, in_place(words, s), 1 << (2 * s), False)
            parts = add_scaled(parts, dots, 1.0, x, group + s, 0.25**s)
        elif TYPE == "Q2_K":
            dots, sums = unit_dots(x, unit + 2 * s, in_place(words, s), 0, False)
            pair = (lower if s < 2 else upper) >> (16 * (s % 2))
            parts = add_scaled(parts, dots, (pair & 15).to(tl.float32), x, group + s, 0.25**s)
            minimum = ((pair >> 4) & 15).to(tl.float32)
            minus = add_sums(minus, sums, minimum, x, group + s)
        elif TYPE == "Q3_K":
            codes = or4(and4(move4(words, -2 * s), 0x03030303), and4(move4(masks, 2 - s), 0x04040404))
            dots, _ = unit_dots(x, unit + 2 * s, codes, 4, False)
            low = ((lower if s < 2 else upper) >> (16 * (s % 2))) & 15
            scale = (low | (((high >> (16 * (s % 2) + 2 * (s // 2))) & 3) << 4)) - 32
            parts = add_scaled(parts, dots, scale.to(tl.float32), x, group + s, 1.0)
        else:
            nibbles = move4(front if s % 2 == 0 else back, -4 * (s // 2))
            codes = or4(and4(nibbles, 0x0F0F0F0F), and4(move4(words, 4 - 2 * s), 0x30303030))
            dots, _ = unit_dots(x, unit + 2 * s, codes, 32, False)
            scale = ((lower if s < 2 else upper) << (16 - 16 * (s % 2))) >> 24
            parts = add_scaled(parts, dots, scale.to(tl.float32), x, group + s, 1.0)
    parts = times(parts, d)
    if TYPE == "Q2_K":
        parts = minus_times(parts, minus, dmin)
    return parts


@triton.jit
def nibble_chunk(w, block, chunk, x, grid_ptr, TYPE: tl.constexpr):
    """Q4_K, Q5_K: chunk c of a block is 32 bytes, low nibbles of group 2c and high nibbles of group 2c + 1."""
    inner = chunk % 4
    QS: tl.constexpr = 2 if TYPE == "Q4_K" else 3
    qs_ptr = plane(w, QS, 128, tl.int32)
    front = load4(qs_ptr, block * 8 + inner * 2)
    back = load4(qs_ptr, block * 8 + inner * 2 + 1)
    # Six-bit scales and minimums of the two groups, as pairs of bytes.
    scales_ptr = plane(w, 1, 12, tl.int16) + (block * 6 + inner % 2)
    sc = tl.load(scales_ptr).to(tl.int32)
    mn = tl.load(scales_ptr + 2).to(tl.int32)
    low = tl.load(scales_ptr + 4).to(tl.int32)
    is_late = (inner >= 2) & (block >= 0)
    sc = tl.where(is_late, (low & 0x0F0F) | ((sc >> 2) & 0x3030), sc & 0x3F3F)
    mn = tl.where(is_late, ((low >> 4) & 0x0F0F) | ((mn >> 2) & 0x3030), mn & 0x3F3F)
    d, dmin = load2(plane(w, 0, 4, tl.float16), block)
    if TYPE == "Q5_K":
        qh_ptr = plane(w, 2, 32, tl.int32)
        front_fifths = [word >> (inner * 2) for word in load4(qh_ptr, block * 2)]
        back_fifths = [word >> (inner * 2) for word in load4(qh_ptr, block * 2 + 1)]
    parts = zeros(block, x.M)
    minus = zeros(block, x.M)
    FACTORS: tl.constexpr = (1.0, 0.0625 if TYPE == "Q4_K" else 1.0)
    for s in tl.static_range(2):
        unit = chunk * 4 + 2 * s
        if TYPE == "Q4_K":
            front_codes = and4(front, 0x0F0F0F0F if s == 0 else -0x0F0F0F10)
            back_codes = and4(back, 0x0F0F0F0F if s == 0 else -0x0F0F0F10)
        else:
            front_codes = or4(and4(move4(front, -4 * s), 0x0F0F0F0F), and4(move4(front_fifths, 4 - s), 0x10101010))
            back_codes = or4(and4(move4(back, -4 * s), 0x0F0F0F0F), and4(move4(back_fifths, 4 - s), 0x10101010))
        dots, sums = unit_dots(x, unit, front_codes, 0, False)
        dots, sums = unit_dots(x, unit + 1, back_codes, 0, False, (dots, sums))
        scale = ((sc >> (8 * s)) & 63).to(tl.float32)
        minimum = ((mn >> (8 * s)) & 63).to(tl.float32)
        parts = add_scaled(parts, dots, scale, x, chunk * 2 + s, FACTORS[s])
        minus = add_sums(minus, sums, minimum, x, chunk * 2 + s)
    return minus_times(times(parts, d.to(tl.float32)), minus, dmin.to(tl.float32))


@triton.jit
def plain_chunk(w, block, chunk, x, grid_ptr, TYPE: tl.constexpr):
    """Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: a chunk is a block of 32, or 16 low nibbles before 16 high ones."""
    parts = zeros(block, x.M)
    unit = chunk * 2
    HAS_MIN: tl.constexpr = TYPE == "Q4_1" or TYPE == "Q5_1"
    if HAS_MIN:
        d, minimum = load2(plane(w, 0, 4, tl.float16), block)
        d, minimum = d.to(tl.float32), minimum.to(tl.float32)
    else:
        d = half(w, 0, 2, block)
    if TYPE == "Q8_0":
        qs_ptr = plane(w, 1, 32, tl.int32)
        dots, sums = unit_dots(x, unit, load4(qs_ptr, block * 2), 0, True)
        dots, sums = unit_dots(x, unit + 1, load4(qs_ptr, block * 2 + 1), 0, True, (dots, sums))
    else:
        IS_FIVE: tl.constexpr = TYPE == "Q5_0" or TYPE == "Q5_1"
        OFFSET: tl.constexpr = 0 if HAS_MIN else (16 if IS_FIVE else 8)
        QS: tl.constexpr = 2 if IS_FIVE else 1
        words = load4(plane(w, QS, 16, tl.int32), block)
        low, high = and4(words, 0x0F0F0F0F), and4(move4(words, -4), 0x0F0F0F0F)
        if IS_FIVE:
            bits = tl.load(plane(w, 1, 4, tl.int32) + block)
            low, high = or4(low, _fifth_bits(bits)), or4(high, _fifth_bits(bits >> 16))
        dots, sums = unit_dots(x, unit, low, OFFSET, False)
        dots, sums = unit_dots(x, unit + 1, high, OFFSET, False, (dots, sums))
    parts = add_scaled(parts, dots, d, x, chunk, 1.0)
    if HAS_MIN:
        parts = add_sums(parts, sums, minimum, x, chunk)
    return parts


@triton.jit
def neighbour_chunk(w, block, chunk, x, grid_ptr, TYPE: tl.constexpr):
    """Q2_0, Q1_0: a chunk is a block, a word is a unit of crumbs or two units of bits; neighbours share a byte.

    Crumb s of all bytes is taken at once, and activations are put into that order: they are shared by all rows.
    """
    parts = zeros(block, x.M)
    d = half(w, 0, 2, block)
    words = load4(plane(w, 1, 16, tl.int32), block)
    GROUPS: tl.constexpr = 2 if TYPE == "Q2_0" else 4
    for g in tl.static_range(GROUPS):
        group = chunk * GROUPS + g
        if TYPE == "Q2_0":
            front, back = _crumbs_in_turn(words[2 * g]), _crumbs_in_turn(words[2 * g + 1])
        else:
            front, back = _signs_in_turn(words[g]), _signs_in_turn(words[g] >> 16)
        dots, sums = unit_dots(x, group * 2, front, 1, False, None, TYPE == "Q2_0")
        dots, _ = unit_dots(x, group * 2 + 1, back, 1, False, (dots, sums), TYPE == "Q2_0")
        parts = add_scaled(parts, dots, d, x, group, 1.0)
    return parts


@triton.jit
def _crumbs_in_turn(word):
    return [(word >> shift) & 0x03030303 for shift in (0, 2, 4, 6)]


@triton.jit
def _signs_in_turn(word):
    return [signs_of((word >> shift) & 15) for shift in (0, 4, 8, 12)]


@triton.jit
def _fifth_bits(bits):
    """Sixteen bits, one for each byte of four words, at bit 4 of the byte."""
    return [(((bits >> shift) & 15) * 0x02040810) & 0x10101010 for shift in (0, 4, 8, 12)]


@triton.jit
def nibble_values(packed, TYPE: tl.constexpr):
    """Signed bytes that low and high nibbles pick in IQ4_NL, IQ4_XS, MXFP4 and NVFP4; the last two are doubled."""
    IS_E2M1: tl.constexpr = TYPE == "MXFP4" or TYPE == "NVFP4"
    t0, t1 = (E2M1_0, E2M1_1) if IS_E2M1 else (IQ4_0, IQ4_1)
    t2, t3 = (E2M1_2, E2M1_3) if IS_E2M1 else (IQ4_2, IQ4_3)
    zero = packed & 0
    return table16(packed, zero + t0, zero + t1, zero + t2, zero + t3)


@triton.jit
def table_chunk(w, block, chunk, x, grid_ptr, TYPE: tl.constexpr):
    """IQ4_NL, IQ4_XS, MXFP4, NVFP4: a chunk is 16 bytes of nibbles that pick one of sixteen values."""
    QS: tl.constexpr = 3 if TYPE == "IQ4_XS" else 1
    QS_BYTES: tl.constexpr = 128 if TYPE == "IQ4_XS" else 32 if TYPE == "NVFP4" else 16
    PER_BLOCK: tl.constexpr = QS_BYTES // 16
    inner = chunk % PER_BLOCK
    words = load4(plane(w, QS, QS_BYTES, tl.int32), block * PER_BLOCK + inner)
    l0, h0 = nibble_values(words[0], TYPE)
    l1, h1 = nibble_values(words[1], TYPE)
    l2, h2 = nibble_values(words[2], TYPE)
    l3, h3 = nibble_values(words[3], TYPE)
    parts = zeros(block, x.M)
    if TYPE == "NVFP4":
        scales = tl.load(plane(w, 0, 4, tl.uint16) + (block * 2 + inner)).to(tl.int32)
        dots, _ = unit_dots(x, chunk * 2, (l0, l1, h0, h1), 0, True)
        parts = add_scaled(parts, dots, _ue4m3(scales & 255), x, chunk, 0.5)
        dots, _ = unit_dots(x, chunk * 2 + 1, (l2, l3, h2, h3), 0, True)
        parts = add_scaled(parts, dots, _ue4m3(scales >> 8), x, chunk, 0.5)
    else:
        dots, sums = unit_dots(x, chunk * 2, (l0, l1, l2, l3), 0, True)
        dots, sums = unit_dots(x, chunk * 2 + 1, (h0, h1, h2, h3), 0, True, (dots, sums))
        if TYPE == "MXFP4":
            e = tl.load(plane(w, 0, 1, tl.uint8) + block).to(tl.int32)
            # 2^(e - 128), the values being doubled; the two smallest are subnormal.
            scale = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)
        else:
            scale = half(w, 0, 2, block)
        if TYPE == "IQ4_XS":
            high = tl.load(plane(w, 1, 2, tl.uint16) + block).to(tl.int32) >> (2 * inner)
            low = tl.load(plane(w, 2, 4, tl.int32) + block) >> (4 * inner)
            scale = scale * (((low & 15) | ((high & 3) << 4)) - 32).to(tl.float32)
        parts = add_scaled(parts, dots, scale, x, chunk, 1.0)
    return parts


@triton.jit
def _ue4m3(byte):
    """Unsigned E4M3 to float32; byte 0x7F, not a number, counts as zero as in ggml."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    return tl.where(byte == 127, 0.0, value)


@triton.jit
def _digits(even, odd):
    """The leading base-3 digits of four byte fractions held in 16-bit lanes, and the fractions that remain."""
    even, odd = even * 3, odd * 3  # the digit moves above the eight bits of the fraction
    return ((even >> 8) & 0x00030003) | (odd & 0x03000300), even & 0x00FF00FF, odd & 0x00FF00FF


@triton.jit
def _add_digits(parts, even, odd, x, unit):
    """One digit of sixteen bytes: a unit."""
    w0, e0, o0 = _digits(even[0], odd[0])
    w1, e1, o1 = _digits(even[1], odd[1])
    w2, e2, o2 = _digits(even[2], odd[2])
    w3, e3, o3 = _digits(even[3], odd[3])
    dots, _ = unit_dots(x, unit, (w0, w1, w2, w3), 1, False)
    parts = add_scaled(parts, dots, 1.0, x, unit // 2, 1.0)
    return parts, (e0, e1, e2, e3), (o0, o1, o2, o3)


@triton.jit
def digit_chunk(w, block, chunk, x, grid_ptr, TYPE: tl.constexpr):
    """TQ1_0: a chunk is a block, three times 16 bytes of five digits and 4 bytes of four."""
    parts = zeros(block, x.M)
    qs_ptr = plane(w, 0, 48, tl.int32)
    for third in tl.static_range(3):
        words = load4(qs_ptr, block * 3 + third)
        even, odd = [word & 0x00FF00FF for word in words], [(word >> 8) & 0x00FF00FF for word in words]
        for n in tl.static_range(5):
            unit = chunk * 16 + (2 * n + third if third < 2 else 10 + n)
            parts, even, odd = _add_digits(parts, even, odd, x, unit)
    word = tl.load(plane(w, 1, 4, tl.int32) + block)
    w0, e, o = _digits(word & 0x00FF00FF, (word >> 8) & 0x00FF00FF)
    w1, e, o = _digits(e, o)
    w2, e, o = _digits(e, o)
    w3, e, o = _digits(e, o)
    dots, _ = unit_dots(x, chunk * 16 + 15, (w0, w1, w2, w3), 1, False)
    parts = add_scaled(parts, dots, 1.0, x, chunk * 8 + 7, 1.0)
    return times(parts, half(w, 2, 2, block))
