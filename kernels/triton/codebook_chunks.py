"""Dot products of one chunk of a row of codebook types and of TQ1_0; see `bit_chunks` for the conventions.

A grid entry is gathered as a word of bytes (IQ3: 4 weights), as two words (IQ2: 8 weights), or as one word of nibbles
that hold ternary + 1 (IQ1: 8 weights, the first four low), which keeps the IQ1 table at 8 KB.
"""

# ruff: noqa: RUF005  (Triton has no `(*tuple, item)`)
import triton
import triton.language as tl

from dynquant.kernels.triton.bit_words import (
    add_scaled,
    add_sums,
    half,
    load2,
    load4,
    load_x,
    plane,
    sum_pair,
    times,
    unit_dots,
    with_signs,
    zeros,
)


@triton.jit
def _nibble_codes(a, b):
    """Two IQ1 entries -> the four words of a unit."""
    return a & 0x0F0F0F0F, (a >> 4) & 0x0F0F0F0F, b & 0x0F0F0F0F, (b >> 4) & 0x0F0F0F0F


@triton.jit
def ternary_chunk(w, block, chunk, x, grid_ptr, TYPE: tl.constexpr):
    """IQ1_S, IQ1_M: a chunk is four index bytes and 16 bits of `qh`, for 32 weights."""
    inner = chunk % 8
    QS: tl.constexpr = 1 if TYPE == "IQ1_S" else 0
    QH: tl.constexpr = 2 if TYPE == "IQ1_S" else 1
    qs = tl.load(plane(w, QS, 32, tl.int32) + (block * 8 + inner))
    qh = tl.load(plane(w, QH, 16, tl.uint16) + (block * 8 + inner)).to(tl.int32)
    STEP: tl.constexpr = 3 if TYPE == "IQ1_S" else 4  # bits of qh for an index; the fourth is the sign of the shift
    g0 = tl.load(grid_ptr + ((qs & 255) | ((qh << 8) & 0x700)))
    g1 = tl.load(grid_ptr + (((qs >> 8) & 255) | ((qh << (8 - STEP)) & 0x700)))
    g2 = tl.load(grid_ptr + (((qs >> 16) & 255) | ((qh << (8 - 2 * STEP)) & 0x700)))
    g3 = tl.load(grid_ptr + (((qs >> 24) & 255) | ((qh >> (3 * STEP - 8)) & 0x700)))
    parts = zeros(block, x.M)
    if TYPE == "IQ1_S":
        scale = half(w, 0, 2, block) * ((qh >> 11) & 14 | 1).to(tl.float32)
        shift = tl.where(qh >= 0x8000, -0.125, 0.125)
        dots, sums = unit_dots(x, chunk * 2, _nibble_codes(g0, g1), 1, False)
        dots, sums = unit_dots(x, chunk * 2 + 1, _nibble_codes(g2, g3), 1, False, (dots, sums))
        parts = add_scaled(parts, dots, scale, x, chunk, 1.0)
        parts = add_sums(parts, sums, scale * shift, x, chunk)
    else:
        lower, upper = load2(plane(w, 2, 8, tl.int32), block)
        d_bits = ((lower >> 12) & 15) | ((lower >> 24) & 0xF0) | ((upper >> 4) & 0xF00) | ((upper >> 16) & 0xF000)
        scales = tl.where(inner >= 4, upper, lower) >> ((inner % 4) // 2 * 16 + inner % 2 * 6)
        dots, _ = unit_dots(x, chunk * 2, _nibble_codes(g0, g1), 1, False)
        dots = _with_shifts(dots, x, chunk * 2, qh)
        parts = add_scaled(parts, dots, (scales << 1 & 14 | 1).to(tl.float32), x, chunk, 0.125)
        dots, _ = unit_dots(x, chunk * 2 + 1, _nibble_codes(g2, g3), 1, False)
        dots = _with_shifts(dots, x, chunk * 2 + 1, qh >> 8)
        parts = add_scaled(parts, dots, (scales >> 2 & 14 | 1).to(tl.float32), x, chunk, 0.125)
        parts = times(parts, d_bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32))
    return parts


@triton.jit
def _with_shifts(dots, x, unit, qh):
    """8 * dots plus or minus the sums of eight activations, by bits 3 and 7 of `qh`."""
    result = ()
    for c in tl.static_range(len(dots)):
        a, b = sum_pair(load_x(x, unit, c))
        result = result + (dots[c] * 8 + tl.where((qh & 8) != 0, -a, a) + tl.where((qh & 128) != 0, -b, b),)
    return result


@triton.jit
def _even_signs(word):
    """Makes the bit after seven sign bits: bit i of the result is the parity of bits i to i + 6."""
    pairs = word ^ (word >> 1)
    return pairs ^ (pairs >> 2) ^ (pairs >> 4) ^ (word >> 6)


