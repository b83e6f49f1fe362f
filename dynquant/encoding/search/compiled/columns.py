"""Passes over the columns of a tile: error feedback, coordinate descent, and the terms of the scale equations.

The formulas are those of `feedback` and `descent`. Tiles are [columns, ROWS]. `spread` is a tuple: scales and their
inverses [S, ROWS], minimums [S, ROWS] or empty, offsets of runs of codewords or empty, width of a sub-block, of a run.
"""

from typing import Any

import numpy as np

from dynquant.encoding.search.codebooks import Integers
from dynquant.encoding.search.compiled.jit import NUM_LINKS, ROWS, Linked, compiled, inner
from dynquant.encoding.search.compiled.products import product_of, push_of
from dynquant.encoding.search.compiled.words import as_arrays, nearest_of, workspace

_CHUNK = 64
"""Columns whose mutual feedback is applied at once; feedback between chunks comes in one product."""
_ZERO, _TWO = np.float32(0), np.float32(2)
_RIDGE, _SMALLEST = 1e-7, 2.0**-126
"""As in `descent`: added to the diagonal of the scale equations, relative to its mean, and at least."""


@inner
def to_codewords(spread, first, y):
    """Turn weights of the columns from `first` on into the real-valued codewords that decode to them, in place."""
    _, inverse, b, offsets, width, run = spread
    for j in range(y.shape[0]):
        s = (first + j) // width
        if b.shape[0]:
            for t in range(ROWS):
                y[j, t] += b[s, t]
        for t in range(ROWS):
            y[j, t] *= inverse[s, t]
        if offsets.shape[0]:
            r = (first + j) // run
            for t in range(ROWS):
                y[j, t] -= offsets[r, t]


@inner
def decode(spread, first, values, out):
    """Write the weights that codewords of the columns from `first` on stand for."""
    a, _, b, offsets, width, run = spread
    for j in range(values.shape[0]):
        s = (first + j) // width
        if offsets.shape[0]:
            r = (first + j) // run
            for t in range(ROWS):
                out[j, t] = a[s, t] * (values[j, t] + offsets[r, t])
        else:
            for t in range(ROWS):
                out[j, t] = a[s, t] * values[j, t]
        if b.shape[0]:
            for t in range(ROWS):
                out[j, t] -= b[s, t]


@compiled
def decoded(spread, values):
    """Return all weights [C, ROWS] that codewords stand for."""
    out = np.empty_like(values)
    decode(spread, 0, values, out)
    return out


