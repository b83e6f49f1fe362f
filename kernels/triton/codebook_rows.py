"""`gemv` of codebook types: IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S.

What limits them is not memory but instructions, and gathers that meet in a bank. A lane takes 64 weights (a *chunk*) of
BN rows of W at a time, one row after another, with addresses that differ by constants. Grid and signs lie in shared
memory as copies side by side, one for every lane or few of them (`_LAYOUTS`), which every program writes while it waits
for the activations. Words of the tables are made for what follows the gather:

    IQ1   ternary + 1 in nibbles, the first four weights low; high nibbles are multiplied in place, 16 times too large
    IQ2   a nibble chooses 8, 25 or 43; signs, eight of them in a word, add 4 to a nibble; `prmt` makes signed bytes
    IQ3   bytes; signs choose between a byte and its mirror image: 64 + m or 64 - m (XXS), 8 + c or 7 - c with
          m = 2 c + 1 (S); what is too much comes off by way of sums of activations
"""

# ruff: noqa: RUF005  (Triton has no `(*tuple, item)`)
import functools
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from dynquant.formats import tables
from dynquant.kernels.triton.bit_words import USE_ASM, Inputs, dp4a, load2, load4, plane, prmt, split4, sum_words
from dynquant.kernels.triton.unpack import table

_LAYOUTS = {
    "IQ1_S": (2048, 2, 0, 0),
    "IQ1_M": (2048, 2, 0, 0),
    "IQ2_XXS": (256, 7, 128, 7),
    "IQ2_XS": (512, 6, 128, 7),
    "IQ2_S": (1024, 5, 256, 6),
    "IQ3_XXS": (256, 7, 128, 7),
    "IQ3_S": (512, 6, 256, 6),
}
"""Entries of the grid, log2 of the bytes of a row of its copies, and the same of the signs: 48 KB at most."""


class Codebook(NamedTuple):
    """Grid and signs as a lane sees them: addresses of its copies in shared memory, or indices from `ptr` on."""

    ptr: tl.tensor
    grid: tl.tensor
    sign: tl.tensor
    magnitudes: tl.tensor


@triton.constexpr_function
def _entries(type_name):
    return _LAYOUTS[type_name][0]


@triton.constexpr_function
def _grid_shift(type_name):
    return _LAYOUTS[type_name][1] if USE_ASM.value else 0


@triton.constexpr_function
def _signs(type_name):
    return _LAYOUTS[type_name][2]


@triton.constexpr_function
def _sign_shift(type_name):
    return _LAYOUTS[type_name][3] if USE_ASM.value else 0


@triton.constexpr_function
def _sign_words(type_name):
    return 2 if type_name == "IQ3_XXS" else 1


@triton.constexpr_function
def _declared(type_name):
    entries, shift, signs, sign_shift = _LAYOUTS[type_name]
    num_bytes = (entries << shift) + (signs << sign_shift)
    return f".shared .align 128 .b8 codebook[{num_bytes}]; mov.u32 $0, codebook;"


