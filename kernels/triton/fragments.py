"""Triton: packed planes to the registers that tensor cores take a matrix from, two weights to a word.

A thread of a fragment of 16 rows by 16 columns holds four columns of two rows. Which columns of the matrix these are is
free as long as activations come in the same order, so that here each of the four threads of a row takes a quarter of a
step, 256 weights of a super-block type or 128 of any other, and decodes it without looking at its neighbours. `fetch`
loads, `decode` makes pairs of weights, `columns` says which they are, and `activations.arrange` brings activations into
their order.

Codes become floats as the low bits of a power of two that is then taken away. Weights are rounded once more than those
of `unpack`: their scale is rounded to the dtype of the activations too. A pair in float32, or in the interpreter, is
two tensors and exact. Words of the trade: `bit_words`.
"""

# ruff: noqa: RUF005  (Triton has no `(*tuple, item)`)
import torch
import triton
import triton.language as tl
from torch import Tensor

from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.kernels.triton.bit_chunks import nibble_values
from dynquant.kernels.triton.bit_words import USE_ASM, crumbs_of, prmt, signs_of
from dynquant.kernels.triton.unpack import groups_per_block, plane_start

_CRUMBS = ("Q2_K", "Q3_K", "Q6_K", "TQ2_0")


@triton.constexpr_function
def step_of(type_name):
    """Weights of a row that four threads decode at a time."""
    return 256 if QUANT_TYPES[type_name].block_size == 256 else 128


@triton.constexpr_function
def kind_of(dtype):
    """Return how a pair is kept: 0 as two float32 tensors, 1 as a word of two bf16, 2 of two fp16."""
    return 0 if not USE_ASM or dtype.primitive_bitwidth == 32 else 2 if dtype.is_fp16() else 1


def columns(type_name: str) -> Tensor:
    """Columns of a step that `decode` returns: int64 [4 threads, pairs, 2]."""
    step = torch.arange(step_of.fn(type_name))
    if type_name in _CRUMBS:
        return step.view(2, 4, 2, 8, 2).transpose(1, 2).reshape(4, 32, 2)
    if type_name == "TQ1_0":  # five digits of 32 bytes, five of 16, four of 4
        parts = step.split((160, 80, 16))
        front = parts[0].view(5, 4, 2, 2, 2).permute(1, 2, 0, 3, 4).reshape(4, 20, 2)
        back = parts[1].view(5, 4, 2, 2).transpose(0, 1).reshape(4, 10, 2)
        return torch.cat((front, back, parts[2].view(4, 2, 2)), dim=1)
    return step.view(4, -1, 2)


