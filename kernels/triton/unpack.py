"""Triton: packed planes to weights, one function per family of quant types, for use inside any kernel.

The unit is a group of 32 consecutive weights, [4, 8]: the 8 codes that one thread takes with a single load, and the
weights that one entry of a codebook stands for. Integer codes are formed four to a word, a pair of words for 8 weights,
and split into floats last. `unpack_groups` gives float32 [R, 4, 8] for R groups; a tile of R rows
by G groups of columns is R * G of them, reshaped. Inside a function:

    block  int64 [R, 1, 1]  the block of a group           i8  int32 [1, 4, 1]  0..3, the 8 weights of the group
    s      int32 [R, 1, 1]  the group within the block     i   int32 [1, 1, 8]  0..7, the weight

Products are formed in the order of `dynquant.formats`; without fused multiply-add the results are bit-equal to it. The
byte maps are there too, and those of the planes in `planes`.
"""

import functools

import numpy as np
import torch
import triton
import triton.language as tl

from dynquant.formats import tables
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.kernels.planes import PLANES
from dynquant.kernels.triton.bit_chunks import nibble_values
from dynquant.kernels.triton.bit_words import USE_ASM, crumbs_of, prmt, signs_of

_IQ1 = ("IQ1_S", "IQ1_M")
_IQ2_IQ3 = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")


@triton.constexpr_function
def groups_per_block(type_name):
    """Groups of 32 weights in a block: 1, 2, 4 or 8."""
    return QUANT_TYPES[type_name].block_size // 32


@triton.constexpr_function
def plane_start(type_name, field):
    """Bytes of one block that lie in planes before that of `field`."""
    names = [plane.name for plane in PLANES[type_name]]
    return sum(plane.num_bytes for plane in PLANES[type_name][: names.index(field)])


@functools.cache
def table(type_name: str, device: torch.device) -> torch.Tensor:
    """The codebook of a type as int32 words, kept once per device; one unused word where a type has none.

    IQ1: eight ternary digits plus one in four bits each, the first four in the low halves of the bytes. IQ2, IQ3:
    magnitudes, four bytes to a word. NVFP4: the bits of its 256 scale bytes as float32 values.
    """
    cpu = torch.device("cpu")
    if type_name in _IQ1:
        digits = tables.grid_rows("IQ1_S").astype(np.int64) + 1
        words = (digits << np.array([0, 8, 16, 24, 4, 12, 20, 28])).sum(1)  # disjoint bits: a sum is an or
    elif type_name in _IQ2_IQ3:
        words = tables.grid(type_name, cpu).numpy().view(np.int32)
    elif type_name == "NVFP4":
        words = tables.ue4m3_halves(cpu).numpy().view(np.int32)
    else:
        words = np.zeros(1)
    return torch.from_numpy(words.astype(np.int32)).to(device)


