"""Triton: the nearest codewords to a tile of targets, for every codebook, and tiles cut into groups.

Words of a grid are compared with targets by tensor cores: sum_j metric_j (y_j - word_j)^2, but for what is the same for
all words, is the product of (-2 metric y, metric) with (word, word^2). TF32 holds levels and their squares exactly, so
that the word found is the nearest to a target, and under a metric, that are moved by a thousandth at most.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynquant.encoding.search.codebooks import Codebook, Grid, Integers, SignedWords, TernaryWords, Values

_PRODUCT = 16
"""Least length of products on tensor cores."""
jit_for_any_rows = triton.jit(do_not_specialize=["num_rows"])
"""Compiles one kernel for all numbers of rows: another one for those that 16 divides takes seconds to make, and places
of weights do not depend on it."""


def book_arguments(book: Codebook, device: torch.device) -> dict[str, object]:
    """Return the arguments of a kernel that tell `nearest` the codebook."""
    none = torch.zeros(_PRODUCT, device=device)
    arguments = {"words_ptr": none, "pairs_ptr": none, "NUM_WORDS": 0, "WORD": 8, "LOW": 0.0, "HIGH": 0.0}
    if isinstance(book, Integers):
        return arguments | {"KIND": "integers", "LOW": float(book.low), "HIGH": float(book.high)}
    if isinstance(book, Values):
        levels = book.table(device)
        return arguments | {"KIND": "levels", "words_ptr": levels, "NUM_WORDS": len(levels)}
    if isinstance(book, TernaryWords | SignedWords):
        kind = "words"
        if isinstance(book, SignedWords):
            kind = "even words" if book.even_signs else "signed words"
        words, pairs = _word_tables(book.grid, device)
        return arguments | {
            "KIND": kind, "LOW": book.grid.lowest, "words_ptr": words, "pairs_ptr": pairs, "NUM_WORDS": len(words),
            "WORD": book.grid.width,
        }  # fmt: skip
    return arguments | {"KIND": "float8", "HIGH": book.peak}


@cache
def _word_tables(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Words [K, width], and in columns [16, K] each value followed by its square; words of four leave zeros between."""
    words = grid.arrays()[0].to(device)
    pairs = torch.stack((words, words.square()), dim=-1).flatten(1)
    if pairs.shape[1] < _PRODUCT:
        pairs = torch.stack((pairs, torch.zeros_like(pairs)), dim=-1).flatten(1)
    return words.contiguous(), pairs.T.contiguous()


@triton.jit
def group_of(tile, g, GROUP: tl.constexpr):
    """Columns of group `g` of a tile [ROWS, WIDTH], as [ROWS, GROUP]."""
    groups: tl.constexpr = tile.shape[1] // GROUP
    cut = tl.reshape(tile, (tile.shape[0], groups, GROUP))
    return tl.sum(tl.where((tl.arange(0, groups) == g)[None, :, None], cut, 0.0), 1)


@triton.jit
def with_group(tile, g, piece, GROUP: tl.constexpr):
    """The tile [ROWS, WIDTH] with `piece` [ROWS, GROUP] as its group `g`."""
    groups: tl.constexpr = tile.shape[1] // GROUP
    cut = tl.reshape(tile, (tile.shape[0], groups, GROUP))
    cut = tl.where((tl.arange(0, groups) == g)[None, :, None], piece[:, None, :], cut)
    return tl.reshape(cut, (tile.shape[0], tile.shape[1]))


@triton.jit
def times(piece, matrix):
    """The product of a narrow piece [ROWS, GROUP] with [GROUP, WIDTH]; of words in TF32, of single weights in float32.

    Triton turns the sum into a product on tensor cores, also that of one term, which these then get wrong.
    """
    if matrix.shape[0] == 1:
        return piece * matrix
    else:
        return tl.sum(piece[:, :, None] * matrix[None, :, :], 1)