@triton.jit
def signed_chunk(w, block, chunk, x, grid_ptr, TYPE: tl.constexpr):
    """IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S: four times eight magnitudes and eight signs, for 32 weights."""
    inner = chunk % 8
    at = block * 8 + inner
    d = half(w, 0, 2, block)
    UNITS_HAVE_SCALES: tl.constexpr = TYPE == "IQ2_XS" or TYPE == "IQ2_S"
    if TYPE == "IQ2_S":
        index = tl.load(plane(w, 1, 32, tl.int32) + at)
        signs = tl.load(plane(w, 2, 32, tl.int32) + at)
        qh = tl.load(plane(w, 3, 8, tl.uint8) + at).to(tl.int32)
        scales = tl.load(plane(w, 4, 8, tl.uint8) + at).to(tl.int32)
    else:
        index, other = load2(plane(w, 1, 64, tl.int32), at)
        if TYPE == "IQ2_XXS":
            signs = other
        elif TYPE == "IQ2_XS":
            scales = tl.load(plane(w, 2, 8, tl.uint8) + at).to(tl.int32)
            even0, even1 = _even_signs(index), _even_signs(other)
        elif TYPE == "IQ3_XXS":
            signs = tl.load(plane(w, 2, 32, tl.int32) + at)
        else:
            qh = tl.load(plane(w, 2, 8, tl.uint8) + at).to(tl.int32)
            signs = tl.load(plane(w, 3, 32, tl.int32) + at)
            scales = tl.load(plane(w, 4, 4, tl.uint8) + (block * 4 + inner // 2)).to(tl.int32)
    if TYPE == "IQ2_XXS" or TYPE == "IQ3_XXS":
        # Bits 4-6 of the four seven-bit fields, and the eighth sign above them.
        late = ((signs >> 4) & 0x00E1C387) | ((_even_signs(signs) << 3) & 0x01020408)
    parts = zeros(block, x.M)
    for u in tl.static_range(2):
        words = ()
        for v in tl.static_range(2):
            if TYPE == "IQ2_XXS":
                g0, g1 = load2(grid_ptr, (index >> (8 * (2 * u + v))) & 255)
            elif TYPE == "IQ2_XS":
                g0, g1 = load2(grid_ptr, ((index if u == 0 else other) >> (16 * v)) & 511)
            elif TYPE == "IQ2_S":
                byte = (index >> (8 * (2 * u + v))) & 255
                g0, g1 = load2(grid_ptr, byte | ((qh << (8 - 2 * (2 * u + v))) & 0x300))
            else:
                pair = (index if u == 0 else other) >> (16 * v)
                if TYPE == "IQ3_XXS":
                    g0 = tl.load(grid_ptr + (pair & 255))
                    g1 = tl.load(grid_ptr + ((pair >> 8) & 255))
                else:
                    g0 = tl.load(grid_ptr + ((pair & 255) | ((qh << (8 - 2 * (2 * u + v))) & 256)))
                    g1 = tl.load(grid_ptr + (((pair >> 8) & 255) | ((qh << (7 - 2 * (2 * u + v))) & 256)))
            if TYPE == "IQ2_XXS" or TYPE == "IQ3_XXS":
                n0, n1 = (signs >> (7 * (2 * u + v))) & 15, (late >> (7 * (2 * u + v))) & 15
            elif TYPE == "IQ2_XS":
                field = (index if u == 0 else other) >> (9 + 16 * v)
                eighth = (even0 if u == 0 else even1) >> (9 + 16 * v)
                n0, n1 = field & 15, ((field >> 4) & 7) | ((eighth << 3) & 8)
            else:
                n0, n1 = (signs >> (8 * (2 * u + v))) & 15, (signs >> (8 * (2 * u + v) + 4)) & 15
            words = words + (with_signs(g0, n0), with_signs(g1, n1))
        if u == 0 or UNITS_HAVE_SCALES:
            dots, sums = unit_dots(x, chunk * 2 + u, words, 0, True)
        else:
            dots, sums = unit_dots(x, chunk * 2 + 1, words, 0, True, (dots, sums))
        if UNITS_HAVE_SCALES:
            scale = ((scales >> (4 * u)) & 15).to(tl.float32) + 0.5
            parts = add_scaled(parts, dots, scale, x, chunk, 0.25)
    if UNITS_HAVE_SCALES:
        parts = times(parts, d)
    elif TYPE == "IQ3_S":
        scale = d * ((((scales >> (4 * (inner % 2))) & 15) << 1) | 1).to(tl.float32)
        parts = add_scaled(parts, dots, scale, x, chunk, 1.0)
    else:
        scale = d * (((signs >> 28) & 15).to(tl.float32) + 0.5)
        parts = add_scaled(parts, dots, scale, x, chunk, 0.25 if TYPE == "IQ2_XXS" else 0.5)
    return parts


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
