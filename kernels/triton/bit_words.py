"""Arithmetic on 32-bit words of four bytes: what the GEMV of every quant type is made of.

A tile is [T, BN]: BN weight rows, T chunks along K, one element per thread and chunk. Activations are the words that
`activations` writes: [M, P, 8, K / 128, 4] int32, where unit u (16 weights) lies at plane u % 8 and column u // 8, so
that neighbouring threads read neighbouring 16 bytes. P is 1 (int8) or 2 (16-bit fixed point, high and low byte).
Inline PTX is replaced by plain arithmetic under the interpreter.

Words of this folder: a *word* is 32 bits, four *bytes*; a *nibble* is 4 bits and a *crumb* 2 bits of a byte, counted
from the lowest; a *digit* is one of the five values 0 to 2 that a byte of TQ1_0 holds in base 3; a *unit* is 16
weights, and a *chunk* what one thread multiplies at a time.
"""

# ruff: noqa: RUF005  (Triton has no `(*tuple, item)`)
from typing import NamedTuple

import triton
import triton.language as tl

USE_ASM = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def dp4a(codes, x, acc, SIGNED: tl.constexpr):
    """acc + the dot product of four bytes of `codes` and four signed bytes of `x`."""
    if USE_ASM:
        ASM: tl.constexpr = "dp4a.s32.s32 $0, $1, $2, $3;" if SIGNED else "dp4a.u32.s32 $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [codes, x, acc], dtype=tl.int32, is_pure=True, pack=1)
    shifts = 24 - (tl.arange(0, 4) * 8)[None, None, :]
    code_bytes = (codes[:, :, None] << shifts) >> 24
    return acc + tl.sum((code_bytes if SIGNED else code_bytes & 255) * ((x[:, :, None] << shifts) >> 24), axis=2)


