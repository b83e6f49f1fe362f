"""Triton: scales, minimums and shifts of weights that are rounded on their own, as `scales` describes the search.

Sub-blocks are independent here: a program holds one of some rows in registers while it tries scale after scale.
"""

from functools import cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynquant.encoding.search.codebooks import Integers
from dynquant.encoding.search.codeword_kernels import group_of, jit_for_any_rows, nearest, with_group
from dynquant.encoding.search.column_kernels import constants, inverse_of
from dynquant.encoding.search.layouts import Fields, numbers
from dynquant.encoding.search.rows import Rows

_WEIGHTS = 512
"""Weights of a program; more would not stay in registers."""
_BLOCKS = 32
"""Super-blocks whose scales a program rounds."""


def serves(rows: Rows) -> bool:
    """Tell whether a sub-block of some rows fits in a program."""
    width = rows.layout.sub_block
    return width <= _WEIGHTS and width & (width - 1) == 0


def free_scales(rows: Rows, metric: Tensor, fractions: list[float]) -> tuple[Tensor, Tensor]:
    """Return the best scale of every sub-block [E, R, S], and what a unit of squared difference from it costs.

    `fractions` are those of a sub-block's largest weight that are tried first.
    """
    a = _per_sub_block(rows)
    curvature = torch.empty_like(a)
    _free_scales_kernel[_grid(rows)](
        a, curvature, numbers(tuple(fractions), a.device), rows.x, metric, *_sizes(rows), metric.stride(0),
        NUM_FRACTIONS=len(fractions), **_constants(rows),
    )  # fmt: skip
    return a, curvature


