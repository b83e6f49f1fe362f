"""Triton: products whose weights are decoded straight into the registers of the tensor cores.

A thread of a fragment of 16 rows by 16 columns holds four columns of two rows. Which columns of the matrix these are is
free, if activations come in the same order: here each thread of four takes its own chunk of a row, and decodes it two
weights to a word. `arrange` brings activations into that order, padded with zeros.
"""

# ruff: noqa: RUF005  (Triton has no `(*tuple, item)`)
import functools

import torch
import triton
import triton.language as tl

from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.kernels.triton.bit_words import USE_ASM, prmt
from dynquant.kernels.triton.unpack import _plane, table

CRUMBS = ("Q2_K", "Q3_K", "Q6_K")
PAIRS = ("Q4_K", "Q5_K", "IQ2_XXS", "IQ3_XXS", "IQ1_S")
GROUPS = ("Q8_0",)
TYPES = CRUMBS + PAIRS + GROUPS


@triton.constexpr_function
def step_of(TYPE):
    return 256 if TYPE in CRUMBS + PAIRS else 128


@triton.constexpr_function
def is_crumbs(TYPE):
    return TYPE in CRUMBS


@functools.cache
def order(type_name: str, device, stream: bool = False) -> torch.Tensor:
    """Column of the matrix for every column of the fragments, int32 [step]."""
    step = 256 if type_name in CRUMBS + PAIRS else 128
    columns = torch.empty(step // 16, 2, 4, 2, dtype=torch.int32)
    streamed = torch.empty(step // 32, 4, 4, 2, dtype=torch.int32)
    for t in range(4):
        for e in range(step // 8):
            if type_name in CRUMBS:
                s, rest = divmod(e, 8)
                k = 128 * (t >> 1) + 16 * (t & 1) + 32 * s + 2 * rest
            else:
                k = step // 4 * t + 2 * e
            columns[e // 2, e % 2, t, 0] = k
            columns[e // 2, e % 2, t, 1] = k + 1
            streamed[e // 4, t, e % 4, 0] = k
            streamed[e // 4, t, e % 4, 1] = k + 1
    return (streamed if stream else columns).flatten().to(device)


@triton.jit(do_not_specialize=["M", "slots"])
def arrange_kernel(x_ptr, out_ptr, columns_ptr, order_ptr, M, K, PADDED, slots, STEP: tl.constexpr):
    i = tl.arange(0, STEP)
    k = tl.program_id(0) * STEP + tl.load(columns_ptr + i)
    m = tl.program_id(1)
    source = m.to(tl.int64)
    if order_ptr is not None:
        source = tl.load(order_ptr + tl.minimum(m, M - 1)) // slots
    x = tl.load(x_ptr + source * K + k, mask=(m < M) & (k < K), other=0.0)
    tl.store(out_ptr + m.to(tl.int64) * PADDED + tl.program_id(0) * STEP + i, x)


def arrange(x, type_name, rows, places=None, slots=1, num_places=None, stream=False):
    k = x.shape[1]
    step = 256 if type_name in CRUMBS + PAIRS else 128
    steps = triton.cdiv(k, step)
    out = x.new_empty(rows, steps * step)
    arrange_kernel[(steps, rows)](
        x,
        out,
        order(type_name, x.device, stream),
        places,
        num_places or len(x),
        k,
        steps * step,
        slots,
        STEP=step,
        num_warps=2,
    )
    return out


@triton.jit
def _asm3(ASM: tl.constexpr, a, b, c):
    return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _both(value, FP16: tl.constexpr):
    """A float32 twice in a word, rounded; under the interpreter the float32."""
    if USE_ASM:
        ASM: tl.constexpr = "cvt.rn.f16x2.f32 $0, $1, $1;" if FP16 else "cvt.rn.bf16x2.f32 $0, $1, $1;"
        return tl.inline_asm_elementwise(ASM, "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return value


@triton.jit
def _raw_pair(word, UPPER: tl.constexpr, FP16: tl.constexpr):
    """Two bytes below 128 plus 128 (fp16: plus 1024), packed; under the interpreter a pair of float32 without it."""
    if USE_ASM:
        zero = word & 0
        return prmt(word, zero + (0x64646464 if FP16 else 0x43434343), zero + (0x4342 if UPPER else 0x4140))
    else:
        SHIFT: tl.constexpr = 16 if UPPER else 0
        return ((word >> SHIFT) & 255).to(tl.float32), ((word >> (SHIFT + 8)) & 255).to(tl.float32)


@triton.jit
def _centered(pair, offset, FP16: tl.constexpr):
    """Take the magic number and `offset`, a float32 tensor of small integers, from a raw pair."""
    if USE_ASM:
        taken = _both(offset + (1024.0 if FP16 else 128.0), FP16)
        return _asm3("sub.rn.f16x2 $0, $1, $2;" if FP16 else "sub.rn.bf16x2 $0, $1, $2;", pair, taken, taken)
    else:
        return pair[0] - offset, pair[1] - offset


@triton.jit
def _scaled(pair, scale, minimum, FP16: tl.constexpr):
    """scale * pair + minimum, or without one."""
    if USE_ASM:
        if minimum is None:
            ASM: tl.constexpr = "mul.rn.f16x2 $0, $1, $2;" if FP16 else "mul.rn.bf16x2 $0, $1, $2;"
            return tl.inline_asm_elementwise(ASM, "=r,r,r", [pair, scale], dtype=tl.int32, is_pure=True, pack=1)
        else:
            return _asm3(
                "fma.rn.f16x2 $0, $1, $2, $3;" if FP16 else "fma.rn.bf16x2 $0, $1, $2, $3;", pair, scale, minimum
            )
    else:
        if minimum is None:
            return pair[0] * scale, pair[1] * scale
        else:
            return pair[0] * scale + minimum, pair[1] * scale + minimum


@triton.jit
def _times(pair, scale, FP16: tl.constexpr):
    """A raw pair times a float32 scale: the magic number leaves in the same step, as its product is exact."""
    if USE_ASM:
        both = _both(scale, FP16)
        SHIFT: tl.constexpr = -0x1BFF1C00 if FP16 else -0x3CFF3D00
        ASM: tl.constexpr = "mul.rn.f16x2 $0, $1, $2;" if FP16 else "mul.rn.bf16x2 $0, $1, $2;"
        magic = tl.inline_asm_elementwise(
            ASM, "=r,r,r", [both, (both & 0) + SHIFT], dtype=tl.int32, is_pure=True, pack=1
        )
        return _scaled(pair, both, magic, FP16)
    else:
        return pair[0] * scale, pair[1] * scale


@triton.jit
def _open(pair, dtype: tl.constexpr):
    """Both numbers of a pair as tensors."""
    if USE_ASM:
        a, b = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pair], dtype=(tl.int16, tl.int16), is_pure=True, pack=1
        )
        return a.to(dtype, bitcast=True), b.to(dtype, bitcast=True)
    else:
        return pair


@triton.jit
def _join(pairs, dtype: tl.constexpr):
    """Pairs, a power of two of them, as a tensor [4, rows, pairs, 2]."""
    level = ()
    for e in tl.static_range(len(pairs)):
        a, b = _open(pairs[e], dtype)
        level = level + (tl.join(a, b)[:, :, None, :],)
    return _joined(level)


@triton.jit
def _joined(level):
    N: tl.constexpr = len(level)
    if N == 1:
        return level[0]
    else:
        upper = ()
        for i in tl.static_range(N // 2):
            a, b = level[2 * i], level[2 * i + 1]  # [4, R, n, 2]
            both = tl.permute(tl.join(a, b), (0, 1, 4, 2, 3))
            upper = upper + (tl.reshape(both, [a.shape[0], a.shape[1], 2 * a.shape[2], a.shape[3]]),)
        return _joined(upper)


@triton.jit
def _load4(ptr, offs, ASM: tl.constexpr):
    if ASM and USE_ASM:
        at = (ptr.to(tl.pointer_type(tl.int32)) + offs * 4).to(tl.int64)
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [at],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        four = tl.arange(0, 4)[None, None, :]
        words = tl.load(ptr.to(tl.pointer_type(tl.int32)) + (offs[:, :, None] * 4 + four))
        even, odd = tl.split(tl.reshape(words, (words.shape[0], words.shape[1], 2, 2)))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        return w0, w1, w2, w3


@triton.jit
def _load2(ptr, offs, ASM: tl.constexpr):
    if ASM and USE_ASM:
        at = (ptr.to(tl.pointer_type(tl.int32)) + offs * 2).to(tl.int64)
        return tl.inline_asm_elementwise(
            "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [at], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        pair = tl.arange(0, 2)[None, None, :]
        return tl.split(tl.load(ptr.to(tl.pointer_type(tl.int32)) + (offs[:, :, None] * 2 + pair)))


@triton.jit
def _load1(ptr, offs, ASM: tl.constexpr):
    if ASM and USE_ASM:
        at = (ptr.to(tl.pointer_type(tl.int32)) + offs).to(tl.int64)
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.load(ptr.to(tl.pointer_type(tl.int32)) + offs)


@triton.jit
def _half(ptr, offs, ASM: tl.constexpr):
    if ASM and USE_ASM:
        at = (ptr.to(tl.pointer_type(tl.int16)) + offs).to(tl.int64)
        bits = tl.inline_asm_elementwise(
            "ld.global.nc.b16 $0, [$1];", "=h,l", [at], dtype=tl.int16, is_pure=True, pack=1
        )
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return tl.load(ptr.to(tl.pointer_type(tl.float16)) + offs).to(tl.float32)


@triton.jit
def _two_halves(both):
    low = both.to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _byte(word, AT: tl.constexpr):
    return (word >> (8 * AT)) & 255


@triton.jit
def _fetch(TYPE: tl.constexpr, p, nb, block, inner, t, ASM: tl.constexpr):
    """What decoding needs from memory: [4, R] words. `inner` is the part of the block, 0 if steps are blocks."""
    if TYPE == "Q4_K" or TYPE == "Q5_K":
        raw = _load4(p + nb * _plane(TYPE, "qs"), block * 8 + 2 * t, ASM) + _load4(
            p + nb * _plane(TYPE, "qs"), block * 8 + 2 * t + 1, ASM
        )
        s = p + nb * _plane(TYPE, "scales")
        same = block + t * 0
        raw = raw + (_load1(s, same * 3, ASM), _load1(s, same * 3 + 1, ASM), _load1(s, same * 3 + 2, ASM))
        raw = raw + (_load1(p + nb * _plane(TYPE, "dm"), same, ASM),)
        if TYPE == "Q5_K":
            raw = (
                raw
                + _load4(p + nb * _plane(TYPE, "qh"), same * 2, ASM)
                + _load4(p + nb * _plane(TYPE, "qh"), same * 2 + 1, ASM)
            )
    elif TYPE == "Q2_K":
        raw = _load4(p + nb * _plane(TYPE, "qs"), block * 4 + t, ASM)
        raw = raw + _load2(p + nb * _plane(TYPE, "scales"), block * 2 + (t >> 1), ASM)
        raw = raw + (_load1(p + nb * _plane(TYPE, "dm"), block + t * 0, ASM),)
    elif TYPE == "Q3_K":
        raw = _load4(p + nb * _plane(TYPE, "qs"), block * 4 + t, ASM) + _load4(
            p + nb * _plane(TYPE, "hmask"), block * 2 + (t & 1), ASM
        )
        s, same = p + nb * _plane(TYPE, "scales"), block + t * 0
        raw = raw + (
            _load1(s, same * 3, ASM),
            _load1(s, same * 3 + 1, ASM),
            _load1(s, same * 3 + 2, ASM),
            _half(p + nb * _plane(TYPE, "d"), same, ASM),
        )
    elif TYPE == "Q6_K":
        ql, first = p + nb * _plane(TYPE, "ql"), block * 8 + (t >> 1) * 4 + (t & 1)
        raw = (
            _load4(ql, first, ASM)
            + _load4(ql, first + 2, ASM)
            + _load4(p + nb * _plane(TYPE, "qh"), block * 4 + t, ASM)
        )
        raw = raw + _load2(p + nb * _plane(TYPE, "scales"), block * 2 + (t >> 1), ASM)
        raw = raw + (_half(p + nb * _plane(TYPE, "d"), block + t * 0, ASM),)
    elif TYPE == "Q8_0":
        raw = (
            _load4(p, block * 2, ASM) + _load4(p, block * 2 + 1, ASM) + (_half(p + nb * _plane(TYPE, "d"), block, ASM),)
        )
    elif TYPE == "IQ2_XXS":
        raw = _load4(p, block * 4 + t, ASM) + (_half(p + nb * _plane(TYPE, "d"), block + t * 0, ASM),)
    elif TYPE == "IQ3_XXS":
        raw = _load4(p, block * 4 + t, ASM) + _load2(p + nb * _plane(TYPE, "scales"), block * 4 + t, ASM)
        raw = raw + (_half(p + nb * _plane(TYPE, "d"), block + t * 0, ASM),)
    elif TYPE == "IQ1_S":
        raw = _load2(p, block * 4 + t, ASM) + (_load1(p + nb * _plane(TYPE, "qh"), block * 4 + t, ASM),)
        raw = raw + (_half(p + nb * _plane(TYPE, "d"), block + t * 0, ASM),)
    else:
        tl.static_assert(False, "unknown type")
    return raw


@triton.jit
def _decode(TYPE: tl.constexpr, raw, table_ptr, t, FP16: tl.constexpr):
    """Pairs of weights, in the order of `order`."""
    pairs = ()
    if TYPE == "Q4_K" or TYPE == "Q5_K":
        right = (t & 1) * 16
        a0, a1, a2 = raw[8] >> right, raw[9] >> right, raw[10] >> right
        sc = tl.where(t < 2, a0 & 0x3F3F, (a2 & 0x0F0F) | ((a0 >> 2) & 0x3030))
        mn = tl.where(t < 2, a1 & 0x3F3F, ((a2 >> 4) & 0x0F0F) | ((a1 >> 2) & 0x3030))
        d, dmin = _two_halves(raw[11])
        for s in tl.static_range(2):
            scale = _both(d * _byte(sc, s).to(tl.float32), FP16)
            minimum = _both(-dmin * _byte(mn, s).to(tl.float32), FP16)
            for i in tl.static_range(8):
                codes = (raw[i] >> (4 * s)) & 0x0F0F0F0F
                if TYPE == "Q5_K":
                    codes = codes | (((raw[12 + i] >> (2 * t + s)) & 0x01010101) << 4)
                for half in tl.static_range(2):
                    pair = _centered(_raw_pair(codes, half, FP16), 0.0, FP16)
                    pairs = pairs + (_scaled(pair, scale, minimum, FP16),)
    elif TYPE == "Q2_K":
        lower, upper = raw[4] >> (8 * (t & 1)), raw[5] >> (8 * (t & 1))
        d, dmin = _two_halves(raw[6])
        for s in tl.static_range(4):
            byte = _byte(lower if s < 2 else upper, 2 * (s % 2))
            scale = _both(d * (byte & 15).to(tl.float32) * (1.0 if s == 3 else 0.25**s), FP16)
            minimum = _both(-dmin * (byte >> 4).to(tl.float32), FP16)
            for i in tl.static_range(4):
                codes = (raw[i] >> 6) & 0x03030303 if s == 3 else raw[i] & (0x03030303 << (2 * s))
                for half in tl.static_range(2):
                    pair = _centered(_raw_pair(codes, half, FP16), 0.0, FP16)
                    pairs = pairs + (_scaled(pair, scale, minimum, FP16),)
    elif TYPE == "Q3_K":
        h, i8 = t >> 1, t & 1
        lower, upper = raw[8] >> (4 * h + 8 * i8), raw[9] >> (4 * h + 8 * i8)
        high = raw[10] >> (4 * h + 8 * i8)
        for s in tl.static_range(4):
            # sub = 8h + 2s + i: low nibble at byte (sub & 7) >> 4h; high crumb at byte (sub & 3), crumb sub >> 2
            low = _byte(lower if s < 2 else upper, 2 * (s % 2)) & 15
            up = (_byte(high, 2 * (s % 2)) >> (2 * (s // 2))) & 3
            scale = _both(raw[11] * ((low | (up << 4)) - 32).to(tl.float32), FP16)
            for i in tl.static_range(4):
                third = (raw[4 + i] >> (4 * h + s)) & 0x01010101
                codes = ((raw[i] >> (2 * s)) & 0x03030303) | (third << 2)
                for half in tl.static_range(2):
                    pairs = pairs + (_scaled(_centered(_raw_pair(codes, half, FP16), 4.0, FP16), scale, None, FP16),)
    elif TYPE == "Q6_K":
        lower, upper = raw[12] << (8 - 8 * (t & 1)), raw[13] << (8 - 8 * (t & 1))
        for s in tl.static_range(4):
            word = lower if s < 2 else upper
            sc = (word << 16) >> 24 if s % 2 == 0 else word >> 24
            scale = _both(raw[14] * sc.to(tl.float32), FP16)
            for i in tl.static_range(4):
                low = (raw[i + 4 * (s % 2)] >> (4 * (s // 2))) & 0x0F0F0F0F
                up = (raw[8 + i] >> (2 * s)) & 0x03030303 if s == 3 else raw[8 + i] & (0x03030303 << (2 * s))
                if s == 0:
                    up = up << 4
                elif s == 1:
                    up = up << 2
                elif s == 3:
                    up = up << 4
                codes = low | up
                for half in tl.static_range(2):
                    pairs = pairs + (_scaled(_centered(_raw_pair(codes, half, FP16), 32.0, FP16), scale, None, FP16),)
    elif TYPE == "Q8_0":
        scale = _both(raw[8], FP16)
        for i in tl.static_range(8):
            for half in tl.static_range(2):
                if USE_ASM:
                    low = _raw_pair(raw[i] & 0x7F7F7F7F, half, FP16)
                    sign = raw[i] & -0x7F7F7F80
                    if FP16:
                        taken = _raw_pair(sign, half, FP16)
                    else:
                        taken = _raw_pair(sign, half, FP16)
                    pair = _asm3("sub.rn.f16x2 $0, $1, $2;" if FP16 else "sub.rn.bf16x2 $0, $1, $2;", low, taken, taken)
                    # bf16: 0x4300 is 128 and 0x4380 is 256; fp16: 0x6400 is 1024 and 0x6480 is 1152
                else:
                    code = raw[i] ^ -0x7F7F7F80
                    pair = _centered(_raw_pair(code, half, FP16), 128.0, FP16)
                pairs = pairs + (_scaled(pair, scale, None, FP16),)
    elif TYPE == "IQ2_XXS" or TYPE == "IQ3_XXS":
        for g in tl.static_range(2):
            word = raw[2 * g + 1] if TYPE == "IQ2_XXS" else raw[4 + g]
            d = raw[4] if TYPE == "IQ2_XXS" else raw[6]
            scale = d * (((word >> 28) & 15).to(tl.float32) + 0.5) * (0.25 if TYPE == "IQ2_XXS" else 0.5)
            # The eighth sign of seven is their parity: here of all four fields of seven bits, at their first bits.
            two = word ^ (word >> 1)
            parity = two ^ (two >> 2) ^ (two >> 4) ^ (word >> 6)
            for u in tl.static_range(4):
                if TYPE == "IQ2_XXS":
                    first, second = _load2(table_ptr, _byte(raw[2 * g], u), True)
                else:
                    both = raw[2 * g + u // 2] >> (16 * (u % 2))
                    first, second = _load1(table_ptr, both & 255, True), _load1(table_ptr, (both >> 8) & 255, True)
                signs = ((word >> (7 * u)) & 127) | (((parity >> (7 * u)) & 1) << 7)
                for e in tl.static_range(4):
                    pair = _times(_raw_pair(first if e < 2 else second, e % 2, FP16), scale, FP16)
                    pairs = pairs + (_signed(pair, signs, e),)
    elif TYPE == "IQ1_S":
        for g in tl.static_range(2):
            word = (raw[2] >> (16 * g)) & 0xFFFF
            scale = _both(raw[3] * ((((word >> 12) & 7) * 2 + 1).to(tl.float32) * 0.125), FP16)
            offset = (7 + ((word >> 15) & 1) * 2).to(tl.float32)
            for u in tl.static_range(4):
                digits = _load1(table_ptr, _byte(raw[g], u) | (((word >> (3 * u)) & 7) << 8), True)
                for e in tl.static_range(4):
                    codes = (digits << 3) & 0x78787878 if e < 2 else (digits >> 1) & 0x78787878
                    pairs = pairs + (
                        _scaled(_centered(_raw_pair(codes, e % 2, FP16), offset, FP16), scale, None, FP16),
                    )
    return pairs


@triton.jit
def _signed(pair, signs, E: tl.constexpr):
    """Bits 2 E and 2 E + 1 of `signs` become signs of the pair."""
    if USE_ASM:
        return pair ^ ((signs * (0x40008000 >> (2 * E))) & -0x7FFF8000)
    else:
        a, b = 1 - ((signs >> (2 * E)) & 1) * 2, 1 - ((signs >> (2 * E + 1)) & 1) * 2
        return pair[0] * a.to(tl.float32), pair[1] * b.to(tl.float32)


@triton.jit(do_not_specialize=["num_blocks", "M", "num_tiles"])
def fragment_kernel(
    x_ptr, planes_ptr, table_ptr, order_ptr, tiles_ptr, y_ptr, num_blocks, N, K_padded, row_blocks, M, num_tiles,
    TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
    PREFETCH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    STEP: tl.constexpr = step_of(TYPE)
    FP16: tl.constexpr = x_ptr.dtype.element_ty == tl.float16
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    REPS: tl.constexpr = BN // (16 * WARPS)
    tile = tl.program_id(1)
    steps = K_padded // STEP
    share = tl.cdiv(steps, tl.num_programs(2))
    start = tl.program_id(2) * share
    stop = tl.minimum(start + share, steps)
    if tiles_ptr is None:
        expert, first, last = 0, tile * BM, M
    else:
        expert = tl.load(tiles_ptr + tile)
        if expert == -2:
            return
        first, last = tl.load(tiles_ptr + num_tiles + tile), tl.load(tiles_ptr + 2 * num_tiles + tile)
        stop = tl.where(expert < 0, start, stop)
        expert = tl.maximum(expert, 0)
    nb = num_blocks.to(tl.int64)
    q = tl.arange(0, BN)
    r, w, h, rep = q % 8, q // 8 % WARPS, q // (8 * WARPS) % 2, q // (16 * WARPS)
    row = expert * N + tl.minimum(tl.program_id(0) * BN + rep * (16 * WARPS) + w * 16 + h * 8 + r, N - 1)
    t = tl.arange(0, 4)
    row, t = (row[:, None], t[None, :]) if ASM else (row[None, :], t[:, None])
    m = first + tl.arange(0, BM)
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * K_padded + tl.arange(0, STEP)[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    if PREFETCH:
        block, inner = _place(TYPE, row, row_blocks, tl.minimum(start, steps - 1), t)
        raw = _fetch(TYPE, planes_ptr, nb, block, inner, t, ASM)
        for step in tl.range(start, stop, num_stages=STAGES):
            block, inner = _place(TYPE, row, row_blocks, tl.minimum(step + 1, steps - 1), t)
            following = _fetch(TYPE, planes_ptr, nb, block, inner, t, ASM)
            x = tl.load(x_ptrs + step * STEP)
            acc = _multiply(TYPE, raw, table_ptr, t, x, acc, BN, WARPS, REPS, STEP, FP16, dtype, ASM)
            raw = following
    else:
        for step in tl.range(start, stop, num_stages=STAGES):
            block, inner = _place(TYPE, row, row_blocks, step, t)
            raw = _fetch(TYPE, planes_ptr, nb, block, inner, t, ASM)
            x = tl.load(x_ptrs + step * STEP)
            acc = _multiply(TYPE, raw, table_ptr, t, x, acc, BN, WARPS, REPS, STEP, FP16, dtype, ASM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if order_ptr is None:
        pair = m.to(tl.int64)
    else:
        pair = tl.load(order_ptr + m, mask=m < last, other=0)
    y_ptrs = y_ptr + (tl.program_id(2) * M.to(tl.int64) + pair)[None, :] * N + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(m < last)[None, :] & (n < N)[:, None])


@triton.jit
def _place(TYPE: tl.constexpr, row, row_blocks, step, t):
    if TYPE == "Q8_0":
        return (row * row_blocks + tl.minimum(step * 4 + t, row_blocks - 1)).to(tl.int64), 0
    elif step_of(TYPE) == 128:
        return (row * row_blocks + step // 2).to(tl.int64), step % 2
    else:
        return (row * row_blocks + step).to(tl.int64), 0


@triton.jit
def _multiply(
    TYPE: tl.constexpr, raw, table_ptr, t, x, acc, BN: tl.constexpr, WARPS: tl.constexpr, REPS: tl.constexpr,
    STEP: tl.constexpr, FP16: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    w = _join(_decode(TYPE, raw, table_ptr, t, FP16), dtype)  # [4, BN, STEP / 8, 2]
    if ASM:
        w = tl.permute(tl.reshape(w, [REPS, 2, WARPS, 8, 4, STEP // 8, 2]), (0, 2, 1, 3, 5, 4, 6))
    else:
        w = tl.permute(tl.reshape(w, [4, REPS, 2, WARPS, 8, STEP // 8, 2]), (1, 3, 2, 4, 5, 0, 6))
    return tl.dot(tl.reshape(w, [BN, STEP]), x, acc, input_precision="ieee")


def linear(x, weight, type_name, *, bm=16, bn=64, warps=4, stages=3, split=1, prefetch=True, asm=True, maxnreg=None):
    from dynquant.kernels.triton.gemv import add_splits

    stored = QUANT_TYPES[type_name]
    arranged = arrange(x, type_name, triton.cdiv(len(x), bm) * bm)
    n, m = len(weight), len(x)
    y = x.new_empty(m, n)
    target = y if split == 1 else y.new_empty(split, m, n, dtype=torch.float32)
    extra = {"maxnreg": maxnreg} if maxnreg else {}
    fragment_kernel[(triton.cdiv(n, bn), len(arranged) // bm, split)](
        arranged, weight, table(type_name, weight.device), None, None, target, weight.numel() // stored.block_bytes, n,
        arranged.shape[1], weight.shape[-1] // stored.block_bytes, m, 0, TYPE=type_name, BM=bm, BN=bn, WARPS=warps,
        STAGES=stages, PREFETCH=prefetch, ASM=asm, num_warps=warps, **extra,
    )  # fmt: skip
    if split > 1:
        add_splits(target, y, pdl=False)
    return y


def experts(x, weight, ids, type_name, *, bm=16, bn=64, warps=4, stages=3, prefetch=True, asm=True, maxnreg=None):
    from dynquant.kernels.triton.grouped import sorted_tiles

    stored = QUANT_TYPES[type_name]
    places, tiles = sorted_tiles(ids, len(weight), bm)
    n, pairs = weight.shape[1], ids.numel()
    arranged = arrange(
        x.reshape(-1, x.shape[-1]), type_name, pairs + bm, places, ids.shape[1] if x.dim() == 2 else 1, pairs
    )
    y = x.new_empty(*ids.shape, n)
    extra = {"maxnreg": maxnreg} if maxnreg else {}
    fragment_kernel[(triton.cdiv(n, bn), tiles.shape[1], 1)](
        arranged, weight, table(type_name, weight.device), places, tiles, y, weight.numel() // stored.block_bytes, n,
        arranged.shape[1], weight.shape[-1] // stored.block_bytes, pairs, tiles.shape[1], TYPE=type_name, BM=bm, BN=bn,
        WARPS=warps, STAGES=stages, PREFETCH=prefetch, ASM=asm, num_warps=warps, **extra,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["num_blocks", "first_row", "num_rows"])
def fragment_dequantize_kernel(
    planes_ptr, table_ptr, out_ptr, num_blocks, first_row, num_rows, K, row_blocks,
    TYPE: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    STEP: tl.constexpr = step_of(TYPE)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    FP16: tl.constexpr = dtype == tl.float16
    nb = num_blocks.to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = (first_row + tl.minimum(n, num_rows - 1))[:, None]
    t = tl.arange(0, 4)[None, :]
    step = tl.program_id(0)
    block, inner = _place(TYPE, row, row_blocks, step, t)
    raw = _fetch(TYPE, planes_ptr, nb, block, inner, t, ASM)
    pairs = _decode(TYPE, raw, table_ptr, t, FP16)
    out_ptrs = out_ptr + n.to(tl.int64)[:, None] * K + (step * STEP + t * 8)
    inside = (n < num_rows)[:, None] & (t >= 0)
    for c in tl.static_range(len(pairs) // 4):
        if USE_ASM:
            tl.inline_asm_elementwise(
                "{ .reg .pred %p; setp.ne.b32 %p, $6, 0; @%p st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }",
                "=r,l,r,r,r,r,r",
                [(out_ptrs + c * 32).to(tl.int64), pairs[4 * c], pairs[4 * c + 1], pairs[4 * c + 2], pairs[4 * c + 3],
                 inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        else:
            for e in tl.static_range(4):
                tl.store(out_ptrs + c * 32 + 2 * e, pairs[4 * c + e][0], mask=inside)
                tl.store(out_ptrs + c * 32 + 2 * e + 1, pairs[4 * c + e][1], mask=inside)


def fragment_dequantize(weight, type_name, out, *, first_row=0, bn=32, warps=4, asm=True):
    stored = QUANT_TYPES[type_name]
    step = 256 if type_name in CRUMBS + PAIRS else 128
    k = out.shape[1]
    fragment_dequantize_kernel[(triton.cdiv(k, step), triton.cdiv(len(out), bn))](
        weight, table(type_name, weight.device), out, weight.numel() // stored.block_bytes, first_row, len(out), k,
        weight.shape[-1] // stored.block_bytes, TYPE=type_name, BN=bn, ASM=asm, num_warps=warps,
    )  # fmt: skip
    return out
