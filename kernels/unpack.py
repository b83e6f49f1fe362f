"""Triton: packed planes to weights, one small function per quant type, for use inside any kernel.

The unit is a group of 32 consecutive weights, [4, 8]: the 8 codes that one thread takes with a single load, and the
weights that one entry of a codebook stands for. `unpack_groups` gives float32 [R, 4, 8] for R groups; a tile of R rows
by G groups of columns is R * G of them, reshaped. Inside a function:

    block  int64 [R, 1, 1]  the block of a group           i8  int32 [1, 4, 1]  0..3, the 8 weights of the group
    s      int32 [R, 1, 1]  the group within the block     i   int32 [1, 1, 8]  0..7, the weight

Products are formed in the order of `dynquant.codecs`; without fused multiply-add the results are bit-equal to it. The
byte maps are there too, and those of the planes in `formats`.
"""

import functools

import numpy as np
import torch
import triton
import triton.language as tl

from dynquant.codecs import tables
from dynquant.kernels.formats import PLANES
from dynquant.quant_types import QUANT_TYPES

_IQ1 = ("IQ1_S", "IQ1_M")
_IQ2 = ("IQ2_XXS", "IQ2_XS", "IQ2_S")
_IQ3 = ("IQ3_XXS", "IQ3_S")


@triton.constexpr_function
def groups_per_block(type_name):
    """Groups of 32 weights in a block: 1, 2 or 8."""
    return QUANT_TYPES[type_name].block_size // 32


@triton.constexpr_function
def _plane(type_name, field):
    """Bytes of one block that lie in planes before that of `field`."""
    names = [plane.name for plane in PLANES[type_name]]
    return sum(plane.num_bytes for plane in PLANES[type_name][: names.index(field)])