@triton.jit
def _copy(ptr, address, ENTRIES: tl.constexpr, WORDS: tl.constexpr, SHIFT: tl.constexpr):
    """Write every entry of WORDS words to all of its 1 << SHIFT bytes of shared memory, 16 bytes a time."""
    QUARTERS: tl.constexpr = max((1 << SHIFT) // 16, 1)
    if SHIFT == 2:
        i = tl.arange(0, ENTRIES // 4)[:, None]
        a, b, c, d = load4(ptr, i)
    else:
        i = tl.arange(0, ENTRIES * QUARTERS)
        a = tl.load(ptr + i // QUARTERS * WORDS)
        b = a if WORDS == 1 else tl.load(ptr + (i // QUARTERS * 2 + 1))
        c, d = a, b
    ASM: tl.constexpr = "st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(ASM, "=r,r,r,r,r,r", [address + i * 16, a, b, c, d], tl.int32, is_pure=False, pack=1)


@triton.jit
def shared_codebook(ptr, TYPE: tl.constexpr):
    """Fill shared memory. The interpreter has none: there, addresses are indices of words from `ptr` on."""
    lane = tl.arange(0, 32)[:, None]
    GRID: tl.constexpr = _grid_shift(TYPE)
    SIGN: tl.constexpr = _sign_shift(TYPE)
    if USE_ASM:
        start = tl.inline_asm_elementwise(_declared(TYPE), "=r", [], tl.int32, is_pure=False, pack=1)
        _copy(ptr, start, _entries(TYPE), 1, GRID)
        if _signs(TYPE) > 0:
            _copy(ptr + _entries(TYPE), start + (_entries(TYPE) << GRID), _signs(TYPE), _sign_words(TYPE), SIGN)
        # Addresses depend on the barrier, so that no compiler moves a load before it.
        zero = tl.inline_asm_elementwise("bar.sync 0; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)
        grid = lane * 4 % (1 << GRID) + zero
        sign = lane * (4 * _sign_words(TYPE)) % (1 << SIGN) + (zero + (_entries(TYPE) << GRID))
    else:
        grid, sign = lane * 0, lane * 0 + _entries(TYPE) // _sign_words(TYPE)
    return Codebook(ptr, grid, sign, tl.load(ptr + (_entries(TYPE) + _signs(TYPE) * _sign_words(TYPE))))


@triton.jit
def _field(word, AT: tl.constexpr, BITS: tl.constexpr, TO: tl.constexpr, others):
    """Bits AT to AT + BITS of a word, moved to bit TO, or'd with `others`; one instruction beside the shift."""
    MASK: tl.constexpr = ((1 << BITS) - 1) << TO
    word = word >> (AT - TO) if AT > TO else word << (TO - AT)
    if USE_ASM:
        ASM: tl.constexpr = "lop3.b32 $0, $1, $2, $3, 0xEA;"
        return tl.inline_asm_elementwise(
            ASM, "=r,r,r,r", [word, word * 0 + MASK, others], tl.int32, is_pure=True, pack=1
        )
    return (word & MASK) | others


@triton.jit
def _looked_up(t, row):
    """The word at an address of `t.grid` or `t.sign`."""
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "ld.shared.b32 $0, codebook[$1];", "=r,r", [row], tl.int32, is_pure=True, pack=1
        )
    return tl.load(t.ptr + row)


@triton.jit
def _pair_looked_up(t, row):
    if USE_ASM:
        return tl.inline_asm_elementwise(
            "ld.shared.v2.b32 {$0, $1}, codebook[$2];", "=r,=r,r", [row], (tl.int32, tl.int32), is_pure=True, pack=1
        )
    return load2(t.ptr, row)


@triton.jit
def _dp2a(pairs, two, acc):
    """acc + the dot product of two signed 16-bit numbers and the two low bytes of `two`."""
    if USE_ASM:
        ASM: tl.constexpr = "dp2a.lo.s32.u32 $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [pairs, two, acc], tl.int32, is_pure=True, pack=1)
    return acc + ((pairs << 16) >> 16) * (two & 255) + (pairs >> 16) * ((two >> 8) & 255)


@triton.jit
def _counted(word, AT: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr):
    """FIRST + STEP * (bits AT to AT + BITS), which the mantissa of a float takes as they are."""
    TO: tl.constexpr = 23 - BITS
    word = word >> (AT - TO) if AT > TO else word << (TO - AT)
    MASK: tl.constexpr = ((1 << BITS) - 1) << TO
    SPAN: tl.constexpr = STEP * (1 << BITS)
    return ((word & MASK) | 0x3F800000).to(tl.float32, bitcast=True) * SPAN + (FIRST - SPAN)


@triton.jit
def _load2(pointers):
    """Two consecutive words at a tile of pointers."""
    return tl.split(tl.load(pointers[:, :, None] + tl.arange(0, 2)[None, None, :]))


@triton.jit
def _load4(pointers):
    """Four consecutive words at a tile of pointers."""
    return split4(tl.load(pointers[:, :, None] + tl.arange(0, 4)[None, None, :]))


@triton.jit
def _fields(w, at, ON: tl.constexpr, TYPE: tl.constexpr):
    """Words of the 64 weights of chunk `at` + ON, of which ON is whole blocks; the scale of the block is last.

    ON is added to pointers, so that the rows of a lane share an address and differ by what the instruction adds to it.
    """
    block = at // 4
    if TYPE == "IQ1_M":
        q0, q1 = _load2(plane(w, 0, 32, tl.int32) + at * 2 + ON * 2)
        qh = tl.load(plane(w, 1, 16, tl.int32) + at + ON)
        lower, upper = _load2(plane(w, 2, 8, tl.int32) + block * 2 + ON // 2)
        bits = ((lower >> 12) & 15) | ((lower >> 24) & 0xF0) | ((upper >> 4) & 0xF00) | ((upper >> 16) & 0xF000)
        scales = tl.where(at % 4 >= 2, upper, lower) >> (at % 2 * 16)
        result = q0, q1, qh, scales, bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        d = tl.load(plane(w, 0, 2, tl.float16) + block + ON // 4).to(tl.float32)
        if TYPE == "IQ1_S":
            q0, q1 = _load2(plane(w, 1, 32, tl.int32) + at * 2 + ON * 2)
            result = q0, q1, tl.load(plane(w, 2, 16, tl.int32) + at + ON), d
        elif TYPE == "IQ2_S":
            q0, q1 = _load2(plane(w, 1, 32, tl.int32) + at * 2 + ON * 2)
            s0, s1 = _load2(plane(w, 2, 32, tl.int32) + at * 2 + ON * 2)
            qh = tl.load(plane(w, 3, 8, tl.uint16) + at + ON).to(tl.int32)
            result = q0, q1, s0, s1, qh, tl.load(plane(w, 4, 8, tl.uint16) + at + ON).to(tl.int32), d
        else:
            q0, q1, q2, q3 = _load4(plane(w, 1, 64, tl.int32) + at * 4 + ON * 4)
            if TYPE == "IQ2_XXS":
                result = q0, q2, q1, q3, d
            elif TYPE == "IQ2_XS":
                result = q0, q1, q2, q3, tl.load(plane(w, 2, 8, tl.uint16) + at + ON).to(tl.int32), d
            elif TYPE == "IQ3_XXS":
                s0, s1 = _load2(plane(w, 2, 32, tl.int32) + at * 2 + ON * 2)
                result = q0, q1, q2, q3, s0, s1, d
            else:
                qh = tl.load(plane(w, 2, 8, tl.uint16) + at + ON).to(tl.int32)
                s0, s1 = _load2(plane(w, 3, 32, tl.int32) + at * 2 + ON * 2)
                result = q0, q1, q2, q3, s0, s1, qh, tl.load(plane(w, 4, 4, tl.uint8) + at + ON).to(tl.int32), d
    return result


@triton.jit
def _entry(t, byte_source, BYTE: tl.constexpr, high_source, HIGH: tl.constexpr, TYPE: tl.constexpr):
    """The word of the grid whose index is a byte of a word, and above it a byte of another with zeros in its top."""
    zero = byte_source & 0
    select = zero + (0xCC00 | ((4 + HIGH) << 4) | BYTE)
    index = prmt(byte_source, high_source, select)
    if USE_ASM:
        ASM: tl.constexpr = "mad.lo.s32 $0, $1, $2, $3;"
        scale = zero + (1 << _grid_shift(TYPE))
        row = tl.inline_asm_elementwise(ASM, "=r,r,r,r", [index, scale, t.grid], tl.int32, is_pure=True, pack=1)
    else:
        row = index
    return _looked_up(t, row)


@triton.jit
def _ternary(f, UNIT: tl.constexpr, t, TYPE: tl.constexpr):
    """A unit of IQ1: codes of four weights a word, those of the odd words 16 times too large."""
    qh = f[2]
    words = ()
    for j in tl.static_range(2):
        if TYPE == "IQ1_S":
            six = qh if UNIT < 2 else qh >> 16
            six = (six & 0x3F) | ((six << 10) & 0x3F0000)
            word = _entry(t, f[UNIT // 2], UNIT % 2 * 2 + j, (six | (six << 5)) & 0x07070707, UNIT % 2 * 2 + j, TYPE)
        else:
            word = _entry(t, f[UNIT // 2], UNIT % 2 * 2 + j, (qh if j == 0 else qh >> 4) & 0x07070707, UNIT, TYPE)
        words = words + (word & 0x0F0F0F0F, word & -0x0F0F0F10)
    return words


@triton.jit
def _signed(f, UNIT: tl.constexpr, t, TYPE: tl.constexpr):
    """A unit of IQ2: signed bytes, four to a word."""
    words = ()
    GRID: tl.constexpr = _grid_shift(TYPE)
    SIGN: tl.constexpr = _sign_shift(TYPE)
    for j in tl.static_range(2):
        if TYPE == "IQ2_XS":
            code = _looked_up(t, _field(f[UNIT], 16 * j, 9, GRID, t.grid))
            code ^= _looked_up(t, _field(f[UNIT], 16 * j + 9, 7, SIGN, t.sign))
        elif TYPE == "IQ2_XXS":
            code = _looked_up(t, _field(f[UNIT // 2], 8 * (UNIT % 2 * 2 + j), 8, GRID, t.grid))
            code ^= _looked_up(t, _field(f[2 + UNIT // 2], 7 * (UNIT % 2 * 2 + j), 7, SIGN, t.sign))
        else:
            crumbs = f[4] if UNIT < 2 else f[4] >> 8
            crumbs = (crumbs | (crumbs << 12)) & 0x000F000F
            crumbs = (crumbs | (crumbs << 6)) & 0x03030303
            code = _entry(t, f[UNIT // 2], UNIT % 2 * 2 + j, crumbs, UNIT % 2 * 2 + j, TYPE)
            code ^= _looked_up(t, _field(f[2 + UNIT // 2], 8 * (UNIT % 2 * 2 + j), 8, SIGN, t.sign))
        low, high = (code & 0) + t.magnitudes, (code & 0) + 0x00D5E7F8
        words = words + (prmt(low, high, code), prmt(low, high, code >> 16))
    return words


@triton.jit
def _mirrored(f, UNIT: tl.constexpr, t, TYPE: tl.constexpr):
    """A unit of IQ3: bytes, four to a word."""
    words = ()
    SIGN: tl.constexpr = _sign_shift(TYPE)
    for j in tl.static_range(2):
        if TYPE == "IQ3_XXS":
            masks = _pair_looked_up(t, _field(f[4 + UNIT // 2], 7 * (UNIT % 2 * 2 + j), 7, SIGN, t.sign))
        else:
            both = _looked_up(t, _field(f[4 + UNIT // 2], 8 * (UNIT % 2 * 2 + j), 8, SIGN, t.sign))
            ones = (((f[6] >> (4 * UNIT)) & 15) * 0x00204081) & 0x01010101  # a bit to each byte
        for k in tl.static_range(2):
            if TYPE == "IQ3_XXS":
                word = _looked_up(t, _field(f[UNIT], 8 * (2 * j + k), 8, _grid_shift(TYPE), t.grid))
                word = (word & ~masks[k]) | ((-0x7F7F7F80 - word) & masks[k])
            else:
                word = _entry(t, f[UNIT], 2 * j + k, ones, 2 * j + k, TYPE)
                word ^= (both if k == 0 else both >> 4) & 0x0F0F0F0F
            words = words + (word,)
    return words


@triton.jit
def _scale(f, UNIT: tl.constexpr, TYPE: tl.constexpr):
    """The scale of a unit, or of the two of which it is the last, without that of the block."""
    if TYPE == "IQ1_S":
        scale = _counted(f[2], 12 + UNIT // 2 * 16, 3, 2, 1)
    elif TYPE == "IQ1_M":
        scale = _counted(f[3], 3 * UNIT, 3, 2, 1)
    elif TYPE == "IQ3_S":
        scale = _counted(f[7], UNIT // 2 * 4, 4, 2, 1)
    elif TYPE == "IQ2_XXS" or TYPE == "IQ3_XXS":
        scale = _counted(f[(2 if TYPE == "IQ2_XXS" else 4) + UNIT // 2], 28, 4, 1, 0.5)
    else:
        scale = _counted(f[4 if TYPE == "IQ2_XS" else 5], 4 * UNIT, 4, 1, 0.5)
    return scale


@triton.jit
def _joined(parts, M: tl.constexpr, P: tl.constexpr):
    """Integers of every plane -> of every row: high and low bytes of 16-bit activations meet here."""
    result = ()
    for m in tl.static_range(M):
        result = result + (parts[m] if P == 1 else parts[2 * m] * 256 + parts[2 * m + 1],)
    return result


@triton.jit
def _shift_parts(qh, xw, UNIT: tl.constexpr, C: tl.constexpr):
    """IQ1_M: 32 times what shifts of +1/8 or -1/8 and the one too much of every code add to the products of a unit."""
    e8, o8 = qh & 0x08080808, (qh >> 4) & 0x08080808
    zero = qh & 0
    bits = prmt(e8, o8, zero + (UNIT | ((4 + UNIT) << 4)))
    result = ()
    for c in tl.static_range(C):
        minus = xw[4 * c] & 0
        a = dp4a(xw[4 * c + 1], minus - 1, dp4a(xw[4 * c], minus - 1, minus, True), True)
        b = dp4a(xw[4 * c + 3], minus - 1, dp4a(xw[4 * c + 2], minus - 1, minus, True), True)
        result = result + (_dp2a(prmt(a, b, minus + 0x5410), bits, (a + b) * 28),)
    return result


@triton.jit
def _accumulated(dots, words, xw, C: tl.constexpr, D: tl.constexpr, SIGNED: tl.constexpr):
    """Dot products of four words with every plane, added to C * D sums; with D = 2, odd words have their own."""
    result = ()
    for c in tl.static_range(C):
        if D == 1:
            a = dp4a(words[1], xw[4 * c + 1], dp4a(words[0], xw[4 * c], dots[c], SIGNED), SIGNED)
            result = result + (dp4a(words[3], xw[4 * c + 3], dp4a(words[2], xw[4 * c + 2], a, SIGNED), SIGNED),)
        else:
            a = dp4a(words[2], xw[4 * c + 2], dp4a(words[0], xw[4 * c], dots[2 * c], SIGNED), SIGNED)
            b = dp4a(words[3], xw[4 * c + 3], dp4a(words[1], xw[4 * c + 1], dots[2 * c + 1], SIGNED), SIGNED)
            result = result + (a, b)
    return result


@triton.jit
def _values(dots, f, xw, factors, sums, UNIT: tl.constexpr, M: tl.constexpr, P: tl.constexpr, TYPE: tl.constexpr):
    """Sums of integers -> products with the activations of M rows, but for the scale of the weights."""
    result = ()
    if TYPE == "IQ1_S" or TYPE == "IQ1_M":
        low, high = (), ()
        for c in tl.static_range(M * P):
            low, high = low + (dots[2 * c],), high + (dots[2 * c + 1],)
        low, high = _joined(low, M, P), _joined(high, M, P)
        if TYPE == "IQ1_M":
            shifts = _joined(_shift_parts(f[2], xw, UNIT, M * P), M, P)
        else:
            is_minus = (f[2] & (0x8000 if UNIT < 2 else -0x80000000)) != 0
        for m in tl.static_range(M):
            dot = low[m] * 16 + high[m]
            if TYPE == "IQ1_M":
                result = result + ((dot * 2 + shifts[m]).to(tl.float32) * (factors[m] * 0.03125),)
            else:
                shift = tl.where(is_minus, sums[m] * -1.125, sums[m] * -0.875)
                result = result + (dot.to(tl.float32) * (factors[m] * 0.0625) + shift,)
    else:
        whole = _joined(dots, M, P)
        for m in tl.static_range(M):
            dot = whole[m].to(tl.float32)
            if TYPE == "IQ3_XXS":
                result = result + (dot * (factors[m] * 0.5) + sums[m] * -32.0,)
            elif TYPE == "IQ3_S":
                result = result + (dot * (factors[m] * 2.0) + sums[m] * -15.0,)
            else:
                result = result + (dot * (factors[m] * 0.25),)
    return result


@triton.jit
def _chunk(total, f, t, x, TYPE: tl.constexpr, BN: tl.constexpr):
    """`total` of BN rows of W and M of x, plus the products of 64 weights whose fields are in `f`.

    Units are the outer loop, so that only the activations of one are in registers at a time when there are many rows.
    """
    C: tl.constexpr = x.M * x.P
    IS_TERNARY: tl.constexpr = TYPE == "IQ1_S" or TYPE == "IQ1_M"
    D: tl.constexpr = 2 if IS_TERNARY else 1
    IS_SIGNED: tl.constexpr = TYPE == "IQ2_XXS" or TYPE == "IQ2_XS" or TYPE == "IQ2_S"
    UNITS_HAVE_SCALES: tl.constexpr = TYPE == "IQ1_M" or TYPE == "IQ2_XS" or TYPE == "IQ2_S"
    parts, nothing, sums, factors, dots = (), (), (), (), ()
    for _ in tl.static_range(BN * x.M):
        parts = parts + (total[0] * 0,)
    for _ in tl.static_range(C * D):
        nothing = nothing + (f[0][0] & 0,)
    for i in tl.static_range(4):
        xw = ()
        for c in tl.static_range(C):
            xw = xw + _load4(x.q + (c * (x.K // 4) + i * (x.K // 32)))
        if i % 2 == 0:
            factors = ()
            for m in tl.static_range(x.M):
                factors = factors + (tl.load(x.d + (m * (x.K // 32) + i // 2), mask=x.valid, other=0.0),)
            if TYPE == "IQ1_S" or TYPE == "IQ3_XXS" or TYPE == "IQ3_S":
                sums = _group_sums(xw, x.q + (i + 1) * (x.K // 32), factors, x)
        new_dots, new_parts = (), ()
        for r in tl.static_range(BN):
            if IS_TERNARY:
                words = _ternary(f[r], i, t, TYPE)
            elif IS_SIGNED:
                words = _signed(f[r], i, t, TYPE)
            else:
                words = _mirrored(f[r], i, t, TYPE)
            row = _accumulated(nothing if UNITS_HAVE_SCALES or i % 2 == 0 else dots[r], words, xw, C, D, IS_SIGNED)
            new_dots = new_dots + (row,)
            if UNITS_HAVE_SCALES or i % 2 == 1:
                values = _values(row, f[r], xw, factors, sums, i, x.M, x.P, TYPE)
                scale = _scale(f[r], i, TYPE)
                for m in tl.static_range(x.M):
                    new_parts = new_parts + (parts[r * x.M + m] + scale * values[m],)
        dots = new_dots
        if UNITS_HAVE_SCALES or i % 2 == 1:
            parts = new_parts
    result = ()
    for r in tl.static_range(BN):
        for m in tl.static_range(x.M):
            result = result + (total[r * x.M + m] + parts[r * x.M + m] * f[r][-1],)
    return result


@triton.jit
def _group_sums(xw, q, factors, x):
    """Sums of 32 activations as floats: those of a unit in `xw` and of the next, which begins at `q`."""
    totals = ()
    for c in tl.static_range(x.M * x.P):
        front = sum_words((xw[4 * c], xw[4 * c + 1], xw[4 * c + 2], xw[4 * c + 3]))
        totals = totals + (front + sum_words(_load4(q + c * (x.K // 4))),)
    whole = _joined(totals, x.M, x.P)
    result = ()
    for m in tl.static_range(x.M):
        result = result + (whole[m].to(tl.float32) * factors[m],)
    return result


@triton.jit
def codebook_rows(
    w, t, xq_ptr, xd_ptr, pid_k, K: tl.constexpr, TYPE: tl.constexpr, M: tl.constexpr, P: tl.constexpr,
    BN: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Products of WARPS * BN rows: tiles [32, WARPS] of what lanes add up, one for each of BN rows and M of x."""
    ROW: tl.constexpr = K // 64
    lane = tl.arange(0, 32)[:, None]
    first = tl.arange(0, WARPS)[None, :] * (BN * ROW)
    padded_K: tl.constexpr = (K + 127) // 128 * 128
    total = ()
    for _ in tl.static_range(BN * M):
        total = total + (tl.zeros([32, WARPS], tl.float32),)
    for step in range((ROW + 32 * SPLIT - 1) // (32 * SPLIT)):
        chunk = (step * SPLIT + pid_k) * 32 + lane
        valid = chunk < ROW
        chunk = tl.minimum(chunk, ROW - 1)
        fields = ()
        for r in tl.static_range(BN):
            fields = fields + (_fields(w, first + chunk, r * ROW, TYPE),)
        # Unit i of a chunk is unit 4 * chunk + i: see `activations` for where it lies.
        q = xq_ptr + (chunk % 2 * (padded_K // 8) + chunk // 2 * 4)
        total = _chunk(total, fields, t, Inputs(q, xd_ptr + chunk * 2, valid, padded_K, M, P), TYPE, BN)
    return total


def _sign_bits(count: int) -> np.ndarray:
    """The eight signs of each of so many fields; those of seven bits leave out one that makes their number even."""
    bits = np.arange(count)[:, None] >> np.arange(8) & 1
    if count == 128:
        bits[:, 7] = bits.sum(1) & 1
    return bits


@functools.cache
def codebook_words(type_name: str, device: torch.device) -> torch.Tensor:
    """Grid, signs, and the magnitudes of IQ2 as int32 words, kept once per device."""
    num_signs = _LAYOUTS[type_name][2]
    rows, bits = tables.grid_rows(type_name).astype(np.int64), _sign_bits(num_signs)
    if type_name in ("IQ1_S", "IQ1_M"):
        # Joined on the CPU: programs read these words before they wait for the kernels launched ahead of them.
        return torch.cat((table(type_name, torch.device("cpu")), torch.zeros(1, dtype=torch.int32))).to(device)
    if type_name.startswith("IQ2"):
        words = (np.searchsorted((8, 25, 43), rows) << 4 * np.arange(8)).sum(1)
        signs = (bits << 4 * np.arange(8) + 2).sum(1)
    elif type_name == "IQ3_XXS":
        words = (64 + rows << 8 * np.arange(4)).sum(1)
        signs = (255 * bits.reshape(-1, 2, 4) << 8 * np.arange(4)).sum(2).reshape(-1)
    else:
        words = (8 + rows // 2 << 8 * np.arange(4)).sum(1)
        signs = (15 * bits << np.array([0, 8, 16, 24, 4, 12, 20, 28])).sum(1)
    return torch.from_numpy(np.concatenate((words, signs, [0x002B1908])).astype(np.uint32).view(np.int32)).to(device)
