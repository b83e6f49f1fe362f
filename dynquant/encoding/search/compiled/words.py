"""Nearest codewords to the targets of a tile, for every codebook: the loops behind `codebooks`.

A codebook is a plain tuple, as `as_arrays` makes it; numba reads those fastest. Every search is exact. A rounded
vector that is a word of the grid is its nearest word; for others all words are compared, many at a time.
"""

from typing import Any

import numpy as np
import torch

from dynquant.encoding.search.codebooks import Codebook, Grid, Integers, SignedWords, TernaryWords, Values
from dynquant.encoding.search.compiled.jit import ROWS, Linked, compiled, inner, inner_fused

INTEGERS, _TABLE, _TERNARY, _SIGNED = range(4)
_ROUND = np.float32(1.5 * 2**23)
"""Added and taken away again, it rounds a number below 2**22 to the nearest integer, halves to even."""
_LANES = 64
_DENSE = 14
"""If more than one vector of levels in so many is a word, the nearest one is mostly a few changes away."""
_CHANGES = 6
"""Places whose values are changed together when a rounded vector is no word."""
_ONE, _TWO, _FOUR = np.float32(1), np.float32(2), np.float32(4)
_ZERO = np.float32(0)


def as_arrays(book: Codebook) -> tuple[Any, ...]:
    """Kind, group, lowest and highest integer, levels, middles between them, words, their squares, index, evenness."""
    none, low, high, levels = np.zeros(0, np.float32), _ZERO, _ZERO, np.zeros(0, np.float32)
    words, index, kind, even = np.zeros((0, 1, _LANES), np.float32), np.zeros(0, np.int32), INTEGERS, 0
    if isinstance(book, Integers):
        low, high = np.float32(book.low), np.float32(book.high)
    elif isinstance(book, Values):
        kind, levels = _TABLE, book.table(torch.device("cpu")).numpy()
    elif isinstance(book, TernaryWords | SignedWords):
        kind = _TERNARY if isinstance(book, TernaryWords) else _SIGNED
        even = int(isinstance(book, SignedWords) and book.even_signs)
        low, high = np.float32(-1), np.float32(1)
        words, levels, index = _grid_arrays(book.grid)
    middles = (levels[1:] + levels[:-1]) / _TWO if len(levels) else none
    return kind, book.group, low, high, levels, middles, words, words * words, index, even