@triton.jit
def _load(ptr, offset, WORDS: tl.constexpr):
    """WORDS neighbouring words, number `offset` of such, in one load that no pipeline of the compiler takes apart."""
    at = ptr.to(tl.pointer_type(tl.int32)) + offset * WORDS
    if USE_ASM:
        if WORDS == 4:
            return tl.inline_asm_elementwise(
                "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at.to(tl.int64)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        elif WORDS == 2:
            return tl.inline_asm_elementwise(
                "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [at.to(tl.int64)],
                dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            return (
                tl.inline_asm_elementwise(
                    "ld.global.nc.b32 $0, [$1];", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
                ),
            )
    else:
        words = ()
        for i in tl.static_range(WORDS):
            words = words + (tl.load(at + i),)
        return words


@triton.jit
def _load_part(ptr, offset, BITS: tl.constexpr):
    """An unsigned number of 8 or 16 bits, number `offset` of such, as a tuple of one word."""
    if USE_ASM:
        ASM: tl.constexpr = "ld.global.nc.u8 $0, [$1];" if BITS == 8 else "ld.global.nc.u16 $0, [$1];"
        at = (ptr + offset * (BITS // 8)).to(tl.int64)
        return (tl.inline_asm_elementwise(ASM, "=r,l", [at], dtype=tl.int32, is_pure=True, pack=1),)
    elif BITS == 8:
        return (tl.load(ptr + offset).to(tl.int32),)
    else:
        return (tl.load(ptr.to(tl.pointer_type(tl.int16)) + offset).to(tl.int32) & 0xFFFF,)


@triton.jit
def _half(word):
    """The fp16 number in the low bits of a word."""
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _byte(word, AT: tl.constexpr):
    return (word >> (8 * AT)) & 255


@triton.jit
def fetch(TYPE: tl.constexpr, p, nb, row, row_blocks, step, t):
    """Load what thread t of four needs of a step: a tuple of words. `row` is counted over the whole tensor."""
    PER_BLOCK: tl.constexpr = groups_per_block(TYPE)
    if PER_BLOCK == 8:
        block = (row * row_blocks + step).to(tl.int64) + t * 0
        pair = block * 4 + t  # of two groups of 32
    else:
        row_groups = row_blocks * PER_BLOCK
        group = (row * row_groups + tl.minimum(step * 4 + t, row_groups - 1)).to(tl.int64)
        block = group // PER_BLOCK
    qs = p + nb * plane_start(TYPE, "qs") if TYPE != "Q6_K" else p
    if TYPE == "Q4_K" or TYPE == "Q5_K":
        scales = p + nb * plane_start(TYPE, "scales")
        raw = _load(qs, pair * 2, 4) + _load(qs, pair * 2 + 1, 4)
        raw += _load(scales, block * 3, 1) + _load(scales, block * 3 + 1, 1) + _load(scales, block * 3 + 2, 1)
        raw += _load(p + nb * plane_start(TYPE, "dm"), block, 1)
        if TYPE == "Q5_K":
            qh = p + nb * plane_start(TYPE, "qh")
            raw += _load(qh, block * 2, 4) + _load(qh, block * 2 + 1, 4)
    elif TYPE == "Q2_K":
        raw = _load(qs, pair, 4) + _load(p + nb * plane_start(TYPE, "scales"), block * 2 + (t >> 1), 2)
        raw += _load(p + nb * plane_start(TYPE, "dm"), block, 1)
    elif TYPE == "TQ2_0":
        raw = _load(qs, pair, 4) + _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
    elif TYPE == "Q3_K":
        scales = p + nb * plane_start(TYPE, "scales")
        raw = _load(qs, pair, 4) + _load(p + nb * plane_start(TYPE, "hmask"), block * 2 + (t & 1), 4)
        raw += _load(scales, block * 3, 1) + _load(scales, block * 3 + 1, 1) + _load(scales, block * 3 + 2, 1)
        raw += _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
    elif TYPE == "Q6_K":
        first = block * 8 + (t >> 1) * 4 + (t & 1)
        raw = _load(p + nb * plane_start(TYPE, "ql"), first, 4) + _load(p + nb * plane_start(TYPE, "ql"), first + 2, 4)
        raw += _load(p + nb * plane_start(TYPE, "qh"), pair, 4)
        raw += _load(p + nb * plane_start(TYPE, "scales"), block * 2 + (t >> 1), 2)
        raw += _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
    elif TYPE == "TQ1_0":
        raw = _load(qs, block * 6 + t, 2) + _load(qs, block * 12 + 8 + t, 1)
        raw += _load(p + nb * plane_start(TYPE, "qh"), block, 1) + _load_part(
            p + nb * plane_start(TYPE, "d"), block, 16
        )
    elif TYPE == "IQ2_XXS" or TYPE == "IQ2_XS":
        raw = _load(qs, pair, 4) + _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
        if TYPE == "IQ2_XS":
            raw += _load_part(p + nb * plane_start(TYPE, "scales"), pair, 16)
    elif TYPE == "IQ2_S":
        raw = _load(qs, pair, 2) + _load(p + nb * plane_start(TYPE, "signs"), pair, 2)
        raw += _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
        raw += _load_part(p + nb * plane_start(TYPE, "scales"), pair, 16)
        raw += _load_part(p + nb * plane_start(TYPE, "qh"), pair, 16)
    elif TYPE == "IQ3_XXS":
        raw = _load(qs, pair, 4) + _load(p + nb * plane_start(TYPE, "scales"), pair, 2)
        raw += _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
    elif TYPE == "IQ3_S":
        raw = _load(qs, pair, 4) + _load(p + nb * plane_start(TYPE, "signs"), pair, 2)
        raw += _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
        raw += _load_part(p + nb * plane_start(TYPE, "scales"), pair, 8)
        raw += _load_part(p + nb * plane_start(TYPE, "qh"), pair, 16)
    elif TYPE == "IQ1_S":
        raw = _load(qs, pair, 2) + _load(p + nb * plane_start(TYPE, "qh"), pair, 1)
        raw += _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
    elif TYPE == "IQ1_M":
        raw = _load(qs, pair, 2) + _load(p + nb * plane_start(TYPE, "qh"), pair, 1)
        raw += _load(p + nb * plane_start(TYPE, "scales"), block, 2)
    elif TYPE == "IQ4_XS":
        raw = _load(qs, pair * 2, 4) + _load(qs, pair * 2 + 1, 4)
        raw += _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
        raw += _load_part(p + nb * plane_start(TYPE, "scales_l"), pair, 8)
        raw += _load_part(p + nb * plane_start(TYPE, "scales_h"), block, 16)
    elif TYPE == "Q8_0":
        raw = _load(qs, group * 2, 4) + _load(qs, group * 2 + 1, 4)
        raw += _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
    elif TYPE == "Q2_0":
        raw = _load(qs, group, 2) + _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
    elif TYPE == "Q1_0":
        raw = _load(qs, group, 1) + _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
    elif TYPE == "MXFP4":
        raw = _load(qs, group, 4) + _load_part(p + nb * plane_start(TYPE, "e"), block, 8)
    elif TYPE == "NVFP4":
        raw = _load(qs, group, 4) + _load_part(p + nb * plane_start(TYPE, "d"), group, 16)
    elif TYPE == "Q4_0" or TYPE == "IQ4_NL":
        raw = _load(qs, group, 4) + _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
    elif TYPE == "Q5_0":
        raw = _load(qs, group, 4) + _load_part(p + nb * plane_start(TYPE, "d"), block, 16)
        raw += _load(p + nb * plane_start(TYPE, "qh"), block, 1)
    elif TYPE == "Q4_1":
        raw = _load(qs, group, 4) + _load(p + nb * plane_start(TYPE, "dm"), block, 1)
    else:
        tl.static_assert(TYPE == "Q5_1", "fetch does not know this quant type")
        raw = _load(qs, group, 4) + _load(p + nb * plane_start(TYPE, "dm"), block, 1)
        raw += _load(p + nb * plane_start(TYPE, "qh"), block, 1)
    return raw


@triton.jit
def decode(TYPE: tl.constexpr, raw, table_ptr, t, KIND: tl.constexpr):
    """Pairs of weights of what `fetch` loaded, in the order of `columns`; `table_ptr` is `unpack.table`."""
    if TYPE == "Q4_K" or TYPE == "Q5_K":
        return _nibbles(TYPE, raw, t, KIND)
    elif TYPE == "Q2_K" or TYPE == "Q3_K" or TYPE == "Q6_K" or TYPE == "TQ2_0":
        return _crumbs(TYPE, raw, t, KIND)
    elif TYPE == "TQ1_0":
        return _digits(raw, t, KIND)
    elif TYPE == "IQ1_S" or TYPE == "IQ1_M":
        return _ternary(TYPE, raw, table_ptr, t, KIND)
    elif TYPE == "IQ4_XS" or TYPE == "IQ4_NL" or TYPE == "MXFP4" or TYPE == "NVFP4":
        return _tabled(TYPE, raw, table_ptr, t, KIND)
    elif TYPE == "Q8_0":
        pairs = ()
        for i in tl.static_range(8):
            pairs += _four_signed(raw[i], _half(raw[8]), KIND)
        return pairs
    elif TYPE == "Q2_0" or TYPE == "Q1_0":
        return _neighbours(TYPE, raw, KIND)
    elif TYPE == "Q4_0" or TYPE == "Q4_1" or TYPE == "Q5_0" or TYPE == "Q5_1":
        return _plain(TYPE, raw, KIND)
    else:
        return _signed(TYPE, raw, table_ptr, KIND)


@triton.jit
def _both(value, KIND: tl.constexpr):
    """A float32 rounded into both halves of a word; of kind 0 unchanged."""
    if KIND == 0:
        return value
    else:
        ASM: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $1, $1;" if KIND == 1 else "cvt.rn.f16x2.f32 $0, $1, $1;"
        return tl.inline_asm_elementwise(ASM, "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _binary(BF16: tl.constexpr, FP16: tl.constexpr, a, b, KIND: tl.constexpr):
    ASM: tl.constexpr = BF16 if KIND == 1 else FP16
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _minus(a, b, KIND: tl.constexpr):
    # GPUs before an H100 have no differences and products of bf16 pairs: the sum with -1 times b rounds once, too.
    BF16: tl.constexpr = "{ .reg .b32 %one; mov.b32 %one, 0xBF80BF80; fma.rn.bf16x2 $0, $2, %one, $1; }"
    return _binary(BF16, "sub.rn.f16x2 $0, $1, $2;", a, b, KIND)


@triton.jit
def _times(a, b, KIND: tl.constexpr):
    BF16: tl.constexpr = "{ .reg .b32 %zero; mov.b32 %zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, %zero; }"
    return _binary(BF16, "mul.rn.f16x2 $0, $1, $2;", a, b, KIND)


@triton.jit
def _times_plus(a, b, c, KIND: tl.constexpr):
    ASM: tl.constexpr = "fma.rn.bf16x2 $0, $1, $2, $3;" if KIND == 1 else "fma.rn.f16x2 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _above_magic(word, UPPER: tl.constexpr, KIND: tl.constexpr):
    """Two neighbouring bytes, below 128, as 128 + byte (fp16: 1024 + byte)."""
    START: tl.constexpr = "{ .reg .b32 %lane; mov.u32 %lane, %laneid; shr.u32 %lane, %lane, 5; add.u32 $0, %lane, "
    ASM: tl.constexpr = START + ("0x43434343; }" if KIND == 1 else "0x64646464; }")
    magic = tl.inline_asm_elementwise(ASM, "=r,r", [word & 0], dtype=tl.int32, is_pure=True, pack=1)
    return prmt(word, magic, (word & 0) + (0x4342 if UPPER else 0x4140))


@triton.jit
def _four(codes, scale, minimum, offset, KIND: tl.constexpr):
    """Two pairs of scale * (byte - offset) - minimum for bytes below 128; `minimum` and `offset` may be None."""
    MAGIC: tl.constexpr = 128.0 if KIND == 1 else 1024.0
    pairs = ()
    for upper in tl.static_range(2):
        if KIND == 0:
            first = _byte(codes, 2 * upper).to(tl.float32)
            second = _byte(codes, 2 * upper + 1).to(tl.float32)
            if offset is not None:
                first, second = first - offset, second - offset
            if minimum is None:
                pair = (scale * first, scale * second)
            else:
                pair = (scale * first - minimum, scale * second - minimum)
        elif minimum is None and offset is None and KIND == 1:
            # scale * 128 is exact, so that one step gives the product rounded once.
            both = _both(scale, KIND)
            pair = _times_plus(_above_magic(codes, upper, KIND), both, _both(-MAGIC * scale, KIND), KIND)
        else:
            taken = _both(MAGIC if offset is None else offset + MAGIC, KIND)
            pair = _minus(_above_magic(codes, upper, KIND), taken, KIND)
            if minimum is None:
                pair = _times(pair, _both(scale, KIND), KIND)
            else:
                pair = _times_plus(pair, _both(scale, KIND), _both(-minimum, KIND), KIND)
        pairs += (pair,)
    return pairs


@triton.jit
def _four_signed(codes, scale, KIND: tl.constexpr):
    """Two pairs of scale * signed byte."""
    if KIND == 0:
        return _four(codes ^ -0x7F7F7F80, scale, None, 128.0, KIND)
    else:
        pairs = ()
        for upper in tl.static_range(2):
            # Seven bits above the magic number, less that number with the sign's bit: 128 more of its last digits.
            low = _above_magic(codes & 0x7F7F7F7F, upper, KIND)
            pair = _minus(low, _above_magic(codes & -0x7F7F7F80, upper, KIND), KIND)
            pairs += (_times(pair, _both(scale, KIND), KIND),)
        return pairs


@triton.jit
def _nibbles(TYPE: tl.constexpr, raw, t, KIND: tl.constexpr):
    """Q4_K, Q5_K: low nibbles of 32 bytes are group 2t, high ones group 2t + 1."""
    right = (t & 1) * 16
    a0, a1, a2 = raw[8] >> right, raw[9] >> right, raw[10] >> right
    sc = tl.where(t < 2, a0 & 0x3F3F, (a2 & 0x0F0F) | ((a0 >> 2) & 0x3030))
    mn = tl.where(t < 2, a1 & 0x3F3F, ((a2 >> 4) & 0x0F0F) | ((a1 >> 2) & 0x3030))
    d, dmin = _half(raw[11]), _half(raw[11] >> 16)
    pairs = ()
    for s in tl.static_range(2):
        scale, minimum = d * _byte(sc, s).to(tl.float32), dmin * _byte(mn, s).to(tl.float32)
        for i in tl.static_range(8):
            codes = (raw[i] >> (4 * s)) & 0x0F0F0F0F
            if TYPE == "Q5_K":
                codes = codes | (((raw[12 + i] >> (2 * t + s)) & 0x01010101) << 4)
            pairs += _four(codes, scale, minimum, None, KIND)
    return pairs


@triton.jit
def _crumbs(TYPE: tl.constexpr, raw, t, KIND: tl.constexpr):
    """Q2_K, Q3_K, Q6_K, TQ2_0: crumbs s of sixteen bytes are weights 128h + 32s + 16i + 0..15, t being 2h + i."""
    h, i8 = t >> 1, (t & 1) * 8
    if TYPE == "Q2_K":
        lower, upper, d, dmin = raw[4] >> i8, raw[5] >> i8, _half(raw[6]), _half(raw[6] >> 16)
    elif TYPE == "Q3_K":
        lower, upper, high = raw[8] >> (4 * h + i8), raw[9] >> (4 * h + i8), raw[10] >> (4 * h + i8)
        d = _half(raw[11])
    elif TYPE == "Q6_K":
        lower, upper, d = raw[12] << (8 - i8), raw[13] << (8 - i8), _half(raw[14])
    else:
        scale = _half(raw[4])
    pairs = ()
    for s in tl.static_range(4):
        minimum, offset = None, None
        if TYPE == "Q2_K":
            sc = _byte(lower if s < 2 else upper, 2 * (s % 2))
            scale, minimum = d * (sc & 15).to(tl.float32), dmin * (sc >> 4).to(tl.float32)
        elif TYPE == "Q3_K":
            low = _byte(lower if s < 2 else upper, 2 * (s % 2)) & 15
            scale = d * ((low | (((_byte(high, 2 * (s % 2)) >> (2 * (s // 2))) & 3) << 4)) - 32).to(tl.float32)
            offset = 4.0
        elif TYPE == "Q6_K":
            scale = d * (((lower if s < 2 else upper) << (16 - 16 * (s % 2))) >> 24).to(tl.float32)
            offset = 32.0
        else:
            offset = 1.0
        for i in tl.static_range(4):
            if TYPE == "Q6_K":
                crumbs = (raw[8 + i] << (4 - 2 * s) if s < 2 else raw[8 + i] >> (2 * s - 4)) & 0x30303030
                codes = ((raw[i + 4 * (s % 2)] >> (4 * (s // 2))) & 0x0F0F0F0F) | crumbs
            else:
                codes = (raw[i] >> (2 * s)) & 0x03030303
            if TYPE == "Q3_K":
                codes = codes | (((raw[4 + i] >> (4 * h + s)) & 0x01010101) << 2)
            pairs += _four(codes, scale, minimum, offset, KIND)
    return pairs


@triton.jit
def _digits(raw, t, KIND: tl.constexpr):
    """TQ1_0: five digits in base 3 of each byte, the next one being the carry of a product by three."""
    d = _half(raw[4])
    pairs = ()
    for i in tl.static_range(4):
        for n in tl.static_range(5 if i < 3 else 1):
            power = 3**n if i < 3 else (0x1B090301 >> (8 * t)) & 255  # of the last four bytes a thread takes one digit
            even = (((((raw[i] & 0x00FF00FF) * power) & 0x00FF00FF) * 3) >> 8) & 0x00FF00FF
            odd = ((((((raw[i] >> 8) & 0x00FF00FF) * power) & 0x00FF00FF) * 3) >> 8) & 0x00FF00FF
            pairs += _four(even | (odd << 8), d, None, 1.0, KIND)
    return pairs


@triton.jit
def _plain(TYPE: tl.constexpr, raw, KIND: tl.constexpr):
    """Q4_0, Q4_1, Q5_0, Q5_1: low nibbles of sixteen bytes before high ones."""
    minimum, offset = None, None
    if TYPE == "Q4_1" or TYPE == "Q5_1":
        scale, minimum = _half(raw[4]), -_half(raw[4] >> 16)
    else:
        scale, offset = _half(raw[4]), 16.0 if TYPE == "Q5_0" else 8.0
    pairs = ()
    for s in tl.static_range(2):
        for i in tl.static_range(4):
            codes = (raw[i] >> (4 * s)) & 0x0F0F0F0F
            if TYPE == "Q5_0" or TYPE == "Q5_1":
                # Four bits go to bit 0 of four bytes, and from there to bit 4.
                codes = codes | (((((raw[5] >> (16 * s + 4 * i)) & 15) * 0x00204081) & 0x01010101) << 4)
            pairs += _four(codes, scale, minimum, offset, KIND)
    return pairs


@triton.jit
def _neighbours(TYPE: tl.constexpr, raw, KIND: tl.constexpr):
    """Q2_0, Q1_0: neighbouring weights share a byte, and codes are one more than the weight is in units of d."""
    pairs = ()
    for i in tl.static_range(8):
        if TYPE == "Q2_0":
            pairs += _four(crumbs_of(_byte(raw[i // 4], i % 4)), _half(raw[2]), None, 1.0, KIND)
        else:
            pairs += _four(signs_of((raw[0] >> (4 * i)) & 15), _half(raw[1]), None, 1.0, KIND)
    return pairs


@triton.jit
def _tabled(TYPE: tl.constexpr, raw, table_ptr, t, KIND: tl.constexpr):
    """IQ4_NL, IQ4_XS, MXFP4, NVFP4: nibbles that pick one of sixteen values."""
    pairs = ()
    if TYPE == "NVFP4":  # of each sixteen weights the first eight are low nibbles
        for s in tl.static_range(2):
            scale = _load(table_ptr, _byte(raw[4], s), 1)[0].to(tl.float32, bitcast=True)
            low0, high0 = nibble_values(raw[2 * s], TYPE)
            low1, high1 = nibble_values(raw[2 * s + 1], TYPE)
            pairs += _four_signed(low0, scale, KIND) + _four_signed(low1, scale, KIND)
            pairs += _four_signed(high0, scale, KIND) + _four_signed(high1, scale, KIND)
    else:
        for g in tl.static_range(2 if TYPE == "IQ4_XS" else 1):
            if TYPE == "MXFP4":
                # Half of 2^(e - 127); the two smallest are subnormal.
                scale = tl.where(raw[4] < 2, 0x00200000 << raw[4], (raw[4] - 1) << 23).to(tl.float32, bitcast=True)
            elif TYPE == "IQ4_XS":
                six = ((raw[9] >> (4 * g)) & 15) | (((raw[10] >> (4 * t + 2 * g)) & 3) << 4)
                scale = _half(raw[8]) * (six - 32).to(tl.float32)
            else:
                scale = _half(raw[4])
            high = ()
            for i in tl.static_range(4):
                low, upper = nibble_values(raw[4 * g + i], TYPE)
                pairs += _four_signed(low, scale, KIND)
                high += _four_signed(upper, scale, KIND)
            pairs += high
    return pairs


@triton.jit
def _signed(TYPE: tl.constexpr, raw, table_ptr, KIND: tl.constexpr):
    """IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S: magnitudes from a codebook, and signs."""
    pairs = ()
    d = _half(raw[6] if TYPE == "IQ3_XXS" or TYPE == "IQ3_S" else raw[4])
    for g in tl.static_range(2):
        if TYPE == "IQ2_XXS" or TYPE == "IQ3_XXS":
            word = raw[2 * g + 1] if TYPE == "IQ2_XXS" else raw[4 + g]
            scale = d * (((word >> 28) & 15).to(tl.float32) + 0.5) * (0.25 if TYPE == "IQ2_XXS" else 0.5)
            # The eighth sign of seven is their parity: of all four fields of seven bits, at their first bits.
            two = word ^ (word >> 1)
            parity = two ^ (two >> 2) ^ (two >> 4) ^ (word >> 6)
        elif TYPE == "IQ3_S":
            scale = d * (((raw[7] >> (4 * g)) & 15) * 2 + 1).to(tl.float32)
        for u in tl.static_range(4):
            if TYPE == "IQ2_XXS":
                index = _byte(raw[2 * g], u)
            elif TYPE == "IQ2_XS":
                both = (raw[2 * g + u // 2] >> (16 * (u % 2))) & 0xFFFF
                index, signs = both & 511, both >> 9
                parity = signs ^ (signs >> 4)
                parity = parity ^ (parity >> 2)
                signs = signs | (((parity ^ (parity >> 1)) & 1) << 7)
            elif TYPE == "IQ2_S":
                index = _byte(raw[g], u) | (((raw[6] >> (8 * g + 2 * u)) & 3) << 8)
            else:
                both = raw[2 * g + u // 2] >> (16 * (u % 2))
                index, second = both & 255, (both >> 8) & 255
                if TYPE == "IQ3_S":
                    high = raw[8] >> (8 * g + 2 * u)
                    index, second = index | ((high & 1) << 8), second | ((high & 2) << 7)
            if TYPE == "IQ3_XXS" or TYPE == "IQ3_S":
                words = _load(table_ptr, index, 1) + _load(table_ptr, second, 1)
            else:
                words = _load(table_ptr, index, 2)
            if TYPE == "IQ2_XXS" or TYPE == "IQ3_XXS":
                signs = ((word >> (7 * u)) & 127) | (((parity >> (7 * u)) & 1) << 7)
            elif TYPE == "IQ2_S":
                signs = _byte(raw[2 + g], u)
            elif TYPE == "IQ3_S":
                signs = _byte(raw[4 + g], u)
            if TYPE == "IQ2_XS" or TYPE == "IQ2_S":
                scale = d * (((raw[5] >> (8 * g + 4 * (u // 2))) & 15).to(tl.float32) + 0.5) * 0.25
            for half in tl.static_range(2):
                four = _four(words[half], scale, None, None, KIND)
                pairs += (_with_signs(four[0], signs, 2 * half, KIND), _with_signs(four[1], signs, 2 * half + 1, KIND))
    return pairs


@triton.jit
def _with_signs(pair, signs, E: tl.constexpr, KIND: tl.constexpr):
    """Negate the numbers of a pair where bits 2 E and 2 E + 1 of a byte of signs are set."""
    if KIND == 0:
        first = (signs << (31 - 2 * E)) & -2147483648
        second = (signs << (30 - 2 * E)) & -2147483648
        return (
            (pair[0].to(tl.int32, bitcast=True) ^ first).to(tl.float32, bitcast=True),
            (pair[1].to(tl.int32, bitcast=True) ^ second).to(tl.float32, bitcast=True),
        )
    else:
        return pair ^ ((signs * (0x40008000 >> (2 * E))) & -0x7FFF8000)  # the product puts them at bits 15 and 31


@triton.jit
def _ternary(TYPE: tl.constexpr, raw, table_ptr, t, KIND: tl.constexpr):
    """IQ1_S, IQ1_M: scale * (ternary + delta) in eighths; digits are stored plus one, delta is +1 or -1."""
    pairs = ()
    if TYPE == "IQ1_M":
        bits = ((raw[3] >> 12) & 0xF) | ((raw[3] >> 24) & 0xF0) | ((raw[4] >> 4) & 0xF00) | ((raw[4] >> 16) & 0xF000)
        d, scales = _half(bits), tl.where(t < 2, raw[3], raw[4]) >> (16 * (t & 1))
    for g in tl.static_range(2):
        word = (raw[2] >> (16 * g)) & 0xFFFF
        if TYPE == "IQ1_S":
            scale = _half(raw[3]) * (((word >> 12) & 7) * 2 + 1).to(tl.float32) * 0.125
            offset = (7 + ((word >> 15) & 1) * 2).to(tl.float32)
        for u in tl.static_range(4):
            if TYPE == "IQ1_S":
                high = word >> (3 * u)
            else:
                high = word >> (4 * u)
                offset = (7 + ((high >> 3) & 1) * 2).to(tl.float32)
                sc = (scales >> (6 * g + 3 * (u // 2))) & 7
                scale = d * (sc * 2 + 1).to(tl.float32) * 0.125
            digits = _load(table_ptr, _byte(raw[g], u) | ((high & 7) << 8), 1)[0]
            pairs += _four((digits << 3) & 0x78787878, scale, None, offset, KIND)
            pairs += _four((digits >> 1) & 0x78787878, scale, None, offset, KIND)
    return pairs


@triton.jit
def matrix(pairs, BN: tl.constexpr, WARPS: tl.constexpr, dtype: tl.constexpr, KIND: tl.constexpr):
    """Pairs [BN, 4] of a program's rows as the left operand of a product: [BN, 8 * len(pairs)].

    Its rows are those of `rows`. Threads keep what they have: this moves nothing.
    """
    level = ()
    for e in tl.static_range(len(pairs)):
        if KIND == 0:
            first, second = pairs[e]
        else:
            first, second = tl.inline_asm_elementwise(
                "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs[e]], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
            )
            first, second = first.to(dtype, bitcast=True), second.to(dtype, bitcast=True)
        level += (tl.join(first, second)[:, :, None, :],)
    w = tl.reshape(joined(level), [BN // (16 * WARPS), 2, WARPS, 8, 4, len(pairs), 2])
    return tl.reshape(tl.permute(w, (0, 2, 1, 3, 5, 4, 6)), [BN, 8 * len(pairs)])


@triton.jit
def rows(BN: tl.constexpr, WARPS: tl.constexpr):
    """Rows of a program in the order in which its threads hold them: int32 [BN]."""
    q = tl.arange(0, BN)
    return q // (16 * WARPS) * (16 * WARPS) + q // 8 % WARPS * 16 + q // (8 * WARPS) % 2 * 8 + q % 8


@triton.jit
def joined(level):
    """Tensors [BN, 4, n, 2] one after another along the third axis."""
    if len(level) == 1:
        return level[0]
    else:
        upper = ()
        for i in tl.static_range(len(level) // 2):
            both = tl.permute(tl.join(level[2 * i], level[2 * i + 1]), (0, 1, 4, 2, 3))
            upper += (tl.reshape(both, [both.shape[0], both.shape[1], 2 * both.shape[3], 2]),)
        return joined(upper)
