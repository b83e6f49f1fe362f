"""Scales, minimums and shifts of a tile under a diagonal metric: the loops behind `scales`."""

from typing import Any

import numpy as np

from dynquant.encoding.search.codebooks import Integers
from dynquant.encoding.search.compiled.columns import decode, to_codewords
from dynquant.encoding.search.compiled.jit import NUM_LINKS, ROWS, Linked, compiled, inner
from dynquant.encoding.search.compiled.words import INTEGERS, as_arrays, nearest_of, workspace

_TINY = np.float32(1e-30)
_ZERO, _ONE, _HALF, _TWO = np.float32(0), np.float32(1), np.float32(0.5), np.float32(2)
_INFINITE = np.float32(np.inf)
_SHIFT = np.float32(0.125)
_ROUND = np.float32(1.5 * 2**23)
_FP16_MAX, _FP16_NORMAL, _FP16_TINY = np.float32(65504), np.float32(2.0**-14), np.float32(2.0**-24)
_FP16_SPLIT, _FP16_STEP = np.float32(2**13 + 1), np.float32(0.75)
_SUPER_SCALES = 24


@inner
def _inverse(a):
    return _ONE / a if a != _ZERO else _ZERO


@inner
def search_block(links, book, x, metric, first, width, a, b, run, is_scan, active, room, out):
    """Find values [width, ROWS] and shifts [runs, ROWS] of one sub-block under scales `a`, minimums `b` [1 or 0, ROWS].

    `out` are these and their weighted squared error [ROWS]. `run` is 0 for types without shifts.
    """
    work, inverse, y, tried, errors = room
    values, shifts, error = out
    group = book[1]
    for t in range(ROWS):
        inverse[0, t] = _inverse(a[0, t])
        error[t] = _ZERO
    for start in range(0, width, run if run else width):
        for sign in range(2 if run else 1):
            offsets = np.empty((1 if run else 0, ROWS), np.float32)
            shift = _ONE if sign == 0 else -_ONE
            for t in range(ROWS):
                if run:
                    offsets[0, t] = shift * _SHIFT
                errors[sign, t] = _ZERO
            spread = a, inverse, b, offsets, width, width
            for c in range(start, start + (run if run else width), group):
                for j in range(group):
                    for t in range(ROWS):
                        y[j, t] = x[first + c + j, t]
                to_codewords(spread, 0, y)
                nearest = tried[c - start : c - start + group]
                nearest_of(links, (book, y, metric[first + c : first + c + group], active, is_scan, work, nearest))
                decode(spread, 0, nearest, y)
                for j in range(group):
                    weight = metric[first + c + j]
                    for t in range(ROWS):
                        difference = x[first + c + j, t] - y[j, t]
                        errors[sign, t] += weight * difference * difference
            for t in range(ROWS):
                errors[1, t] = errors[1, t] if sign else _INFINITE
            for c in range(start, start + (run if run else width)):
                for t in range(ROWS):
                    is_better = sign == 0 or errors[1, t] < errors[0, t]
                    values[c, t] = tried[c - start, t] if is_better else values[c, t]
            if run:
                for t in range(ROWS):
                    is_better = sign == 0 or errors[1, t] < errors[0, t]
                    shifts[start // run, t] = shift if is_better else shifts[start // run, t]
        for t in range(ROWS):
            error[t] += errors[1, t] if errors[1, t] < errors[0, t] else errors[0, t]


@compiled
def _room(book, width):
    """Room for `search_block`."""
    lines, tried = np.empty((3 + book[1], ROWS), np.float32), np.zeros((width, ROWS), np.float32)
    return workspace(book), lines[:1], lines[3:], tried, lines[1:3]


def _search_examples() -> tuple[Any, ...]:
    book, tile = as_arrays(Integers(0, 1)), np.zeros((1, ROWS), np.float32)
    links = (0,) * NUM_LINKS
    return (
        links,
        book,
        tile,
        tile[0],
        0,
        1,
        tile,
        tile,
        0,
        False,
        np.ones(ROWS, np.bool_),
        _room(book, 1),
        (tile, tile, tile[0]),
    )


linked_search_block = Linked(search_block, 4, _search_examples)
search_block_of = linked_search_block.call


@compiled
def fit_scales(links, book, x, metric, width, run, fractions, active):
    """Free scales [S, ROWS] of types without minimums, and what a unit of squared difference from them costs.

    `fractions` are the scales to try, as shares of a sub-block's largest magnitude.
    """
    sub_blocks = x.shape[0] // width
    room = _room(book, width)
    best, curvature = np.zeros((sub_blocks, ROWS), np.float32), np.zeros((sub_blocks, ROWS), np.float32)
    values, shifts = (
        np.zeros((width, ROWS), np.float32),
        np.zeros((max(1, width // run if run else 1), ROWS), np.float32),
    )
    peak, least, error = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    moment, square = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    a, none = np.empty((1, ROWS), np.float32), np.empty((0, ROWS), np.float32)
    for s in range(sub_blocks):
        first = s * width
        for t in range(ROWS):
            peak[t], least[t] = _ZERO, _INFINITE
        for c in range(first, first + width):
            for t in range(ROWS):
                magnitude = abs(x[c, t])
                peak[t] = magnitude if magnitude > peak[t] else peak[t]
        for fraction in fractions:
            for t in range(ROWS):
                a[0, t] = peak[t] * fraction
                moment[t] = square[t] = _ZERO
            if book[0] == INTEGERS:
                _add_moments(x, metric, first, width, book[2], book[3], a[0], moment, square)
            else:
                out = values, shifts, error
                search_block_of(links, (links, book, x, metric, first, width, a, none, run, True, active, room, out))
                for c in range(width):
                    weight = metric[first + c]
                    for t in range(ROWS):
                        unit = values[c, t]
                        if run:
                            unit += shifts[c // run, t] * _SHIFT
                        moment[t] += weight * x[first + c, t] * unit
                        square[t] += weight * unit * unit
            for t in range(ROWS):
                scale = moment[t] / (square[t] if square[t] > _TINY else _TINY)
                growth = -moment[t] * scale
                is_better = growth < least[t]
                least[t] = growth if is_better else least[t]
                best[s, t] = scale if is_better else best[s, t]
                curvature[s, t] = square[t] if is_better else curvature[s, t]
    return best, curvature


@inner
def _integer(v, low, high):
    v = v if v > low else low
    v = v if v < high else high
    return (v + _ROUND) - _ROUND


@inner
def _add_moments(x, metric, first, width, low, high, a, moment, square):
    """Add the weighted products of integers with the weights and with themselves, under scales `a` [ROWS]."""
    inverse = np.empty(ROWS, np.float32)
    for t in range(ROWS):
        inverse[t] = _inverse(a[t])
    for c in range(first, first + width):
        weight = metric[c]
        for t in range(ROWS):
            q = _integer(x[c, t] * inverse[t], low, high)
            weighted = weight * q
            moment[t] += weighted * x[c, t]
            square[t] += weighted * q


@inner
def _fit_line(x, metric, first, width, high, a, b):
    """Weighted least squares of x = a q - b with b >= 0, q the codewords under `a` and `b`; both are replaced."""
    sw = _ZERO
    sums = np.zeros((4, ROWS), np.float32)
    inverse = np.empty(ROWS, np.float32)
    for t in range(ROWS):
        inverse[t] = _ONE / a[t]
    for c in range(first, first + width):
        w = metric[c]
        sw += w
        for t in range(ROWS):
            q, v = _integer((x[c, t] + b[t]) * inverse[t], _ZERO, high), x[c, t]
            wq = w * q
            sums[0, t] += wq
            sums[1, t] += wq * q
            sums[2, t] += w * v
            sums[3, t] += wq * v
    for t in range(ROWS):
        sq, sqq, sx, sxq = sums[0, t], sums[1, t], sums[2, t], sums[3, t]
        determinant = sw * sqq - sq * sq
        slope = (sw * sxq - sq * sx) / max(determinant, _TINY)
        shift = (slope * sq - sx) / max(sw, _TINY)
        through_zero = shift < _ZERO or determinant <= np.float32(1e-9) * sw * sqq  # one codeword settles no line
        slope = sxq / max(sqq, _TINY) if through_zero else slope
        a[t], b[t] = max(slope, _TINY), _ZERO if through_zero else shift


@compiled
def fit_affine(x, metric, width, high, fractions):
    """Free scales and minimums [S, ROWS], and what a unit of squared difference from the scales costs."""
    sub_blocks = x.shape[0] // width
    scales, minimums = np.empty((sub_blocks, ROWS), np.float32), np.empty((sub_blocks, ROWS), np.float32)
    curvature, lines = np.empty((sub_blocks, ROWS), np.float32), np.empty((6, ROWS), np.float32)
    low, top, least, error, a, b = lines[0], lines[1], lines[2], lines[3], lines[4], lines[5]
    for s in range(sub_blocks):
        first = s * width
        for t in range(ROWS):
            low[t], top[t], least[t] = _ZERO, _ZERO, _INFINITE
        for c in range(first, first + width):
            for t in range(ROWS):
                v = x[c, t]
                low[t] = v if v < low[t] else low[t]
                top[t] = v if v > top[t] else top[t]
        for below in fractions:
            for above in fractions:
                for t in range(ROWS):
                    a[t] = max((above * top[t] - below * low[t]) / high, _TINY)
                    b[t], error[t] = -below * low[t], _ZERO
                _fit_line(x, metric, first, width, high, a, b)
                _fit_line(x, metric, first, width, high, a, b)
                _line_errors(x, metric, first, width, high, a, b, error)
                for t in range(ROWS):
                    is_better = error[t] < least[t]
                    least[t] = error[t] if is_better else least[t]
                    scales[s, t] = a[t] if is_better else scales[s, t]
                    minimums[s, t] = b[t] if is_better else minimums[s, t]
        for t in range(ROWS):
            curvature[s, t] = _ZERO
        for c in range(first, first + width):
            for t in range(ROWS):
                q = _integer((x[c, t] + minimums[s, t]) / scales[s, t], _ZERO, high)
                curvature[s, t] += metric[c] * q * q
    return scales, minimums, curvature


@inner
def _line_errors(x, metric, first, width, high, a, b, error):
    inverse = np.empty(ROWS, np.float32)
    for t in range(ROWS):
        inverse[t] = _ONE / a[t]
    for c in range(first, first + width):
        for t in range(ROWS):
            difference = x[c, t] - a[t] * _integer((x[c, t] + b[t]) * inverse[t], _ZERO, high) + b[t]
            error[t] += metric[c] * difference * difference


@compiled
def fit_minimums(x, metric, width, high, a, b):
    """Bring the minimums `b` [S, ROWS] to where the stored scales `a` need them; returns the weights [S] of theirs."""
    weights = np.zeros(b.shape[0], np.float32)
    total = np.empty(ROWS, np.float32)
    for s in range(b.shape[0]):
        for c in range(s * width, (s + 1) * width):
            weights[s] += metric[c]
        for _ in range(2):
            for t in range(ROWS):
                total[t] = _ZERO
            for c in range(s * width, (s + 1) * width):
                for t in range(ROWS):
                    q = _integer((x[c, t] + b[s, t]) * _inverse(a[s, t]), _ZERO, high)
                    total[t] += metric[c] * (a[s, t] * q - x[c, t])
            for t in range(ROWS):
                b[s, t] = max(total[t] / max(weights[s], _TINY), _ZERO)
    return weights


@inner
def _half(v):
    """The nearest float16: eleven bits, or a multiple of the smallest one."""
    v = min(max(v, -_FP16_MAX), _FP16_MAX)
    if abs(v) < _FP16_NORMAL:
        return (v + _FP16_STEP) - _FP16_STEP
    c = v * _FP16_SPLIT
    return c - (c - v)


@compiled
def round_scales(free, curvature, multipliers, unit, per_block, is_never_zero):
    """Super-block scales [B, ROWS] in float16 and codes [S, ROWS] that stand for free scales with least weighted error.

    The multipliers are evenly spaced.
    """
    blocks = free.shape[0] // per_block
    d, codes = np.zeros((blocks, ROWS), np.float32), np.zeros(free.shape, np.int32)
    tried = np.empty((per_block, ROWS), np.float32)
    lowest, step, last = multipliers[0], multipliers[1] - multipliers[0], np.float32(multipliers.shape[0] - 1)
    lines = np.empty((6, ROWS), np.float32)
    peak, least, scale, error, moment, square = lines[0], lines[1], lines[2], lines[3], lines[4], lines[5]
    for block in range(blocks):
        first = block * per_block
        for t in range(ROWS):
            peak[t], least[t] = _ZERO, _INFINITE
            for s in range(first, first + per_block):
                peak[t] = max(peak[t], abs(free[s, t]))
        for trial in range(_SUPER_SCALES):
            share = np.float32(0.4) + np.float32(0.75) * np.float32(trial) / np.float32(_SUPER_SCALES - 1)
            for t in range(ROWS):
                scale[t] = peak[t] / (share * multipliers[-1])
            for turn in range(3):
                for t in range(ROWS):
                    moment[t] = square[t] = error[t] = _ZERO
                for s in range(per_block):
                    for t in range(ROWS):
                        code = (free[first + s, t] * _inverse(scale[t]) - lowest) / step
                        code = _integer(code, _ZERO, last)
                        tried[s, t] = code
                        m = lowest + step * code
                        cost, scaled = curvature[first + s, t], free[first + s, t]
                        moment[t] += cost * m * scaled
                        square[t] += cost * m * m
                        error[t] += cost * (scaled - scale[t] * m) * (scaled - scale[t] * m)
                for t in range(ROWS):
                    if turn < 2 and square[t] > _ZERO:
                        scale[t] = moment[t] / max(square[t], _TINY)
                    if turn == 1:
                        scale[t] = _stored(scale[t], unit[t], is_never_zero)
            for t in range(ROWS):
                if error[t] < least[t]:
                    least[t], d[block, t] = error[t], scale[t]
                    for s in range(per_block):
                        codes[first + s, t] = np.int32(tried[s, t])
    return d, codes


@inner
def _stored(scale, unit, is_never_zero):
    stored = _half(scale * unit)
    if is_never_zero and stored == _ZERO and scale != _ZERO:
        stored = _FP16_TINY if scale > _ZERO else -_FP16_TINY
    return stored / unit


@compiled
def search(links, book, x, metric, a, b, widths, active):
    """Values [C, ROWS], shifts [C / run, ROWS] and errors of super-blocks [B, ROWS] under scales [S, ROWS].

    What is found in super-blocks that are not `active` [B, ROWS] means nothing.
    """
    super_block, width, run = widths
    room = _room(book, width)
    values, error = np.zeros_like(x), np.empty(ROWS, np.float32)
    runs = width // run if run else 0
    shifts = np.zeros((a.shape[0] * runs, ROWS), np.float32)
    errors = np.zeros((x.shape[0] // super_block, ROWS), np.float32)
    for s in range(a.shape[0]):
        first = s * width
        out = values[first : first + width], shifts[s * runs : (s + 1) * runs], error
        here_a, here_b, here_active = a[s : s + 1], b[s : s + 1], active[first // super_block]
        search_block_of(
            links, (links, book, x, metric, first, width, here_a, here_b, run, False, here_active, room, out)
        )
        for t in range(ROWS):
            errors[first // super_block, t] += error[t]
    return values, shifts, errors


@compiled
def neighbours(links, book, x, metric, layout, fields, values, active):
    """Try the scale code below and above (and minimums likewise) in every sub-block, with a full search each.

    `layout` and `fields`, which are changed, as for `trials.descend_scales`, but with shifts in place of offsets.
    What is found in super-blocks that are not `active` [B, ROWS] means nothing.
    """
    multipliers, num_mins, super_block, width, run = layout
    d, dmin, scales, mins, shifts = fields
    room = _room(book, width)
    least, error = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    runs = width // run if run else 0
    tried, tried_shifts = np.zeros((width, ROWS), np.float32), np.zeros((runs, ROWS), np.float32)
    codes = np.empty((4, ROWS), np.int32)
    a, b = np.empty((1, ROWS), np.float32), np.empty((1 if num_mins else 0, ROWS), np.float32)
    for s in range(scales.shape[0]):
        first, block = s * width, s * width // super_block
        for t in range(ROWS):
            codes[0, t] = codes[2, t] = scales[s, t]
            codes[1, t] = codes[3, t] = mins[s, t] if num_mins else 0
        _set_scales(multipliers, d[block], dmin, block, codes, a, b)
        _block_errors(x, metric, first, width, a, b, values, shifts, run, least)
        for trial in range(9):
            step, min_step = trial // 3 - 1, trial % 3 - 1
            if (step == 0 and min_step == 0) or (min_step != 0 and not num_mins):
                continue
            for t in range(ROWS):
                codes[0, t] = min(max(scales[s, t] + step, 0), multipliers.shape[0] - 1)
                if num_mins:
                    codes[1, t] = min(max(mins[s, t] + min_step, 0), num_mins - 1)
            _set_scales(multipliers, d[block], dmin, block, codes, a, b)
            out = tried, tried_shifts, error
            search_block_of(links, (links, book, x, metric, first, width, a, b, run, False, active[block], room, out))
            for t in range(ROWS):
                if error[t] < least[t]:
                    least[t], codes[2, t], codes[3, t] = error[t], codes[0, t], codes[1, t]
                    for c in range(width):
                        values[first + c, t] = tried[c, t]
                    for r in range(runs):
                        shifts[s * runs + r, t] = tried_shifts[r, t]
        for t in range(ROWS):
            scales[s, t] = codes[2, t]
            if num_mins:
                mins[s, t] = codes[3, t]


@inner
def _set_scales(multipliers, d, dmin, block, codes, a, b):
    for t in range(ROWS):
        a[0, t] = d[t] * multipliers[codes[0, t]]
        if b.shape[0]:
            b[0, t] = dmin[block, t] * np.float32(codes[1, t])


@inner
def _block_errors(x, metric, first, width, a, b, values, shifts, run, errors):
    """Write the weighted squared errors [ROWS] of the values at hand in the sub-block at `first`."""
    for t in range(ROWS):
        errors[t] = _ZERO
    for c in range(first, first + width):
        weight = metric[c]
        for t in range(ROWS):
            unit = values[c, t] + shifts[c // run, t] * _SHIFT if run else values[c, t]
            difference = x[c, t] - a[0, t] * unit
            if b.shape[0]:
                difference += b[0, t]
            errors[t] += weight * difference * difference


@compiled
def moments(x, units, metric, width):
    """Weighted products of `units` with `x` and with themselves, summed over super-blocks: both [B, ROWS]."""
    blocks = x.shape[0] // width
    product, square = np.zeros((blocks, ROWS), np.float32), np.zeros((blocks, ROWS), np.float32)
    for c in range(x.shape[0]):
        weight, block = metric[c], c // width
        for t in range(ROWS):
            weighted = weight * units[c, t]
            product[block, t] += weighted * x[c, t]
            square[block, t] += weighted * units[c, t]
    return product, square