@triton.jit
def unpack_groups(TYPE: tl.constexpr, planes_ptr, table_ptr, num_blocks, groups):
    """Weights of groups of 32.

    Args:
        TYPE: name of the quant type.
        planes_ptr: uint8, the first byte of a planar tensor, a multiple of 16.
        table_ptr: `table` of the type.
        num_blocks: int64 scalar, blocks of the whole tensor.
        groups: int32 [R], indices of groups in the whole tensor.

    Returns:
        float32 [R, 4, 8].
    """
    PER_BLOCK: tl.constexpr = groups_per_block(TYPE)
    group = groups[:, None, None]
    block = (group // PER_BLOCK).to(tl.int64)
    s = group % PER_BLOCK
    i8 = tl.arange(0, 4)[None, :, None]
    i = tl.arange(0, 8)[None, None, :]
    if TYPE == "Q4_0" or TYPE == "Q4_1" or TYPE == "Q5_0" or TYPE == "Q5_1" or TYPE == "Q8_0":
        w = _plain(TYPE, planes_ptr, num_blocks, block, i8, i)
    elif TYPE == "IQ4_NL" or TYPE == "IQ4_XS" or TYPE == "MXFP4" or TYPE == "NVFP4":
        w = _tabled(TYPE, planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "Q4_K" or TYPE == "Q5_K":
        w = _nibbles(TYPE, planes_ptr, num_blocks, block, s, i)
    elif TYPE == "Q2_K" or TYPE == "Q3_K" or TYPE == "Q6_K" or TYPE == "TQ2_0":
        w = _crumbs(TYPE, planes_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "Q2_0" or TYPE == "Q1_0":
        w = _neighbours(TYPE, planes_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "IQ1_M" or TYPE == "IQ1_S":
        w = _ternary(TYPE, planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "IQ2_XXS" or TYPE == "IQ2_XS" or TYPE == "IQ2_S" or TYPE == "IQ3_XXS" or TYPE == "IQ3_S":
        w = _signed(TYPE, planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    else:
        tl.static_assert(TYPE == "TQ1_0", "unpack_groups does not know this quant type")
        w = _digits(planes_ptr, num_blocks, block, s, i8, i)
    return w


@triton.jit
def _byte(p, offset):
    return tl.load(p + offset).to(tl.int32)


@triton.jit
def _word16(p, offset):
    """The unsigned 16-bit number at index `offset` of the tensor."""
    return tl.load(p.to(tl.pointer_type(tl.int16)) + offset).to(tl.int32) & 0xFFFF


@triton.jit
def _word32(p, offset):
    return tl.load(p.to(tl.pointer_type(tl.int32)) + offset)


@triton.jit
def _two_halves(p, index):
    """Two neighbouring fp16 numbers, number `index` of such pairs: a block's scale and minimum."""
    both = tl.load(p.to(tl.pointer_type(tl.int32)) + index)
    low = both.to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale_of(TYPE: tl.constexpr, p, nb, block):
    """The fp16 scale of a block, field `d`."""
    return tl.load(p.to(tl.pointer_type(tl.float16)) + (nb * (plane_start(TYPE, "d") // 2) + block)).to(tl.float32)


@triton.jit
def _words(p, unit, NUM: tl.constexpr):
    """NUM words as [R, NUM], in the widest loads: number `unit` [R, 1, 1] of those that begin at `p`."""
    first = tl.reshape(unit, [unit.shape[0], 1]) * NUM
    return tl.load(p.to(tl.pointer_type(tl.int32)) + (first + tl.arange(0, NUM)[None, :]))


@triton.jit
def _codes(words):
    """[R, 8] words -> the bytes of every eight weights of a group as two words, [R, 4, 1] each."""
    low, high = tl.split(tl.reshape(words, [words.shape[0], 4, 2]))
    return low[:, :, None], high[:, :, None]


@triton.jit
def _fields(p, unit, shift, BITS: tl.constexpr):
    """The `BITS` bits above bit `shift` of 32 bytes, number `unit` of those that begin at `p`."""
    low, high = _codes(_words(p, unit, 8))
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x01010101
    return (low >> shift) & MASK, (high >> shift) & MASK


@triton.jit
def _byte_of(p, index, i8):
    """Byte i8 of word `index` of those that begin at `p`."""
    return (tl.load(p.to(tl.pointer_type(tl.int32)) + index) >> (i8 * 8)) & 255


@triton.jit
def _word16_of(p, unit, i8):
    """Sixteen bits, number i8 of the four of `unit`."""
    low, high = _two_words(p, unit)
    return (tl.where(i8 < 2, low, high) >> ((i8 & 1) * 16)) & 0xFFFF


@triton.jit
def _two_words(p, unit):
    low, high = tl.split(_words(p, unit, 2))
    return low[:, None, None], high[:, None, None]


@triton.jit
def _with_high_bits(codes, high_bits, AT: tl.constexpr):
    """Pairs of words: `high_bits` moved to bit AT of the bytes of `codes`."""
    return codes[0] | (high_bits[0] << AT), codes[1] | (high_bits[1] << AT)


@triton.jit
def _floats(codes, offset, i):
    """Byte i of two words, unsigned, minus a small integer, in float32."""
    word = tl.where(i < 4, codes[0], codes[1])
    if USE_ASM:
        # The byte becomes the last one of 2^23, which is exact and takes two instructions.
        return prmt(word, word * 0 + 0x4B000000, 0x7540 + (i & 3)).to(tl.float32, bitcast=True) - (8388608.0 + offset)
    else:
        return ((word >> ((i & 3) * 8)) & 255).to(tl.float32) - offset


@triton.jit
def _low_then_high(low, high):
    """Words [R, 4] of low and of high nibbles: codes of a block of 32, where weight j shares a byte with j + 16."""
    return _codes(tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [low.shape[0], 8]))


@triton.jit
def _crumb_plane(p, block, s):
    """Two-bit codes of a super-block: byte j of a half holds the weights j, 32 + j, 64 + j and 96 + j."""
    return _fields(p, block * 2 + (s >> 2), (s & 3) * 2, 2)


@triton.jit
def _plain(TYPE: tl.constexpr, p, nb, block, i8, i):
    """Q4_0, Q4_1, Q5_0, Q5_1, Q8_0."""
    if TYPE == "Q8_0":
        codes = _codes(_words(p, block, 8) ^ -0x7F7F7F80)  # signed bytes plus 128
    else:
        packed = _words(p, block, 4)
        codes = _low_then_high(packed & 0x0F0F0F0F, (packed >> 4) & 0x0F0F0F0F)
    if TYPE == "Q5_0" or TYPE == "Q5_1":
        bits = _byte(p, nb * plane_start(TYPE, "qh") + block * 4 + i8)
        # Four bits go to bit 0 of four bytes, and from there to bit 4.
        fifth = ((bits & 15) * 0x00204081) & 0x01010101, ((bits >> 4) * 0x00204081) & 0x01010101
        codes = _with_high_bits(codes, fifth, 4)
    if TYPE == "Q4_1" or TYPE == "Q5_1":
        d, m = _two_halves(p + nb * plane_start(TYPE, "dm"), block)
        return d * _floats(codes, 0, i) + m
    else:
        OFFSET: tl.constexpr = 128 if TYPE == "Q8_0" else 16 if TYPE == "Q5_0" else 8
        return _scale_of(TYPE, p, nb, block) * _floats(codes, OFFSET, i)


@triton.jit
def _neighbours(TYPE: tl.constexpr, p, nb, block, s, i8, i):
    """Q2_0, Q1_0: neighbouring weights share a byte, and codes are one more than the weight is in units of d."""
    if TYPE == "Q2_0":
        pair = _word16_of(p, block * 2 + s, i8)
        codes = crumbs_of(pair & 255), crumbs_of(pair >> 8)
    else:
        bits = _byte_of(p, block * 4 + s, i8)
        codes = signs_of(bits & 15), signs_of(bits >> 4)
    return _scale_of(TYPE, p, nb, block) * _floats(codes, 1, i)


@triton.jit
def _tabled(TYPE: tl.constexpr, p, table_ptr, nb, block, s, i8, i):
    """IQ4_NL, IQ4_XS, MXFP4, NVFP4: nibbles that pick one of sixteen values."""
    low, high = nibble_values(_words(p, block * groups_per_block(TYPE) + s, 4), TYPE)
    low, high = low ^ -0x7F7F7F80, high ^ -0x7F7F7F80  # signed bytes plus 128
    if TYPE == "NVFP4":
        # A block of 16 has its first eight weights in low nibbles, the others in high ones.
        both = tl.permute(tl.reshape(tl.join(low, high), [low.shape[0], 2, 2, 2]), (0, 1, 3, 2))
        codes = _codes(tl.reshape(both, [low.shape[0], 8]))
        e = _byte(p, nb * plane_start("NVFP4", "d") + block * 4 + s * 2 + (i8 >> 1))
        scale = tl.load(table_ptr.to(tl.pointer_type(tl.float32)) + e)
    else:
        codes = _low_then_high(low, high)
        if TYPE == "MXFP4":
            e = _byte(p, nb * plane_start("MXFP4", "e") + block)
            # Half of 2^(e - 127); the two smallest are subnormal.
            scale = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)
        else:
            scale = _scale_of(TYPE, p, nb, block)
        if TYPE == "IQ4_XS":
            sc_low = (_byte(p, nb * plane_start("IQ4_XS", "scales_l") + block * 4 + (s >> 1)) >> ((s & 1) * 4)) & 15
            sc_high = (_word16(p, nb * (plane_start("IQ4_XS", "scales_h") // 2) + block) >> (s * 2)) & 3
            scale = scale * ((sc_low | (sc_high << 4)) - 32).to(tl.float32)
    return scale * _floats(codes, 128, i)


@triton.jit
def _crumbs(TYPE: tl.constexpr, p, nb, block, s, i8, i):
    """Q2_K, Q3_K, Q6_K, TQ2_0."""
    sub = s * 2 + (i8 >> 1)  # sixteen weights that share a scale
    if TYPE == "Q2_K":
        scales = _byte(p, nb * plane_start("Q2_K", "scales") + block * 16 + sub)
        d, dmin = _two_halves(p + nb * plane_start("Q2_K", "dm"), block)
        scale, minimum = d * (scales & 15).to(tl.float32), dmin * (scales >> 4).to(tl.float32)
        w = scale * _floats(_crumb_plane(p + nb * plane_start("Q2_K", "qs"), block, s), 0, i) - minimum
    elif TYPE == "Q3_K":
        scales = nb * plane_start("Q3_K", "scales") + block * 12
        low = (_byte(p, scales + (sub & 7)) >> ((sub >> 3) * 4)) & 15
        high = (_byte(p, scales + 8 + (sub & 3)) >> ((sub >> 2) * 2)) & 3
        scale = _scale_of(TYPE, p, nb, block) * ((low | (high << 4)) - 32).to(tl.float32)
        third = _fields(p + nb * plane_start("Q3_K", "hmask"), block, s, 1)
        codes = _with_high_bits(_crumb_plane(p + nb * plane_start("Q3_K", "qs"), block, s), third, 2)
        w = scale * _floats(codes, 4, i)
    elif TYPE == "Q6_K":
        sc = _byte(p, nb * plane_start("Q6_K", "scales") + block * 16 + sub)
        scale = _scale_of(TYPE, p, nb, block) * ((sc ^ 128) - 128).to(tl.float32)
        low = _fields(p + nb * plane_start("Q6_K", "ql"), block * 4 + (s >> 2) * 2 + (s & 1), (s & 2) * 2, 4)
        high = _crumb_plane(p + nb * plane_start("Q6_K", "qh"), block, s)
        w = scale * _floats(_with_high_bits(low, high, 4), 32, i)
    else:
        w = _scale_of(TYPE, p, nb, block) * _floats(_crumb_plane(p, block, s), 1, i)
    return w


@triton.jit
def _nibbles(TYPE: tl.constexpr, p, nb, block, s, i):
    """Q4_K, Q5_K."""
    scales = nb * plane_start(TYPE, "scales") + block * 12 + (s & 3)
    b0, b1, b2 = _byte(p, scales), _byte(p, scales + 4), _byte(p, scales + 8)
    sc = tl.where(s < 4, b0 & 63, (b2 & 15) | ((b0 >> 2) & 48))
    m = tl.where(s < 4, b1 & 63, (b2 >> 4) | ((b1 >> 2) & 48))
    d, dmin = _two_halves(p + nb * plane_start(TYPE, "dm"), block)
    codes = _fields(p + nb * plane_start(TYPE, "qs"), block * 4 + (s >> 1), (s & 1) * 4, 4)
    if TYPE == "Q5_K":
        codes = _with_high_bits(codes, _fields(p + nb * plane_start(TYPE, "qh"), block, s, 1), 4)
    return d * sc.to(tl.float32) * _floats(codes, 0, i) - dmin * m.to(tl.float32)


@triton.jit
def _even_signs(bits):
    """The eighth sign of seven: it makes the number of minus signs even."""
    parity = bits ^ (bits >> 4)  # folds the bits onto bit 0
    parity = parity ^ (parity >> 2)
    return bits | (((parity ^ (parity >> 1)) & 1) << 7)


@triton.jit
def _signed(TYPE: tl.constexpr, p, table_ptr, nb, block, s, i8, i):
    """IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S: signs, and magnitudes from words `first` and `second` of the table."""
    unit = block * 8 + s
    if TYPE == "IQ2_XXS":
        indices, word = _two_words(p, unit)
        first = ((indices >> (i8 * 8)) & 255) * 2
    elif TYPE == "IQ2_XS":
        pair = _word16_of(p, unit, i8)
        first, signs = (pair & 511) * 2, _even_signs(pair >> 9)
    elif TYPE == "IQ2_S":
        qh = (_byte(p, nb * plane_start("IQ2_S", "qh") + unit) >> (i8 * 2)) & 3
        first = (_byte_of(p, unit, i8) | (qh << 8)) * 2
    elif TYPE == "IQ3_XXS":
        word = _word32(p, nb * (plane_start("IQ3_XXS", "scales") // 4) + unit)
        pair = _word16_of(p, unit, i8)
        first, second = pair & 255, pair >> 8
    else:
        sc = (_byte(p, nb * plane_start("IQ3_S", "scales") + block * 4 + (s >> 1)) >> ((s & 1) * 4)) & 15
        pair = _word16_of(p, unit, i8)
        qh = _byte(p, nb * plane_start("IQ3_S", "qh") + unit) >> (i8 * 2)
        first, second = (pair & 255) | ((qh & 1) << 8), (pair >> 8) | ((qh & 2) << 7)
    if TYPE == "IQ2_XXS" or TYPE == "IQ2_XS" or TYPE == "IQ2_S":
        second = first + 1
    if TYPE == "IQ2_S" or TYPE == "IQ3_S":
        signs = _byte_of(p + nb * plane_start(TYPE, "signs"), unit, i8)
    if TYPE == "IQ2_XXS" or TYPE == "IQ3_XXS":
        signs = _even_signs((word >> (i8 * 7)) & 127)
        d, sc = _scale_of(TYPE, p, nb, block), ((word >> 28) & 15).to(tl.float32) + 0.5
        scale = d * sc * (0.25 if TYPE == "IQ2_XXS" else 0.5)
    elif TYPE == "IQ3_S":
        scale = _scale_of(TYPE, p, nb, block) * (sc * 2 + 1).to(tl.float32)
    else:
        sc = (_byte(p, nb * plane_start(TYPE, "scales") + unit) >> ((i8 >> 1) * 4)) & 15
        scale = _scale_of(TYPE, p, nb, block) * (sc.to(tl.float32) + 0.5) * 0.25
    bits = (scale * _floats((tl.load(table_ptr + first), tl.load(table_ptr + second)), 0, i)).to(tl.int32, bitcast=True)
    return (bits ^ ((signs << (31 - i)) & -2147483648)).to(tl.float32, bitcast=True)  # the bit becomes the float's sign


@triton.jit
def _ternary(TYPE: tl.constexpr, p, table_ptr, nb, block, s, i8, i):
    """IQ1_S, IQ1_M: scale * (ternary + delta) in eighths; digits are stored plus one, delta is +1 or -1."""
    if TYPE == "IQ1_S":
        word = _word16(p, nb * (plane_start("IQ1_S", "qh") // 2) + block * 8 + s)
        scale = _scale_of(TYPE, p, nb, block) * (((word >> 12) & 7) * 2 + 1).to(tl.float32)
        qh, delta = word >> (i8 * 3), 1 - ((word >> 15) & 1) * 2
    else:
        words = nb * (plane_start("IQ1_M", "scales") // 2) + block * 4
        quarters = (_word16(p, words) >> 12) | ((_word16(p, words + 1) >> 8) & 0xF0)
        bits = quarters | ((_word16(p, words + 2) >> 4) & 0xF00) | (_word16(p, words + 3) & 0xF000)
        d = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        sc = (_word16(p, words + (s >> 1)) >> ((s & 1) * 6 + (i8 >> 1) * 3)) & 7
        scale = d * (sc * 2 + 1).to(tl.float32)
        qh = _byte(p, nb * plane_start("IQ1_M", "qh") + block * 16 + s * 2 + (i8 >> 1)) >> ((i8 & 1) * 4)
        delta = 1 - ((qh >> 3) & 1) * 2
    digits = tl.load(table_ptr + (_byte_of(p, block * 8 + s, i8) | ((qh & 7) << 8)))
    eighths = (digits & 0x0F0F0F0F) << 3, ((digits >> 4) & 0x0F0F0F0F) << 3
    return scale * 0.125 * _floats(eighths, (8 - delta).to(tl.float32), i)


@triton.jit
def _digits(p, nb, block, s, i8, i):
    """TQ1_0: weights 0-159 are the 5 digits of 32 bytes, 160-239 those of 16 bytes, 240-255 the 4 digits of 4 bytes."""
    t = s * 32 + i8 * 8 - 160
    is_tail = t >= 80
    digit = tl.where(is_tail, (t - 80 + i) >> 2, tl.where(t < 0, s, t >> 4))
    body = _byte(p, block * 48 + tl.where(t < 0, i8 * 8, (i8 & 1) * 8 + 32) + i)
    tail = _word32(p, nb * (plane_start("TQ1_0", "qh") // 4) + block) >> ((i & 3) * 8)
    power = tl.where(digit == 4, 81, (0x1B090301 >> ((digit & 3) * 8)) & 255)  # of 3: bytes 1, 3, 9, 27
    shifted = (tl.where(is_tail, tail, body) * power) & 255
    return _scale_of("TQ1_0", p, nb, block) * (((shifted * 3) >> 8) - 1).to(tl.float32)