def free_lines(rows: Rows, metric: Tensor, fractions: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale and minimum of every sub-block [E, R, S] for codewords from 0 on, and the curvature of the scale."""
    a = _per_sub_block(rows)
    b, curvature = torch.empty_like(a), torch.empty_like(a)
    shares = numbers(tuple(fractions), a.device)
    _free_lines_kernel[_grid(rows)](
        a, b, curvature, shares, rows.x, metric, *_sizes(rows), metric.stride(0), LEVELS=rows.layout.codebook.peak,
        NUM_FRACTIONS=len(fractions), ROWS=_num_rows(rows), SUB_BLOCK=rows.layout.sub_block,
    )  # fmt: skip
    return a, b, curvature


def round_scales(rows: Rows, free: Tensor, curvature: Tensor, shares: list[float]) -> tuple[Tensor, Tensor]:
    """Super-block scale [E, R, B] and codes [E, R, S] of types whose multipliers are evenly spaced."""
    layout = rows.layout
    per_block = layout.super_block // layout.sub_block
    d = torch.empty((*free.shape[:2], free.shape[-1] // per_block), device=free.device)
    codes = torch.empty(free.shape, dtype=torch.int64, device=free.device)
    first, second, *_, last = layout.multipliers
    _round_scales_kernel[(triton.cdiv(d.numel(), _BLOCKS),)](
        d, codes, free.contiguous(), curvature.contiguous(), numbers(tuple(shares), d.device), rows.unit,
        d.numel(), d.shape[-1], FIRST=first, STEP=second - first, LAST=last, LAST_CODE=len(layout.multipliers) - 1,
        PER_BLOCK=per_block, BLOCKS=_BLOCKS, NUM_SHARES=len(shares),
        KEEPS_NONZERO=isinstance(layout.codebook, Integers),
    )  # fmt: skip
    return d, codes


def search(rows: Rows, metric: Tensor, a: Tensor, b: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Return the better shift of each run, where there are any, and the nearest values [E, R, C]."""
    values, shifts = torch.empty_like(rows.x), None
    if rows.layout.shift_width:
        experts, num_rows, columns = rows.x.shape
        shifts = torch.empty(experts, num_rows, columns // rows.layout.shift_width, device=a.device)
    _search_kernel[_grid(rows)](
        values, values if shifts is None else shifts, a, a if b is None else b, rows.x, metric, *_sizes(rows),
        metric.stride(0), HAS_MINIMUMS=b is not None, **_constants(rows),
    )  # fmt: skip
    return shifts, values


def neighbours(rows: Rows, metric: Tensor, fields: Fields, values: Tensor) -> tuple[Fields, Tensor]:
    """As `scales._neighbours`, for types with several multipliers."""
    layout, has_minimums = rows.layout, fields.mins is not None
    steps = _steps(has_minimums, rows.x.device)
    d, dmin = fields.d, fields.dmin
    fields, values = fields.map(Tensor.clone), values.clone()
    _neighbours_kernel[_grid(rows)](
        values, fields.scales, fields.mins if has_minimums else fields.scales,
        d if fields.shifts is None else fields.shifts, d, d if dmin is None else dmin,
        layout.multiplier_table(rows.x.device), steps, rows.x, metric, *_sizes(rows), metric.stride(0),
        HAS_MINIMUMS=has_minimums, SUPER_BLOCK=layout.super_block, NUM_STEPS=len(steps),
        LAST_SCALE=len(layout.multipliers) - 1, LAST_MINIMUM=layout.num_mins - 1, **_constants(rows),
    )  # fmt: skip
    return fields, values


@cache
def _steps(has_minimums: bool, device: torch.device) -> Tensor:
    steps = product((-1, 0, 1), repeat=2) if has_minimums else ((-1, 0), (1, 0))
    return torch.tensor([step for step in steps if step != (0, 0)], dtype=torch.int32, device=device)


def _per_sub_block(rows: Rows) -> Tensor:
    return torch.empty((*rows.x.shape[:2], rows.num_sub_blocks), device=rows.x.device)


def _num_rows(rows: Rows) -> int:
    return max(1, _WEIGHTS // rows.layout.sub_block) if rows.layout.codebook.group == 1 else 16


def _grid(rows: Rows) -> tuple[int, int, int]:
    experts, num_rows, _ = rows.x.shape
    return triton.cdiv(num_rows, _num_rows(rows)), rows.num_sub_blocks, experts


def _sizes(rows: Rows) -> tuple[int, int]:
    return rows.x.shape[1], rows.x.shape[2]


def _constants(rows: Rows) -> dict[str, object]:
    arguments = constants(rows) | {"ROWS": _num_rows(rows)}
    del arguments["HAS_MINIMUMS"]
    return arguments


@triton.jit
def _tile(x_ptr, metric_ptr, num_rows, num_columns, metric_stride, SUB_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Weights [ROWS, SUB_BLOCK] of the program and what marks true ones, the metric and its place, places of rows."""
    expert, s = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = s * SUB_BLOCK + tl.arange(0, SUB_BLOCK)
    row = expert * num_rows + rows
    spot = row[:, None] * num_columns + columns[None, :]
    inside = rows < num_rows
    x = tl.load(x_ptr + spot, mask=inside[:, None], other=0.0)
    metric_ptr += expert * metric_stride + s * SUB_BLOCK
    metric = tl.load(metric_ptr + tl.arange(0, SUB_BLOCK))[None, :]
    return x, metric, metric_ptr, spot, row, inside


@triton.jit
def _codewords(
    x, a, b, metric, metric_ptr, words_ptr, pairs_ptr,
    KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, NUM_WORDS: tl.constexpr, WORD: tl.constexpr,
    SHIFT: tl.constexpr, SHIFT_WIDTH: tl.constexpr, GROUP: tl.constexpr, SCANS: tl.constexpr,
):  # fmt: skip
    """Values nearest to the weights [ROWS, SUB_BLOCK], or those of a scan, and their offsets; `a`, `b` [ROWS]."""
    y = (x + b[:, None]) * inverse_of(a)[:, None]
    if SHIFT == 0:
        values = _values(y, metric_ptr, words_ptr, pairs_ptr, KIND, LOW, HIGH, NUM_WORDS, WORD, GROUP, SCANS)
        return values, tl.zeros_like(values)
    else:
        runs: tl.constexpr = x.shape[1] // SHIFT_WIDTH
        best, offsets = tl.zeros_like(x), tl.zeros_like(x)
        least = tl.full((x.shape[0], runs), float("inf"), tl.float32)
        for side in range(0, 2):
            offset = SHIFT * (1 - 2 * side)
            values = _values(
                y - offset, metric_ptr, words_ptr, pairs_ptr, KIND, LOW, HIGH, NUM_WORDS, WORD, GROUP, SCANS
            )
            error = x - a[:, None] * (values + offset)
            error = tl.sum(tl.reshape(error * error * metric, (x.shape[0], runs, SHIFT_WIDTH)), 2)
            better = tl.broadcast_to((error < least)[:, :, None], (x.shape[0], runs, SHIFT_WIDTH))
            better = tl.reshape(better, (x.shape[0], x.shape[1]))
            least = tl.minimum(error, least)
            best = tl.where(better, values, best)
            offsets = tl.where(better, offset, offsets)
        return best, offsets


@triton.jit
def _values(
    y, metric_ptr, words_ptr, pairs_ptr,
    KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, NUM_WORDS: tl.constexpr, WORD: tl.constexpr,
    GROUP: tl.constexpr, SCANS: tl.constexpr,
):  # fmt: skip
    if GROUP == 1:
        return nearest(y, None, words_ptr, pairs_ptr, KIND, LOW, HIGH, NUM_WORDS, WORD)
    elif SCANS and KIND == "words":
        return tl.minimum(tl.maximum(tl.floor(y + 0.5), -1.0), 1.0)
    else:
        kind: tl.constexpr = "signed words" if SCANS else KIND
        values = tl.zeros_like(y)
        for g in range(0, y.shape[1] // GROUP):
            metric = tl.load(metric_ptr + g * GROUP + tl.arange(0, GROUP))
            value = nearest(group_of(y, g, GROUP), metric, words_ptr, pairs_ptr, kind, LOW, HIGH, NUM_WORDS, WORD)
            values = with_group(values, g, value, GROUP)
        return values


@jit_for_any_rows
def _free_scales_kernel(
    scales_ptr, curvature_ptr, fractions_ptr, x_ptr, metric_ptr, num_rows, num_columns, metric_stride,
    words_ptr, pairs_ptr,
    KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, NUM_WORDS: tl.constexpr, WORD: tl.constexpr,
    SHIFT: tl.constexpr, SHIFT_WIDTH: tl.constexpr, SUB_BLOCK: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, NUM_FRACTIONS: tl.constexpr,
):  # fmt: skip
    x, metric, metric_ptr, _spot, row, inside = _tile(
        x_ptr, metric_ptr, num_rows, num_columns, metric_stride, SUB_BLOCK, ROWS
    )
    peak = tl.max(tl.abs(x), 1)
    best, curvature = tl.zeros_like(peak), tl.zeros_like(peak)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    for i in range(0, NUM_FRACTIONS):
        a = peak * tl.load(fractions_ptr + i)
        values, offsets = _codewords(
            x, a, tl.zeros_like(a), metric, metric_ptr, words_ptr, pairs_ptr, KIND, LOW, HIGH, NUM_WORDS, WORD,
            SHIFT, SHIFT_WIDTH, GROUP, True,
        )  # fmt: skip
        units = values + offsets
        moment, square = tl.sum(metric * x * units, 1), tl.sum(metric * units * units, 1)
        a = moment / tl.maximum(square, 1e-30)
        growth = -moment * a  # of the squared error
        better = growth < least
        least = tl.where(better, growth, least)
        best = tl.where(better, a, best)
        curvature = tl.where(better, square, curvature)
    place = row * (num_columns // SUB_BLOCK) + tl.program_id(1)
    tl.store(scales_ptr + place, best, mask=inside)
    tl.store(curvature_ptr + place, curvature, mask=inside)


@triton.jit
def _on_line(x, a, b, LEVELS: tl.constexpr):
    return tl.minimum(tl.maximum(tl.floor((x + b[:, None]) / a[:, None] + 0.5), 0.0), LEVELS)


@jit_for_any_rows
def _free_lines_kernel(
    scales_ptr, minimums_ptr, curvature_ptr, fractions_ptr, x_ptr, metric_ptr, num_rows, num_columns, metric_stride,
    LEVELS: tl.constexpr, SUB_BLOCK: tl.constexpr, ROWS: tl.constexpr, NUM_FRACTIONS: tl.constexpr,
):  # fmt: skip
    x, w, _metric_ptr, _spot, row, inside = _tile(
        x_ptr, metric_ptr, num_rows, num_columns, metric_stride, SUB_BLOCK, ROWS
    )
    low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
    sw, sx = tl.sum(w, 1), tl.sum(w * x, 1)
    best_a, best_b = tl.zeros_like(low), tl.zeros_like(low)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    for i in range(0, NUM_FRACTIONS * NUM_FRACTIONS):
        below = tl.load(fractions_ptr + i // NUM_FRACTIONS) * low
        above = tl.load(fractions_ptr + i % NUM_FRACTIONS) * high
        a, b = tl.maximum((above - below) / LEVELS, 1e-30), -below
        for _ in range(0, 2):
            # weighted least squares of x = a q - b, b >= 0
            q = _on_line(x, a, b, LEVELS)
            sq, sqq, sxq = tl.sum(w * q, 1), tl.sum(w * q * q, 1), tl.sum(w * x * q, 1)
            determinant = sw * sqq - sq * sq
            a = (sw * sxq - sq * sx) / tl.maximum(determinant, 1e-30)
            b = (a * sq - sx) / tl.maximum(sw, 1e-30)
            through_zero = (b < 0) | (determinant <= 1e-9 * sw * sqq)  # a single codeword settles no line
            a = tl.maximum(tl.where(through_zero, sxq / tl.maximum(sqq, 1e-30), a), 1e-30)
            b = tl.where(through_zero, 0.0, b)
        rest = x - a[:, None] * _on_line(x, a, b, LEVELS) + b[:, None]
        error = tl.sum(rest * rest * w, 1)
        better = error < least
        least = tl.where(better, error, least)
        best_a, best_b = tl.where(better, a, best_a), tl.where(better, b, best_b)
    q = _on_line(x, best_a, best_b, LEVELS)
    place = row * (num_columns // SUB_BLOCK) + tl.program_id(1)
    tl.store(scales_ptr + place, best_a, mask=inside)
    tl.store(minimums_ptr + place, best_b, mask=inside)
    tl.store(curvature_ptr + place, tl.sum(w * q * q, 1), mask=inside)


@triton.jit
def _codes_of(free, d, FIRST: tl.constexpr, STEP: tl.constexpr, LAST_CODE: tl.constexpr):
    ratio = tl.where(d[:, None] != 0, free / d[:, None], 0.0)
    return tl.minimum(tl.maximum(tl.ceil((ratio - FIRST) / STEP - 0.5), 0.0), LAST_CODE)


@triton.jit
def _round_scales_kernel(
    d_ptr, codes_ptr, free_ptr, curvature_ptr, shares_ptr, unit_ptr, num_blocks, blocks_per_row,
    FIRST: tl.constexpr, STEP: tl.constexpr, LAST: tl.constexpr, LAST_CODE: tl.constexpr, PER_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, NUM_SHARES: tl.constexpr, KEEPS_NONZERO: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    spot = block[:, None] * PER_BLOCK + tl.arange(0, PER_BLOCK)[None, :]
    free = tl.load(free_ptr + spot, mask=inside[:, None], other=0.0)
    curvature = tl.load(curvature_ptr + spot, mask=inside[:, None], other=0.0)
    unit = tl.load(unit_ptr + block // blocks_per_row, mask=inside, other=1.0)
    peak = tl.max(tl.abs(free), 1)
    best, best_codes = tl.zeros_like(peak), tl.zeros_like(free)
    least = tl.full((BLOCKS,), float("inf"), tl.float32)
    for i in range(0, NUM_SHARES):
        d = peak / (tl.load(shares_ptr + i) * LAST)
        for _ in range(0, 2):
            m = FIRST + STEP * _codes_of(free, d, FIRST, STEP, LAST_CODE)
            square = tl.sum(curvature * m * m, 1)
            d = tl.where(square > 0, tl.sum(curvature * m * free, 1) / tl.maximum(square, 1e-30), d)
        stored = tl.minimum(tl.maximum(d * unit, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
        if KEEPS_NONZERO:
            tiny = tl.where(d < 0, -5.960464477539063e-8, 5.960464477539063e-8)
            stored = tl.where((stored == 0) & (d != 0), tiny, stored)
        d = stored / unit
        codes = _codes_of(free, d, FIRST, STEP, LAST_CODE)
        rest = free - d[:, None] * (FIRST + STEP * codes)
        error = tl.sum(curvature * rest * rest, 1)
        better = error < least
        least = tl.where(better, error, least)
        best = tl.where(better, d, best)
        best_codes = tl.where(better[:, None], codes, best_codes)
    tl.store(d_ptr + block, best, mask=inside)
    tl.store(codes_ptr + spot, best_codes.to(tl.int64), mask=inside[:, None])


@triton.jit
def _store_shifts(
    shifts_ptr, row, inside, num_columns, offsets, SHIFT: tl.constexpr, SHIFT_WIDTH: tl.constexpr,
    SUB_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    runs: tl.constexpr = SUB_BLOCK // SHIFT_WIDTH
    shifts = tl.max(tl.reshape(offsets / SHIFT, (ROWS, runs, SHIFT_WIDTH)), 2)
    place = row[:, None] * (num_columns // SHIFT_WIDTH) + tl.program_id(1) * runs + tl.arange(0, runs)[None, :]
    tl.store(shifts_ptr + place, shifts, mask=inside[:, None])


@jit_for_any_rows
def _search_kernel(
    values_ptr, shifts_ptr, a_ptr, b_ptr, x_ptr, metric_ptr, num_rows, num_columns, metric_stride, words_ptr, pairs_ptr,
    HAS_MINIMUMS: tl.constexpr,
    KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, NUM_WORDS: tl.constexpr, WORD: tl.constexpr,
    SHIFT: tl.constexpr, SHIFT_WIDTH: tl.constexpr, SUB_BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    x, metric, metric_ptr, spot, row, inside = _tile(
        x_ptr, metric_ptr, num_rows, num_columns, metric_stride, SUB_BLOCK, ROWS
    )
    place = row * (num_columns // SUB_BLOCK) + tl.program_id(1)
    a = tl.load(a_ptr + place, mask=inside, other=0.0)
    b = tl.zeros_like(a)
    if HAS_MINIMUMS:
        b = tl.load(b_ptr + place, mask=inside, other=0.0)
    values, offsets = _codewords(
        x, a, b, metric, metric_ptr, words_ptr, pairs_ptr, KIND, LOW, HIGH, NUM_WORDS, WORD, SHIFT, SHIFT_WIDTH,
        GROUP, False,
    )  # fmt: skip
    tl.store(values_ptr + spot, values, mask=inside[:, None])
    if SHIFT != 0:
        _store_shifts(shifts_ptr, row, inside, num_columns, offsets, SHIFT, SHIFT_WIDTH, SUB_BLOCK, ROWS)


@jit_for_any_rows
def _neighbours_kernel(
    values_ptr, scales_ptr, mins_ptr, shifts_ptr, d_ptr, dmin_ptr, multipliers_ptr, steps_ptr, x_ptr, metric_ptr,
    num_rows, num_columns, metric_stride, words_ptr, pairs_ptr,
    HAS_MINIMUMS: tl.constexpr, SUPER_BLOCK: tl.constexpr, NUM_STEPS: tl.constexpr, LAST_SCALE: tl.constexpr,
    LAST_MINIMUM: tl.constexpr,
    KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, NUM_WORDS: tl.constexpr, WORD: tl.constexpr,
    SHIFT: tl.constexpr, SHIFT_WIDTH: tl.constexpr, SUB_BLOCK: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    x, metric, metric_ptr, spot, row, inside = _tile(
        x_ptr, metric_ptr, num_rows, num_columns, metric_stride, SUB_BLOCK, ROWS
    )
    place = row * (num_columns // SUB_BLOCK) + tl.program_id(1)
    block = row * (num_columns // SUPER_BLOCK) + tl.program_id(1) * SUB_BLOCK // SUPER_BLOCK
    d = tl.load(d_ptr + block, mask=inside, other=0.0)
    code = tl.load(scales_ptr + place, mask=inside, other=0).to(tl.int32)
    minimum, dmin = tl.zeros_like(code), tl.zeros_like(d)
    if HAS_MINIMUMS:
        dmin = tl.load(dmin_ptr + block, mask=inside, other=0.0)
        minimum = tl.load(mins_ptr + place, mask=inside, other=0).to(tl.int32)
    best_values, best_offsets = tl.load(values_ptr + spot, mask=inside[:, None], other=0.0), tl.zeros_like(x)
    if SHIFT != 0:
        shift = (
            row[:, None] * (num_columns // SHIFT_WIDTH)
            + ((tl.program_id(1) * SUB_BLOCK + tl.arange(0, SUB_BLOCK)) // SHIFT_WIDTH)[None, :]
        )
        best_offsets = SHIFT * tl.load(shifts_ptr + shift, mask=inside[:, None], other=0.0)
    a, b = d * tl.load(multipliers_ptr + code), dmin * minimum.to(tl.float32)
    rest = x - a[:, None] * (best_values + best_offsets) + b[:, None]
    least = tl.sum(rest * rest * metric, 1)
    best_code, best_minimum = code, minimum
    for i in range(0, NUM_STEPS):
        trial = tl.minimum(tl.maximum(code + tl.load(steps_ptr + 2 * i), 0), LAST_SCALE)
        a, b = d * tl.load(multipliers_ptr + trial), tl.zeros_like(d)
        trial_minimum = minimum
        if HAS_MINIMUMS:
            trial_minimum = tl.minimum(tl.maximum(minimum + tl.load(steps_ptr + 2 * i + 1), 0), LAST_MINIMUM)
            b = dmin * trial_minimum.to(tl.float32)
        values, offsets = _codewords(
            x, a, b, metric, metric_ptr, words_ptr, pairs_ptr, KIND, LOW, HIGH, NUM_WORDS, WORD, SHIFT, SHIFT_WIDTH,
            GROUP, False,
        )  # fmt: skip
        rest = x - a[:, None] * (values + offsets) + b[:, None]
        error = tl.sum(rest * rest * metric, 1)
        better = error < least
        least = tl.where(better, error, least)
        best_code, best_minimum = tl.where(better, trial, best_code), tl.where(better, trial_minimum, best_minimum)
        best_values = tl.where(better[:, None], values, best_values)
        best_offsets = tl.where(better[:, None], offsets, best_offsets)
    tl.store(scales_ptr + place, best_code, mask=inside)
    if HAS_MINIMUMS:
        tl.store(mins_ptr + place, best_minimum, mask=inside)
    if SHIFT != 0:
        _store_shifts(shifts_ptr, row, inside, num_columns, best_offsets, SHIFT, SHIFT_WIDTH, SUB_BLOCK, ROWS)
    tl.store(values_ptr + spot, best_values, mask=inside[:, None])