@triton.jit
def prmt(a, b, selector):
    """PTX `prmt`: result byte i is byte (nibble i of `selector`) & 7 of a, b; nibble bit 3 spreads its sign bit."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )
    both = (a.to(tl.int64) & 0xFFFFFFFF) | (b.to(tl.int64) << 32)
    result = (both & 0).to(tl.int32)
    for i in tl.static_range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = ((both >> (8 * (nibble & 7)).to(tl.int64)) & 255).to(tl.int32)
        byte = tl.where(nibble >= 8, (byte >> 7) * 255, byte)
        result = result | (byte << (8 * i))
    return result


class Weights(NamedTuple):
    """Planar weights as a program sees them."""

    ptr: tl.tensor
    blocks: tl.tensor  # blocks of the whole tensor, int64
    first: tl.tensor  # the block with which the program's rows begin, int64
    starts: tuple  # bytes at which the planes of one block would begin, in the order of the fields in a block


class Inputs(NamedTuple):
    """Activations as a program sees them: M rows, each of P planes of K bytes."""

    q: tl.tensor
    d: tl.tensor
    valid: tl.tensor  # False for chunks beyond the end of a row, which count as activations of zero
    K: tl.constexpr
    M: tl.constexpr
    P: tl.constexpr


@triton.jit
def plane(w, FIELD: tl.constexpr, BYTES: tl.constexpr, dtype: tl.constexpr):
    """Pointer to one field (`BYTES` per block) of the first block."""
    return (w.ptr + (w.blocks * w.starts[FIELD] + w.first * BYTES)).to(tl.pointer_type(dtype))


@triton.jit
def half(w, FIELD: tl.constexpr, BYTES: tl.constexpr, offs):
    """The fp16 number of a field as float32."""
    return tl.load(plane(w, FIELD, BYTES, tl.float16) + offs).to(tl.float32)


@triton.jit
def load2(ptr, offs):
    """Two consecutive words at `offs` * 2: a pair of tiles."""
    pair = tl.arange(0, 2)[None, None, :]
    return tl.split(tl.load(ptr + (offs[:, :, None] * 2 + pair)))


@triton.jit
def load4(ptr, offs):
    """Four consecutive words at `offs` * 4: one 16-byte load, four tiles."""
    four = tl.arange(0, 4)[None, None, :]
    return split4(tl.load(ptr + (offs[:, :, None] * 4 + four)))


@triton.jit
def split4(words):
    """The four tiles of words [T, BN, 4]."""
    even, odd = tl.split(tl.reshape(words, (words.shape[0], words.shape[1], 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def load_x(x, unit, C: tl.constexpr):
    """The four words of unit [T, 1] of activation plane C = m * P + p."""
    return load4(x.q, C * (x.K // 16) + (unit % 8) * (x.K // 128) + unit // 8)


@triton.jit
def sum_words(words):
    """Sum of the sixteen signed bytes of four words."""
    total = words[0] & 0
    for i in tl.static_range(4):
        total = dp4a(words[i], total * 0 + 0x01010101, total, True)  # times ones
    return total


@triton.jit
def unit_dots(
    x, unit, words, OFFSET: tl.constexpr, SIGNED: tl.constexpr, before=None, TRANSPOSED: tl.constexpr = False
):
    """Dot products of a unit with every activation plane, and sums of activations: two tuples of M * P tiles.

    Codes are shifted by -OFFSET. What another unit of the same group gave is added if it is there as `before`.
    With TRANSPOSED, word s has the codes of the weights s, 4 + s, 8 + s and 12 + s.
    """
    dots = ()
    sums = ()
    for c in tl.static_range(x.M * x.P):
        x_words = load_x(x, unit, c)
        total = sum_words(x_words)
        if TRANSPOSED:
            x_words = transposed(x_words)
        acc = (words[0] & 0 if before is None else before[0][c]) - total * OFFSET
        for i in tl.static_range(4):
            acc = dp4a(words[i], x_words[i], acc, SIGNED)
        dots = dots + (acc,)
        sums = sums + (total if before is None else before[1][c] + total,)
    return dots, sums


@triton.jit
def add_scaled(parts, dots, scale, x, group, FACTOR: tl.constexpr):
    """parts[m] + dot[m] * scale * xd[m, group] * FACTOR; high and low bytes of 16-bit activations meet here."""
    result = ()
    for m in tl.static_range(x.M):
        dot = dots[m] if x.P == 1 else dots[2 * m] * 256 + dots[2 * m + 1]
        xd = tl.load(x.d + (m * (x.K // 32) + group), mask=x.valid, other=0.0) * FACTOR
        result = result + (parts[m] + dot.to(tl.float32) * (scale * xd),)
    return result


@triton.jit
def add_sums(parts, sums, scale, x, group):
    """`add_scaled` for sums of activations [T, 1]: multiplied by their scale first, once for all rows."""
    result = ()
    for m in tl.static_range(x.M):
        total = sums[m] if x.P == 1 else sums[2 * m] * 256 + sums[2 * m + 1]
        xd = tl.load(x.d + (m * (x.K // 32) + group), mask=x.valid, other=0.0)
        result = result + (parts[m] + (total.to(tl.float32) * xd) * scale,)
    return result


@triton.jit
def zeros(tile, M: tl.constexpr):
    """M tiles of float32 zeros, shaped like the integer `tile`."""
    result = ()
    for _ in tl.static_range(M):
        result = result + ((tile & 0).to(tl.float32),)
    return result


@triton.jit
def times(parts, factor):
    """Every tile multiplied by `factor`."""
    return [part * factor for part in parts]


@triton.jit
def minus_times(parts, others, factor):
    """parts - factor * others."""
    result = ()
    for m in tl.static_range(len(parts)):
        result = result + (parts[m] - factor * others[m],)
    return result


@triton.jit
def table16(packed, t0, t1, t2, t3):
    """Values of low and of high nibbles: words of four 8-bit table entries, from sixteen entries in four words."""
    low_bits = packed & 0x77777777  # one of eight entries; the fourth bit is that of a half of the table
    upper = ((packed >> 1) & 0x44444444) | 0x32103210
    a = prmt(prmt(t0, t1, low_bits), prmt(t2, t3, low_bits), upper)
    low_bits = low_bits >> 16
    b = prmt(prmt(t0, t1, low_bits), prmt(t2, t3, low_bits), upper >> 16)
    return prmt(a, b, low_bits * 0 + 0x6420), prmt(a, b, low_bits * 0 + 0x7531)  # even bytes, odd bytes


@triton.jit
def crumbs_of(byte):
    """The four crumbs of a byte as the bytes of a word."""
    nibbles = (byte | (byte << 12)) & 0x000F000F
    return (nibbles | (nibbles << 6)) & 0x03030303


@triton.jit
def signs_of(nibble):
    """Bit i of a nibble as byte i of a word: 2 where it is set, else 0."""
    return (nibble * 0x00408102) & 0x02020202


@triton.jit
def transposed(words):
    """Four words of which number s has byte s of each of the four."""
    zero = words[0] & 0
    a, b = prmt(words[0], words[1], zero + 0x5140), prmt(words[2], words[3], zero + 0x5140)
    c, d = prmt(words[0], words[1], zero + 0x7362), prmt(words[2], words[3], zero + 0x7362)
    front, back = zero + 0x5410, zero + 0x7632
    return prmt(a, b, front), prmt(a, b, back), prmt(c, d, front), prmt(c, d, back)


@triton.jit
def and4(words, MASK: tl.constexpr):
    """Four words, masked."""
    return [word & MASK for word in words]


@triton.jit
def or4(a, b):
    """Four words of `a` or those of `b`."""
    return a[0] | b[0], a[1] | b[1], a[2] | b[2], a[3] | b[3]


@triton.jit
def move4(words, BITS: tl.constexpr):
    """Four words shifted left by BITS, or right if BITS is negative; bits that cross bytes are for a mask to remove."""
    return [word << BITS if BITS > 0 else word >> -BITS for word in words]


@triton.jit
def in_place(words, S: tl.constexpr):
    """Crumb S of every byte, left where it is: 4^S times the code."""
    return and4(words, -0x3F3F3F40 if S == 3 else 0x03030303 << (2 * S))
