"""One visit of every sub-block of a tile, in which neighbouring scale codes are tried: `descent.descend_scales`."""

import numpy as np

from dynquant.encoding.search.compiled.columns import add_losses, decode, feed_block_of
from dynquant.encoding.search.compiled.jit import ROWS, compiled, inner
from dynquant.encoding.search.compiled.products import product_of, push_of
from dynquant.encoding.search.compiled.words import workspace

_CHUNK = 64
_ZERO, _ONE = np.float32(0), np.float32(1)


@compiled
def descend_scales(links, book, layout, loss, fields, active, slope, values):
    """Change fields and values where that lowers the loss; `slope` follows.

    `layout`: multipliers, number of minimums, widths of a super-block, a sub-block and a run of one offset. `loss`: the
    hessian; for each of its sub-blocks the inverse, the factor, the inverses of the factor's groups, the metric.
    `fields`: d, dmin, scales, mins, offsets.
    """
    multipliers, num_mins, super_block, width, run = layout
    hessian, solvers, factors, inverses, metric = loss
    d, dmin, scales, mins, offsets = fields
    work, columns = workspace(book), values.shape[0]
    near, steps = np.empty((_CHUNK, ROWS), np.float32), np.empty((_CHUNK, ROWS), np.float32)
    tiles = np.zeros((5, width, ROWS), np.float32)
    target, tried, errors, best, new = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4]
    codes, best_codes = np.empty((2, ROWS), np.int32), np.empty((2, ROWS), np.int32)
    least, losses, flips = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32), np.empty(ROWS, np.bool_)
    runs = width // run if offsets.shape[0] else 0
    for start in range(0, columns, _CHUNK):
        stop = min(start + _CHUNK, columns)
        for c in range(stop - start):
            for t in range(ROWS):
                near[c, t] = slope[start + c, t]
        for first in range(start, stop, width):
            s, block = first // width, first // super_block
            for t in range(ROWS):
                codes[0, t] = best_codes[0, t] = scales[s, t]
                codes[1, t] = best_codes[1, t] = mins[s, t] if num_mins else 0
                flips[t] = False
            here = offsets[s * runs : (s + 1) * runs]
            spread = _spread(multipliers, width, run, d[block], dmin, block, codes, here)
            decode(spread, 0, values[first : first + width], new)
            for c in range(width):
                for t in range(ROWS):
                    target[c, t] = new[c, t]
                    steps[first - start + c, t] = new[c, t]
                    best[c, t] = values[first + c, t]
            product_of(links, (target, solvers[s], near, 0, width, 0, width, 0, start - first))
            _present_losses(links, book, factors[s], target, new, errors, least)
            for trial in range(6):
                if (trial in (2, 4) and not num_mins) or (trial == 5 and runs != 1):
                    continue
                for t in range(ROWS):
                    step = -1 if trial < 3 else 1
                    codes[0, t] = _near(scales[s, t], step if trial in (1, 3) else 0, multipliers.shape[0])
                    if num_mins:
                        codes[1, t] = _near(mins[s, t], step if trial in (2, 4) else 0, num_mins)
                    losses[t] = _ZERO
                tried_offsets = -here if trial == 5 else here
                spread = _spread(multipliers, width, run, d[block], dmin, block, codes, tried_offsets)
                pending = np.zeros((width, ROWS), np.float32)
                here_loss, results = (factors[s], inverses[s], metric[s]), (tried, errors, losses)
                feed_block_of(links, (links, book, target, 0, width, pending, here_loss, spread, active, work, results))
                for t in range(ROWS):
                    if losses[t] < least[t]:
                        least[t], flips[t] = losses[t], trial == 5
                        best_codes[0, t], best_codes[1, t] = codes[0, t], codes[1, t]
                        for c in range(width):
                            best[c, t] = tried[c, t]
            for t in range(ROWS):
                scales[s, t] = best_codes[0, t]
                if num_mins:
                    mins[s, t] = best_codes[1, t]
                if runs == 1 and flips[t]:
                    offsets[s, t] = -offsets[s, t]
            spread = _spread(multipliers, width, run, d[block], dmin, block, best_codes, here)
            decode(spread, 0, best, new)
            for c in range(width):
                for t in range(ROWS):
                    values[first + c, t] = best[c, t]
                    steps[first - start + c, t] -= new[c, t]
            after = first + width - start
            push_of(links, (near, after, stop - start, hessian, first, start, steps[after - width : after]))
        product_of(links, (slope, hessian, steps, 0, columns, start, stop, 0, start))


@inner
def _near(code, step, count):
    return np.int32(min(max(code + step, 0), count - 1))


@inner
def _spread(multipliers, width, run, d, dmin, block, codes, offsets):
    """The spread of one sub-block under codes [2, ROWS] of its scale and minimum."""
    has_minimums = dmin.shape[0] > 0
    a, inverse = np.empty((1, ROWS), np.float32), np.empty((1, ROWS), np.float32)
    b = np.empty((1 if has_minimums else 0, ROWS), np.float32)
    for t in range(ROWS):
        a[0, t] = d[t] * multipliers[codes[0, t]]
        inverse[0, t] = _ONE / a[0, t] if a[0, t] != _ZERO else _ZERO
        if has_minimums:
            b[0, t] = dmin[block, t] * np.float32(codes[1, t])
    return a, inverse, b, offsets, width, run


@inner
def _present_losses(links, book, factor, target, decoded, errors, losses):
    """The losses [ROWS] of the values at hand."""
    group, pending = book[1], np.zeros_like(target)
    for c in range(target.shape[0]):
        for t in range(ROWS):
            errors[c, t] = target[c, t] - decoded[c, t]
    for t in range(ROWS):
        losses[t] = _ZERO
    for c in range(0, target.shape[0], group):
        add_losses(factor, c, pending, c, errors[c : c + group], losses)
        push_of(links, (pending, c + group, target.shape[0], factor, c, 0, errors[c : c + group]))