def _grid_arrays(grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words [K / _LANES, width, _LANES], levels, and the index of the word of every number in base `levels`."""
    words, levels, index = grid.arrays()
    words = words.unflatten(0, (-1, _LANES)).transpose(1, 2).contiguous()
    return words.numpy(), levels.contiguous().numpy(), index.to(torch.int32).numpy()


@compiled
def workspace(book):
    """Room for the search of words, in the order in which `_nearest_words` takes it apart."""
    blocks = book[6].shape[0]
    lines, numbers = np.empty((8, ROWS), np.float32), np.empty((3, ROWS), np.int32)
    scores = np.empty((4, blocks, _LANES), np.float32)
    few, changes = np.empty((4, 1 << _CHANGES), np.float32), np.empty((4, 1 << _CHANGES), np.int32)
    return lines, numbers[:2], numbers[2], scores[:2], scores[2:], few[0], few[1], few[2:], changes


@inner
def nearest(book, y, metric, active, is_scan, work, out):
    """Write the values nearest to `y` [group, ROWS] under `metric` [group].

    Rows that are not `active` [ROWS] may be left out. A scan finds values faster that are good enough to choose a scale
    by, as `Codebook.scan` does.
    """
    kind = book[0]
    if kind == INTEGERS or (kind == _TERNARY and is_scan):
        low, high = book[2], book[3]
        for j in range(book[1]):
            for t in range(ROWS):
                v = y[j, t]
                v = v if v > low else low
                v = v if v < high else high
                out[j, t] = (v + _ROUND) - _ROUND
    elif kind == _TABLE:
        levels, middles = book[4], book[5]
        for t in range(ROWS):
            out[0, t] = levels[0]
        for m in range(middles.shape[0]):
            level, middle = levels[m + 1], middles[m]
            for t in range(ROWS):
                out[0, t] = level if y[0, t] > middle else out[0, t]
    else:
        _nearest_words(book, y, metric, active, is_scan, work, out)


@inner
def _nearest_words(book, y, metric, active, is_scan, work, out):
    magnitudes, numbers, odd, norms, scores, lanes, p, costs, changes = work
    words, index = book[6], book[8]
    width = words.shape[1]
    parts = 8 // width
    _round(book, y, magnitudes, numbers, odd)
    has_parity = book[9] == 1 and not is_scan
    is_dense = width == 8 and index.shape[0] < _DENSE * words.shape[0] * _LANES
    has_norms = False
    for t in range(ROWS):
        if not active[t]:
            continue
        is_odd = has_parity and odd[t] == 1
        if not has_norms and (is_odd or index[numbers[0, t]] < 0 or index[numbers[parts - 1, t]] < 0):
            _set_norms(book[7], metric, norms)
            has_norms = True
        cheapest, place, extra = 0, -1, _ZERO
        for part in range(parts):
            first = part * width
            for j in range(width):
                p[j] = metric[first + j] * magnitudes[first + j, t]
            word = index[numbers[part, t]]
            if is_odd:
                if parts == 1:
                    word = _lowest_of_8(words, norms[0], p, _FOUR, scores[0], lanes)
                    place = _place(words, word, p)
                    cheapest = word
                else:
                    if word < 0:
                        word = _lowest_of_4(words, norms[part], p, _ZERO, scores[part], lanes)
                    plain = _score(words, norms[part], p, word)
                    other = _lowest_of_4(words, norms[part], p, _FOUR, scores[part], lanes)
                    more = scores[part, other // _LANES, other % _LANES] - plain
                    if place < 0 or more < extra:
                        cheapest, extra = other, more
                        place = first + _place(words, other, p)
            elif word < 0:
                if is_dense:
                    word = _nearest_by_changes(book, numbers[0, t], magnitudes, t, metric, costs, changes)
                if word < 0 and width == 8:
                    word = _lowest_of_8(words, norms[0], p, _ZERO, scores[0], lanes)
                elif word < 0:
                    word = _lowest_of_4(words, norms[part], p, _ZERO, scores[part], lanes)
            for j in range(width):
                out[first + j, t] = words[word // _LANES, j, word % _LANES]
        if is_odd:
            first = place // width * width
            for j in range(width):
                out[first + j, t] = words[cheapest // _LANES, j, cheapest % _LANES]
            out[place, t] = -out[place, t]
        if book[0] == _SIGNED:
            for j in range(8):
                if y[j, t] < _ZERO:
                    out[j, t] = -out[j, t]


@inner
def _round(book, y, magnitudes, numbers, odd):
    """Magnitudes of the targets, the number of the vector of nearest levels of each part, and parities of signs."""
    middles, width, is_signed = book[5], book[6].shape[1], book[0] == _SIGNED
    base = middles.shape[0] + 1
    for t in range(ROWS):
        odd[t], numbers[0, t], numbers[1, t] = 0, 0, 0
    for j in range(8):
        for t in range(ROWS):
            v = y[j, t]
            is_negative = is_signed and v < _ZERO
            magnitudes[j, t] = -v if is_negative else v
            odd[t] ^= np.int32(is_negative)
        place = np.int32(base ** (width - 1 - j % width))
        for m in range(middles.shape[0]):
            middle = middles[m]
            for t in range(ROWS):
                numbers[j // width, t] += place * np.int32(magnitudes[j, t] > middle)


@inner_fused
def _set_norms(squares, metric, norms):
    width = squares.shape[1]
    for part in range(8 // width):
        for block in range(squares.shape[0]):
            for i in range(_LANES):
                norms[part, block, i] = metric[part * width] * squares[block, 0, i]
            for j in range(1, width):
                for i in range(_LANES):
                    norms[part, block, i] += metric[part * width + j] * squares[block, j, i]


@inner_fused
def _score(words, norm, p, word):
    """The distance of a word, less what is the same for all; `p` is metric times target."""
    score = norm[word // _LANES, word % _LANES]
    for j in range(words.shape[1]):
        score -= _TWO * p[j] * words[word // _LANES, j, word % _LANES]
    return score


@inner
def _place(words, word, p):
    """The value of the word that costs least when it is negated."""
    values, i = words[word // _LANES], word % _LANES
    place = 0
    for j in range(1, words.shape[1]):
        place = j if p[j] * values[j, i] < p[place] * values[place, i] else place
    return place


@inner
def _nearest_by_changes(book, number, magnitudes, t, metric, work_costs, work_changes):
    """Return the nearest word to a rounded vector that is none, or -1 where that would take long; three levels.

    A word differs from the rounded vector in some places, each at a cost of its own. The best word with one change
    bounds the rest: only changes that cost less can be parts of a better word, and these are mostly few.
    """
    levels, middles, index = book[4], book[5], book[8]
    costs, sums = work_costs[0], work_costs[1]
    steps, places, numbers, used = work_changes[0], work_changes[1], work_changes[2], work_changes[3]
    place, word, bound = np.int32(1), np.int32(-1), np.float32(np.inf)
    for j in range(7, -1, -1):
        v = magnitudes[j, t]
        digit = np.int32(v > middles[0]) + np.int32(v > middles[1])
        rounded = v - levels[digit]
        for other in range(1, 3):
            changed = (digit + other) % 3
            difference = v - levels[changed]
            i = 2 * j + other - 1
            costs[i] = metric[j] * (difference * difference - rounded * rounded)
            steps[i] = (changed - digit) * place
            places[i] = 1 << j
            changed_word = index[number + steps[i]]
            if changed_word >= 0 and costs[i] < bound:
                word, bound = changed_word, costs[i]
        place *= np.int32(3)
    count = 0
    for i in range(16):
        if costs[i] < bound:
            if count == _CHANGES:
                return np.int32(-1)
            costs[count], steps[count], places[count] = costs[i], steps[i], places[i]
            count += 1
    sums[0], numbers[0], used[0] = _ZERO, number, 0
    for i in range(count):
        for rest in range(1 << i):
            both = rest + (1 << i)
            is_possible = used[rest] & places[i] == 0
            sums[both] = sums[rest] + costs[i] if is_possible else np.float32(np.inf)
            used[both], numbers[both] = used[rest] | places[i], numbers[rest] + steps[i]
            if sums[both] < bound:
                changed_word = index[numbers[both]]
                if changed_word >= 0:
                    word, bound = changed_word, sums[both]
    return word


@inner_fused
def _lowest_of_8(words, norm, p, negation, scores, lanes):
    """Return the word of least distance; `negation` 4 if one of its values is negated, else 0.

    Negating value j adds 4 * p_j * value_j.
    """
    a, b, c, d, e, f, g, h = p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]
    for i in range(_LANES):
        lanes[i] = np.inf
    for k in range(norm.shape[0]):
        for i in range(_LANES):
            s0, s1, s2, s3 = a * words[k, 0, i], b * words[k, 1, i], c * words[k, 2, i], d * words[k, 3, i]
            s4, s5, s6, s7 = e * words[k, 4, i], f * words[k, 5, i], g * words[k, 6, i], h * words[k, 7, i]
            m0, m1 = s0 if s0 < s1 else s1, s2 if s2 < s3 else s3
            m2, m3 = s4 if s4 < s5 else s5, s6 if s6 < s7 else s7
            m0, m2 = m0 if m0 < m1 else m1, m2 if m2 < m3 else m3
            least = m0 if m0 < m2 else m2
            total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
            s = norm[k, i] - _TWO * total + negation * least
            scores[k, i] = s
            lanes[i] = s if s < lanes[i] else lanes[i]
    return _where_lowest(scores, lanes)


@inner_fused
def _lowest_of_4(words, norm, p, negation, scores, lanes):
    a, b, c, d = p[0], p[1], p[2], p[3]
    for i in range(_LANES):
        lanes[i] = np.inf
    for k in range(norm.shape[0]):
        for i in range(_LANES):
            s0, s1, s2, s3 = a * words[k, 0, i], b * words[k, 1, i], c * words[k, 2, i], d * words[k, 3, i]
            m0, m1 = s0 if s0 < s1 else s1, s2 if s2 < s3 else s3
            least = m0 if m0 < m1 else m1
            s = norm[k, i] - _TWO * ((s0 + s1) + (s2 + s3)) + negation * least
            scores[k, i] = s
            lanes[i] = s if s < lanes[i] else lanes[i]
    return _where_lowest(scores, lanes)


@inner
def _where_lowest(scores, lanes):
    """A place of the smallest score; lane i holds the smallest of those of all blocks."""
    least = lanes[0]
    for i in range(1, _LANES):
        least = lanes[i] if lanes[i] < least else least
    for i in range(_LANES):
        if lanes[i] == least:
            for k in range(scores.shape[0]):
                if scores[k, i] == least:
                    return k * _LANES + i
    return 0


def _examples() -> tuple[Any, ...]:
    book, line = as_arrays(Integers(0, 1)), np.zeros((1, ROWS), np.float32)
    return book, line, line[0], np.ones(ROWS, np.bool_), False, workspace(book), line


linked_nearest = Linked(nearest, 0, _examples)
nearest_of = linked_nearest.call