@functools.cache
def table(type_name: str, device: torch.device) -> torch.Tensor:
    """The codebook of a type as int32 words, kept once per device; one unused word where a type has none.

    IQ1: eight ternary digits plus one, IQ2: eight magnitude codes, IQ3: four, each in four bits. IQ4, MXFP4 and NVFP4:
    the bits of sixteen float32 values, and for NVFP4 of those of its 256 scale bytes.
    """
    cpu = torch.device("cpu")
    if type_name in (*_IQ1, *_IQ2, *_IQ3):
        rows = tables.grid_rows("IQ1_S" if type_name in _IQ1 else type_name).astype(np.int64)
        codes = rows + 1 if type_name in _IQ1 else np.searchsorted(np.unique(rows), rows)
        words = (codes << (4 * np.arange(rows.shape[1]))).sum(1)
    elif type_name in ("IQ4_NL", "IQ4_XS"):
        words = tables.values("IQ4_NL", cpu).numpy().view(np.int32)
    elif type_name == "MXFP4":
        words = tables.values("MXFP4", cpu).numpy().view(np.int32)
    elif type_name == "NVFP4":
        words = torch.cat((tables.values("NVFP4", cpu), tables.ue4m3_halves(cpu))).numpy().view(np.int32)
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
    if TYPE == "Q8_0":
        w = _q8_0(planes_ptr, num_blocks, block, i8, i)
    elif TYPE == "Q4_0" or TYPE == "Q5_0":
        w = _q4_0_q5_0(TYPE, planes_ptr, num_blocks, block, i8, i)
    elif TYPE == "Q4_1" or TYPE == "Q5_1":
        w = _q4_1_q5_1(TYPE, planes_ptr, num_blocks, block, i8, i)
    elif TYPE == "IQ4_NL":
        w = _iq4_nl(planes_ptr, table_ptr, num_blocks, block, i8, i)
    elif TYPE == "IQ4_XS":
        w = _iq4_xs(planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "MXFP4":
        w = _mxfp4(planes_ptr, table_ptr, num_blocks, block, i8, i)
    elif TYPE == "NVFP4":
        w = _nvfp4(planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "Q2_K":
        w = _q2_k(planes_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "Q3_K":
        w = _q3_k(planes_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "Q4_K" or TYPE == "Q5_K":
        w = _q4_k_q5_k(TYPE, planes_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "Q6_K":
        w = _q6_k(planes_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "IQ3_S":
        w = _iq3_s(planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "IQ3_XXS":
        w = _iq3_xxs(planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "IQ2_S":
        w = _iq2_s(planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "IQ2_XS":
        w = _iq2_xs(planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "IQ2_XXS":
        w = _iq2_xxs(planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "IQ1_M":
        w = _iq1_m(planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "IQ1_S":
        w = _iq1_s(planes_ptr, table_ptr, num_blocks, block, s, i8, i)
    elif TYPE == "TQ2_0":
        w = _tq2_0(planes_ptr, num_blocks, block, s, i8, i)
    else:
        tl.static_assert(TYPE == "TQ1_0", "unpack_groups does not know this quant type")
        w = _tq1_0(planes_ptr, num_blocks, block, s, i8, i)
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
def _half(p, offset):
    """The fp16 number at index `offset` of the tensor."""
    return tl.load(p.to(tl.pointer_type(tl.float16)) + offset).to(tl.float32)


@triton.jit
def _value(table_ptr, index):
    return tl.load(table_ptr.to(tl.pointer_type(tl.float32)) + index)


@triton.jit
def _nibble_pair(p, block, i8, i):
    """Codes of a block of 32: weight j shares a byte with weight j + 16."""
    return (_byte(p, block * 16 + (i8 & 1) * 8 + i) >> ((i8 >> 1) * 4)) & 15


@triton.jit
def _crumb_plane(p, block, s, i8, i):
    """Two-bit codes of a super-block: byte j of a half holds the weights j, 32 + j, 64 + j and 96 + j."""
    return (_byte(p, block * 64 + (s >> 2) * 32 + i8 * 8 + i) >> ((s & 3) * 2)) & 3


@triton.jit
def _q8_0(p, nb, block, i8, i):
    d = _half(p, nb * (_plane("Q8_0", "d") // 2) + block)
    q = tl.load(p.to(tl.pointer_type(tl.int8)) + block * 32 + i8 * 8 + i)
    return q.to(tl.float32) * d


@triton.jit
def _five_bits(TYPE: tl.constexpr, p, nb, block, i8, i):
    q = _nibble_pair(p, block, i8, i)
    if TYPE == "Q5_0" or TYPE == "Q5_1":
        high = _byte(p, nb * _plane(TYPE, "qh") + block * 4 + i8)
        q = q | (((high >> i) & 1) << 4)
    return q


@triton.jit
def _q4_0_q5_0(TYPE: tl.constexpr, p, nb, block, i8, i):
    MIDDLE: tl.constexpr = 16 if TYPE == "Q5_0" else 8
    d = _half(p, nb * (_plane(TYPE, "d") // 2) + block)
    return d * (_five_bits(TYPE, p, nb, block, i8, i) - MIDDLE).to(tl.float32)


@triton.jit
def _q4_1_q5_1(TYPE: tl.constexpr, p, nb, block, i8, i):
    dm = nb * (_plane(TYPE, "dm") // 2) + block * 2
    return _half(p, dm) * _five_bits(TYPE, p, nb, block, i8, i).to(tl.float32) + _half(p, dm + 1)


@triton.jit
def _iq4_nl(p, table_ptr, nb, block, i8, i):
    d = _half(p, nb * (_plane("IQ4_NL", "d") // 2) + block)
    return d * _value(table_ptr, _nibble_pair(p, block, i8, i))


@triton.jit
def _iq4_xs(p, table_ptr, nb, block, s, i8, i):
    low = (_byte(p, nb * _plane("IQ4_XS", "scales_l") + block * 4 + (s >> 1)) >> ((s & 1) * 4)) & 15
    high = (_word16(p, nb * (_plane("IQ4_XS", "scales_h") // 2) + block) >> (s * 2)) & 3
    scale = _half(p, nb * (_plane("IQ4_XS", "d") // 2) + block) * ((low | (high << 4)) - 32).to(tl.float32)
    return scale * _value(table_ptr, _nibble_pair(p, block * 8 + s, i8, i))


@triton.jit
def _mxfp4(p, table_ptr, nb, block, i8, i):
    e = _byte(p, nb * _plane("MXFP4", "e") + block)
    # Half of 2^(e - 127); the two smallest are subnormal.
    scale = tl.where(e < 2, 0x00200000 << e, (e - 1) << 23).to(tl.float32, bitcast=True)
    return scale * _value(table_ptr, _nibble_pair(p, block, i8, i))


@triton.jit
def _nvfp4(p, table_ptr, nb, block, s, i8, i):
    sub = s * 2 + (i8 >> 1)
    scale = _value(table_ptr, 16 + _byte(p, nb * _plane("NVFP4", "d") + block * 4 + sub))
    q = (_byte(p, block * 32 + sub * 8 + i) >> ((i8 & 1) * 4)) & 15
    return scale * _value(table_ptr, q)


@triton.jit
def _q2_k(p, nb, block, s, i8, i):
    scales = _byte(p, nb * _plane("Q2_K", "scales") + block * 16 + s * 2 + (i8 >> 1))
    dm = nb * (_plane("Q2_K", "dm") // 2) + block * 2
    scale = _half(p, dm) * (scales & 15).to(tl.float32)
    minimum = _half(p, dm + 1) * (scales >> 4).to(tl.float32)
    return scale * _crumb_plane(p + nb * _plane("Q2_K", "qs"), block, s, i8, i).to(tl.float32) - minimum


@triton.jit
def _q3_k(p, nb, block, s, i8, i):
    n = s * 2 + (i8 >> 1)
    scales = nb * _plane("Q3_K", "scales") + block * 12
    low = (_byte(p, scales + (n & 7)) >> ((n >> 3) * 4)) & 15
    high = (_byte(p, scales + 8 + (n & 3)) >> ((n >> 2) * 2)) & 3
    scale = _half(p, nb * (_plane("Q3_K", "d") // 2) + block) * ((low | (high << 4)) - 32).to(tl.float32)
    bit = (_byte(p, nb * _plane("Q3_K", "hmask") + block * 32 + i8 * 8 + i) >> s) & 1
    q = _crumb_plane(p + nb * _plane("Q3_K", "qs"), block, s, i8, i) | (bit << 2)
    return scale * (q - 4).to(tl.float32)


@triton.jit
def _q4_k_q5_k(TYPE: tl.constexpr, p, nb, block, s, i8, i):
    scales = nb * _plane(TYPE, "scales") + block * 12 + (s & 3)
    b0, b1, b2 = _byte(p, scales), _byte(p, scales + 4), _byte(p, scales + 8)
    sc = tl.where(s < 4, b0 & 63, (b2 & 15) | ((b0 >> 2) & 48))
    m = tl.where(s < 4, b1 & 63, (b2 >> 4) | ((b1 >> 2) & 48))
    dm = nb * (_plane(TYPE, "dm") // 2) + block * 2
    q = (_byte(p, nb * _plane(TYPE, "qs") + block * 128 + (s >> 1) * 32 + i8 * 8 + i) >> ((s & 1) * 4)) & 15
    if TYPE == "Q5_K":
        high = _byte(p, nb * _plane(TYPE, "qh") + block * 32 + i8 * 8 + i)
        q = q | (((high >> s) & 1) << 4)
    return _half(p, dm) * sc.to(tl.float32) * q.to(tl.float32) - _half(p, dm + 1) * m.to(tl.float32)


@triton.jit
def _q6_k(p, nb, block, s, i8, i):
    sc = _byte(p, nb * _plane("Q6_K", "scales") + block * 16 + s * 2 + (i8 >> 1))
    scale = _half(p, nb * (_plane("Q6_K", "d") // 2) + block) * ((sc ^ 128) - 128).to(tl.float32)
    low = _byte(p, nb * _plane("Q6_K", "ql") + block * 128 + (s >> 2) * 64 + (s & 1) * 32 + i8 * 8 + i)
    high = _crumb_plane(p + nb * _plane("Q6_K", "qh"), block, s, i8, i)
    return scale * ((((low >> ((s & 2) * 2)) & 15) | (high << 4)) - 32).to(tl.float32)


@triton.jit
def _even_signs(bits):
    """The eighth sign of seven: it makes the number of minus signs even."""
    parity = bits ^ (bits >> 4)
    parity = parity ^ (parity >> 2)
    return bits | (((parity ^ (parity >> 1)) & 1) << 7)


@triton.jit
def _signed(magnitudes, signs, i):
    return tl.where(((signs >> i) & 1) != 0, -magnitudes, magnitudes).to(tl.float32)


@triton.jit
def _iq2_magnitudes(table_ptr, index, i):
    """8, 25 or 43 for the codes 0 to 2."""
    code = (tl.load(table_ptr + index) >> (i * 4)) & 15
    return code * 17 + (code >> 1) + 8


@triton.jit
def _iq2_xxs(p, table_ptr, nb, block, s, i8, i):
    word = _word32(p, block * 16 + s * 2 + 1)
    scale = _half(p, nb * (_plane("IQ2_XXS", "d") // 2) + block) * (((word >> 28) & 15).to(tl.float32) + 0.5) * 0.25
    magnitudes = _iq2_magnitudes(table_ptr, _byte(p, block * 64 + s * 8 + i8), i)
    return scale * _signed(magnitudes, _even_signs((word >> (i8 * 7)) & 127), i)


@triton.jit
def _iq2_scale(TYPE: tl.constexpr, p, nb, block, s, i8):
    sc = (_byte(p, nb * _plane(TYPE, "scales") + block * 8 + s) >> ((i8 >> 1) * 4)) & 15
    return _half(p, nb * (_plane(TYPE, "d") // 2) + block) * (sc.to(tl.float32) + 0.5) * 0.25


@triton.jit
def _iq2_xs(p, table_ptr, nb, block, s, i8, i):
    word = _word16(p, nb * (_plane("IQ2_XS", "qs") // 2) + block * 32 + s * 4 + i8)
    magnitudes = _iq2_magnitudes(table_ptr, word & 511, i)
    return _iq2_scale("IQ2_XS", p, nb, block, s, i8) * _signed(magnitudes, _even_signs(word >> 9), i)


@triton.jit
def _iq2_s(p, table_ptr, nb, block, s, i8, i):
    high = (_byte(p, nb * _plane("IQ2_S", "qh") + block * 8 + s) >> (i8 * 2)) & 3
    index = _byte(p, nb * _plane("IQ2_S", "qs") + block * 32 + s * 4 + i8) | (high << 8)
    signs = _byte(p, nb * _plane("IQ2_S", "signs") + block * 32 + s * 4 + i8)
    return _iq2_scale("IQ2_S", p, nb, block, s, i8) * _signed(_iq2_magnitudes(table_ptr, index, i), signs, i)


@triton.jit
def _iq3_codes(table_ptr, index0, index1, i):
    """The codes of two neighbouring grid entries of four weights."""
    words = tl.load(table_ptr + index0) | (tl.load(table_ptr + index1) << 16)
    return (words >> (i * 4)) & 15


@triton.jit
def _iq3_xxs(p, table_ptr, nb, block, s, i8, i):
    word = _word32(p, nb * (_plane("IQ3_XXS", "scales") // 4) + block * 8 + s)
    scale = _half(p, nb * (_plane("IQ3_XXS", "d") // 2) + block) * (((word >> 28) & 15).to(tl.float32) + 0.5) * 0.5
    pair = _word16(p, nb * (_plane("IQ3_XXS", "qs") // 2) + block * 32 + s * 4 + i8)
    code = _iq3_codes(table_ptr, pair & 255, pair >> 8, i)
    magnitudes = code * 8 + tl.where(code == 7, 6, 4)  # 4, 12, ..., 52 and 62
    return scale * _signed(magnitudes, _even_signs((word >> (i8 * 7)) & 127), i)


@triton.jit
def _iq3_s(p, table_ptr, nb, block, s, i8, i):
    sc = (_byte(p, nb * _plane("IQ3_S", "scales") + block * 4 + (s >> 1)) >> ((s & 1) * 4)) & 15
    scale = _half(p, nb * (_plane("IQ3_S", "d") // 2) + block) * (sc * 2 + 1).to(tl.float32)
    pair = _word16(p, nb * (_plane("IQ3_S", "qs") // 2) + block * 32 + s * 4 + i8)
    high = _byte(p, nb * _plane("IQ3_S", "qh") + block * 8 + s) >> (i8 * 2)
    code = _iq3_codes(table_ptr, (pair & 255) | ((high & 1) << 8), (pair >> 8) | ((high & 2) << 7), i)
    signs = _byte(p, nb * _plane("IQ3_S", "signs") + block * 32 + s * 4 + i8)
    return scale * _signed(code * 2 + 1, signs, i)


@triton.jit
def _ternary(table_ptr, index, scale, delta, i):
    """scale * (ternary + delta) in eighths: digits are stored plus one, delta is +1 or -1."""
    digit = (tl.load(table_ptr + index) >> (i * 4)) & 15
    return scale * 0.125 * (digit * 8 + (delta - 8)).to(tl.float32)


@triton.jit
def _iq1_s(p, table_ptr, nb, block, s, i8, i):
    qh = _word16(p, nb * (_plane("IQ1_S", "qh") // 2) + block * 8 + s)
    scale = _half(p, nb * (_plane("IQ1_S", "d") // 2) + block) * (((qh >> 12) & 7) * 2 + 1).to(tl.float32)
    low = _byte(p, nb * _plane("IQ1_S", "qs") + block * 32 + s * 4 + i8)
    return _ternary(table_ptr, low | (((qh >> (i8 * 3)) & 7) << 8), scale, 1 - ((qh >> 15) & 1) * 2, i)


@triton.jit
def _iq1_m(p, table_ptr, nb, block, s, i8, i):
    words = nb * (_plane("IQ1_M", "scales") // 2) + block * 4
    quarters = (_word16(p, words) >> 12) | ((_word16(p, words + 1) >> 8) & 0xF0)
    bits = quarters | ((_word16(p, words + 2) >> 4) & 0xF00) | (_word16(p, words + 3) & 0xF000)
    d = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    sc = (_word16(p, words + (s >> 1)) >> ((s & 1) * 6 + (i8 >> 1) * 3)) & 7
    qh = _byte(p, nb * _plane("IQ1_M", "qh") + block * 16 + s * 2 + (i8 >> 1)) >> ((i8 & 1) * 4)
    low = _byte(p, nb * _plane("IQ1_M", "qs") + block * 32 + s * 4 + i8)
    scale = d * (sc * 2 + 1).to(tl.float32)
    return _ternary(table_ptr, low | ((qh & 7) << 8), scale, 1 - ((qh >> 3) & 1) * 2, i)


@triton.jit
def _tq2_0(p, nb, block, s, i8, i):
    d = _half(p, nb * (_plane("TQ2_0", "d") // 2) + block)
    return d * (_crumb_plane(p, block, s, i8, i) - 1).to(tl.float32)


@triton.jit
def _tq1_0(p, nb, block, s, i8, i):
    d = _half(p, nb * (_plane("TQ1_0", "d") // 2) + block)
    # Weights 0-159 are the 5 digits of 32 bytes, 160-239 those of 16 bytes, 240-255 the 4 digits of 4 bytes.
    t = s * 32 + i8 * 8 - 160
    is_tail = t >= 80
    digit = tl.where(is_tail, (t - 80 + i) >> 2, tl.where(t < 0, s, t >> 4))
    start = tl.where(t < 0, i8 * 8, (t & 15) + 32)
    body = tl.load(p + block * 48 + start + i, mask=t + i * 0 < 80, other=0).to(tl.int32)
    tail = tl.load(p + nb * _plane("TQ1_0", "qh") + block * 4 + (i & 3), mask=is_tail & (i >= 0), other=0).to(tl.int32)
    power = tl.where(digit == 4, 81, (0x1B090301 >> ((digit & 3) * 8)) & 255)
    shifted = (tl.where(is_tail, tail, body) * power) & 255
    return d * (((shifted * 3) >> 8) - 1).to(tl.float32)