@inner
def feed_block(links, book, x, at, n, pending, loss, spread, active, work, results):
    """Round `n` columns from `at` on; `pending` [n, ROWS] is the feedback of earlier ones, and is used up.

    `loss`: the factor, the inverses of its groups, the metric. `results`: values and errors, of all columns, are
    written, and losses [ROWS] grow by the columns' part.
    """
    factor, inverses, metric = loss
    values, errors, losses = results
    group = book[1]
    y = np.empty((group, ROWS), np.float32)
    for c in range(0, n, group):
        first = at + c
        if group == 1:
            diagonal = factor[first, first]
            for t in range(ROWS):
                y[0, t] = x[first, t] + pending[c, t] / diagonal
        else:
            inverse = inverses[first // group]
            for j in range(group):
                for t in range(ROWS):
                    y[j, t] = x[first + j, t]
                for i in range(j + 1):
                    for t in range(ROWS):
                        y[j, t] += inverse[i, j] * pending[c + i, t]
        to_codewords(spread, first, y)
        nearest_of(links, (book, y, metric[first : first + group], active, False, work, values[first : first + group]))
        decode(spread, first, values[first : first + group], y)
        for j in range(group):
            for t in range(ROWS):
                y[j, t] = x[first + j, t] - y[j, t]
                errors[first + j, t] = y[j, t]
        add_losses(factor, first, pending, c, y, losses)
        push_of(links, (pending, c + group, n, factor, first, at, y))


@inner
def add_losses(factor, first, pending, c, errors, losses):
    """Add what the columns of a group lose, their errors and `pending` feedback multiplied with the factor."""
    for j in range(errors.shape[0]):
        for i in range(j + 1):
            for t in range(ROWS):
                pending[c + j, t] += factor[first + i, first + j] * errors[i, t]
        for t in range(ROWS):
            losses[t] += pending[c + j, t] * pending[c + j, t]


def _feed_examples() -> tuple[Any, ...]:
    book, tile = as_arrays(Integers(0, 1)), np.zeros((1, ROWS), np.float32)
    square, spread = np.zeros((1, 1), np.float32), (tile, tile, tile, tile, 1, 1)
    links, work = (0,) * NUM_LINKS, workspace(book)
    loss, results = (square, square[None], square[0]), (tile, tile, tile[0])
    return links, book, tile, 0, 1, tile, loss, spread, np.ones(ROWS, np.bool_), work, results


linked_feed_block = Linked(feed_block, 3, _feed_examples)
feed_block_of = linked_feed_block.call


@compiled
def feed_back(links, book, x, loss, transposed, spread, active, values):
    """Write the values of one pass of error feedback; `loss` as for `feed_block`, `transposed` is the factor's."""
    work, columns = workspace(book), x.shape[0]
    errors, losses = np.empty_like(x), np.zeros(ROWS, np.float32)
    for start in range(0, columns, _CHUNK):
        stop = min(start + _CHUNK, columns)
        pending = np.zeros((_CHUNK, ROWS), np.float32)
        product_of(links, (pending, transposed, errors, start, stop, 0, start, start, 0))
        results = values, errors, losses
        feed_block_of(links, (links, book, x, start, stop - start, pending, loss, spread, active, work, results))


@compiled
def slopes(links, x, spread, values, hessian):
    """Half the gradient of the loss: the hessian times the errors."""
    errors, out = np.empty_like(x), np.zeros_like(x)
    decode(spread, 0, values, errors)
    for c in range(x.shape[0]):
        for t in range(ROWS):
            errors[c, t] = x[c, t] - errors[c, t]
    product_of(links, (out, hessian, errors, 0, x.shape[0], 0, x.shape[0], 0, 0))
    return out


@compiled
def descend(links, book, loss, spread, active, slope, values, is_last):
    """Visit every group once. `slope` follows, but for columns already passed where this is the last visit.

    `loss`: the hessian, the inverses of its groups, its diagonal.
    """
    hessian, inverses, diagonal = loss
    work, group, columns = workspace(book), book[1], slope.shape[0]
    near, steps = np.empty((_CHUNK, ROWS), np.float32), np.empty((_CHUNK, ROWS), np.float32)
    y, new = np.empty((group, ROWS), np.float32), np.zeros((group, ROWS), np.float32)
    for start in range(0, columns, _CHUNK):
        stop = min(start + _CHUNK, columns)
        for c in range(stop - start):
            for t in range(ROWS):
                near[c, t] = slope[start + c, t]
        for c in range(0, stop - start, group):
            first = start + c
            decode(spread, first, values[first : first + group], y)
            if group == 1:
                for t in range(ROWS):
                    y[0, t] += near[c, t] / diagonal[first]
            else:
                inverse = inverses[first // group]
                for j in range(group):
                    for i in range(group):
                        for t in range(ROWS):
                            y[j, t] += inverse[i, j] * near[c + i, t]
            to_codewords(spread, first, y)
            nearest_of(links, (book, y, diagonal[first : first + group], active, False, work, new))
            _step(hessian, spread, first, near[c : c + group], values[first : first + group], new, y)
            for j in range(group):
                for t in range(ROWS):
                    steps[c + j, t] = y[j, t]
            push_of(links, (near, c + group, stop - start, hessian, first, start, y))
        product_of(links, (slope, hessian, steps, stop if is_last else 0, columns, start, stop, 0, start))


@inner
def _step(hessian, spread, first, slope, values, new, steps):
    """Take the `new` values where they lose less, and write what errors grow by."""
    a, group = spread[0], new.shape[0]
    change = np.zeros(ROWS, np.float32)
    for j in range(group):
        s = (first + j) // spread[4]
        for t in range(ROWS):
            steps[j, t] = a[s, t] * (values[j, t] - new[j, t])
    for j in range(group):
        for t in range(ROWS):
            pull = _TWO * slope[j, t]
            for i in range(group):
                pull += hessian[first + i, first + j] * steps[i, t]
            change[t] += pull * steps[j, t]
    for j in range(group):
        for t in range(ROWS):
            is_better = change[t] < _ZERO
            values[j, t] = new[j, t] if is_better else values[j, t]
            steps[j, t] = steps[j, t] if is_better else _ZERO


@inner
def _add_minimums(links, out, folded, minimums, line, first, stop):
    """Add to the lines of `out` [C, ROWS] from `line` on what minimums give, of any number of sub-blocks."""
    fours = first + (stop - first) // 4 * 4
    if fours > first:
        product_of(links, (out, folded, minimums, line, out.shape[0], first, fours, 0, 0))
    for s in range(fours, stop):
        for c in range(line, out.shape[0]):
            for t in range(ROWS):
                out[c, t] += folded[c, s] * minimums[s, t]


@compiled
def scale_terms(links, units, slope, hessian, folded, width, sub_block, keeps):
    """The scale equations of every row, for changes of the scales: matrix [n, n, ROWS] and right side [n, ROWS].

    The n unknowns are those of `units`, [C, ROWS] for scales and then [S, ROWS] for minimums, in super-blocks of
    `width` columns. `folded` [C, S] is the hessian with its columns summed over sub-blocks. Returned as well, if
    `keeps`, is [n, C, ROWS]: what each unknown adds to `slope`.
    """
    scaled, minimums = units
    columns = scaled.shape[0]
    blocks = columns // width
    kinds, per_block = 2 if minimums.shape[0] else 1, width // sub_block
    count = kinds * blocks
    matrix, right = np.zeros((count, count, ROWS), np.float32), np.zeros((count, ROWS), np.float32)
    pulled = np.zeros((count if keeps else 1, columns, ROWS), np.float32)
    for row in range(count):
        kind, block = row // blocks, row % blocks
        start, line = block * width, 0 if keeps else block * width
        pull = pulled[row if keeps else 0]
        if not keeps:
            for c in range(columns):
                for t in range(ROWS):
                    pull[c, t] = _ZERO
        if kind == 0:
            product_of(links, (pull, hessian, scaled, line, columns, start, start + width, 0, 0))
        else:
            first = block * per_block
            _add_minimums(links, pull, folded, minimums, line, first, first + per_block)
        for c in range(start, columns):
            totals, s = matrix[row], c // sub_block
            for t in range(ROWS):
                totals[c // width, t] += pull[c, t] * scaled[c, t]
            if kinds == 2:
                for t in range(ROWS):
                    totals[blocks + c // width, t] += pull[c, t] * minimums[s, t]
        for c in range(start, start + width):
            s = c // sub_block
            for t in range(ROWS):
                right[row, t] += (scaled[c, t] if kind == 0 else minimums[s, t]) * slope[c, t]
    for row in range(count):
        for other in range(count):
            if other % blocks > row % blocks:
                for t in range(ROWS):
                    matrix[other, row, t] = matrix[row, other, t]
    return matrix, right, pulled


@compiled
def solved_scales(matrix, right):
    """Return the solutions [n, ROWS] of the scale equations, found in float64.

    These are symmetric and positive, so that elimination needs no pivots; where rounding has left them neither, what
    comes out loses more than the present scales.
    """
    count = right.shape[0]
    left, change, ridge = matrix.astype(np.float64), right.astype(np.float64), np.zeros(ROWS)
    for i in range(count):
        for t in range(ROWS):
            ridge[t] += left[i, i, t]
    for i in range(count):
        for t in range(ROWS):
            left[i, i, t] += _RIDGE * (ridge[t] / count) + _SMALLEST
    for i in range(count):
        for j in range(i + 1, count):
            for t in range(ROWS):
                ridge[t] = left[i, j, t] / left[i, i, t]
                change[j, t] -= ridge[t] * change[i, t]
            for k in range(j, count):
                for t in range(ROWS):
                    left[j, k, t] -= ridge[t] * left[i, k, t]
    for i in range(count - 1, -1, -1):
        for k in range(i + 1, count):
            for t in range(ROWS):
                change[i, t] -= left[i, k, t] * change[k, t]
        for t in range(ROWS):
            change[i, t] /= left[i, i, t]
    return change.astype(np.float32)


@compiled
def keep_better_scales(matrix, right, present, new):
    """Put the present scales [n, ROWS] in place of the new ones in rows that lose more with these."""
    growth, count = np.zeros(ROWS), right.shape[0]
    for i in range(count):
        for t in range(ROWS):
            growth[t] -= _TWO * np.float64(right[i, t]) * (new[i, t] - present[i, t])
        for j in range(count):
            for t in range(ROWS):
                step = np.float64(matrix[i, j, t]) * (new[j, t] - present[j, t])
                growth[t] += step * (new[i, t] - present[i, t])
    for i in range(count):
        for t in range(ROWS):
            new[i, t] = new[i, t] if growth[t] < _ZERO else present[i, t]


@compiled
def follow_scales(links, units, pulled, changes, slope, matrices, widths, blocks):
    """Bring `slope` to where scales changed by `changes` [n, ROWS] in some super-blocks put it.

    `pulled` as kept by `scale_terms`; `matrices` are the hessian and `folded`, `widths` those of super- and sub-blocks,
    `blocks` the first super-block and the one after the last.
    """
    scaled, minimums = units
    hessian, folded = matrices
    width, sub_block = widths
    if pulled.shape[0] == changes.shape[0]:
        for row in range(changes.shape[0]):
            for c in range(scaled.shape[0]):
                for t in range(ROWS):
                    slope[c, t] -= changes[row, t] * pulled[row, c, t]
        return
    steps, start, stop = np.empty_like(scaled), blocks[0] * width, blocks[1] * width
    for c in range(start, stop):
        for t in range(ROWS):
            steps[c, t] = -changes[c // width, t] * scaled[c, t]
    product_of(links, (slope, hessian, steps, 0, scaled.shape[0], start, stop, 0, 0))
    if minimums.shape[0]:
        lines, count = np.empty_like(minimums), scaled.shape[0] // width
        for s in range(start // sub_block, stop // sub_block):
            for t in range(ROWS):
                lines[s, t] = -changes[count + s * sub_block // width, t] * minimums[s, t]
        _add_minimums(links, slope, folded, lines, 0, start // sub_block, stop // sub_block)