@triton.jit
def nearest(
    y, metric, words_ptr, pairs_ptr,
    KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, NUM_WORDS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Values nearest to `y` [ROWS, GROUP] under the metric [GROUP]."""
    if KIND == "integers":
        return tl.minimum(tl.maximum(tl.floor(y + 0.5), LOW), HIGH)  # halves go up; torch rounds them to even
    elif KIND == "levels":
        return _nearest_level(y, words_ptr, NUM_WORDS)
    elif KIND == "float8":
        return _nearest_float8(y, HIGH)
    elif KIND == "words":
        return _nearest_magnitudes(y, y < 0, metric, words_ptr, pairs_ptr, False, LOW, NUM_WORDS, WORD)
    else:
        magnitudes = _nearest_magnitudes(
            tl.abs(y), y < 0, metric, words_ptr, pairs_ptr, KIND == "even words", LOW, NUM_WORDS, WORD
        )
        return tl.where(y < 0, -magnitudes, magnitudes)


@triton.jit
def _nearest_level(y, levels_ptr, NUM_LEVELS: tl.constexpr):
    below = tl.load(levels_ptr)
    nearest_level = tl.zeros_like(y) + below
    for i in range(1, NUM_LEVELS):
        level = tl.load(levels_ptr + i)
        nearest_level = tl.where(y > (below + level) / 2, level, nearest_level)
        below = level
    return nearest_level


@triton.jit
def _nearest_float8(y, HIGH: tl.constexpr):
    """E4M3: three bits below the leading one, and none below 2^-9."""
    magnitude = tl.minimum(tl.abs(y), HIGH)
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 3, 127 - 9)
    step = (exponent << 23).to(tl.float32, bitcast=True)
    rounded = (magnitude / step + 12582912.0) - 12582912.0  # 1.5 * 2^23: no bits are left for halves
    return tl.where(y < 0, -rounded * step, rounded * step)


@triton.jit
def _nearest_magnitudes(
    y, negative, metric, words_ptr, pairs_ptr,
    EVEN: tl.constexpr, LOW: tl.constexpr, NUM_WORDS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Words nearest to `y` [ROWS, 8], of which one or two make a row.

    With EVEN, rows with an odd number of marks in `negative` have the value negated that costs least. To negate a place
    costs at least 4 * metric * y * LOW, so places are tried from the cheapest on, until no row can win by another.
    """
    rows: tl.constexpr = y.shape[0]
    parts: tl.constexpr = 8 // WORD
    places = tl.arange(0, WORD)[None, :]
    y = tl.reshape(y, (rows * parts, WORD))
    metric = tl.reshape(tl.broadcast_to(metric[None, :], (rows, 8)), (rows * parts, WORD))
    index, score = _search(y, metric, pairs_ptr, NUM_WORDS)
    place = tl.full((rows * parts,), -1, tl.int32)
    if EVEN:
        odd = tl.sum(negative.to(tl.int32), 1) % 2  # [rows]
        untried = y * metric
        extra = tl.full((rows * parts,), float("inf"), tl.float32)
        negated_index, negated_place = index, place
        unfinished = tl.max(odd, 0)
        while unfinished > 0:
            cheapest = tl.argmin(untried, 1)
            is_cheapest = places == cheapest[:, None]
            word, cost = _search(tl.where(is_cheapest, -y, y), metric, pairs_ptr, NUM_WORDS)
            better = cost - score < extra
            extra = tl.where(better, cost - score, extra)
            negated_index = tl.where(better, word, negated_index)
            negated_place = tl.where(better, cheapest, negated_place)
            untried = tl.where(is_cheapest, float("inf"), untried)
            bound = 4 * LOW * tl.min(tl.reshape(untried, (rows, 8)), 1)
            least = tl.min(tl.reshape(extra, (rows, parts)), 1)
            unfinished = tl.max(tl.where(bound < least, odd, 0), 0)
        part = tl.argmin(tl.reshape(extra, (rows, parts)), 1)
        wins = (tl.arange(0, parts)[None, :] == part[:, None]) & (odd[:, None] > 0)
        wins = tl.reshape(wins, (rows * parts,))
        index = tl.where(wins, negated_index, index)
        place = tl.where(wins, negated_place, place)
    words = tl.load(words_ptr + index[:, None] * WORD + places)
    return tl.reshape(tl.where(places == place[:, None], -words, words), (rows, 8))


@triton.jit
def _search(y, metric, pairs_ptr, NUM_WORDS: tl.constexpr):
    """Index of the nearest word to each target [N, WORD], and its score [N]: the distance less sum metric y^2."""
    targets: tl.constexpr = y.shape[0]
    word: tl.constexpr = y.shape[1]
    tile: tl.constexpr = 256 if NUM_WORDS > 512 else 128
    left = tl.reshape(tl.join(-2 * y * metric, metric), (targets, 2 * word))
    if word == 4:
        left = tl.reshape(tl.join(left, tl.zeros_like(left)), (targets, 16))
    columns = tl.arange(0, tile)
    pairs = pairs_ptr + tl.arange(0, 16)[:, None] * NUM_WORDS + columns[None, :]
    least = tl.full((targets, tile), float("inf"), tl.float32)
    which = tl.zeros((targets, tile), tl.int32)
    for first in range(0, NUM_WORDS, tile):
        scores = tl.dot(left, tl.load(pairs + first), input_precision="tf32")
        better = scores < least
        least = tl.where(better, scores, least)
        which = tl.where(better, first, which)
    score = tl.min(least, 1)
    index = tl.min(tl.where(least == score[:, None], which + columns[None, :], NUM_WORDS - 1), 1)
    return index, score
