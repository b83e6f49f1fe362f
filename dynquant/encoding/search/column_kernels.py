"""Triton: error feedback and coordinate descent over the columns of one chunk, for types of one integer a weight.

Columns depend on each other, rows do not: a program takes some rows of an expert through all columns of the chunk, and
the host makes up for the rest of the matrix in one product. Column by column from the host the same passes are some
fifteen launches for each of thousands of columns, and the GPU waits.
"""

import triton
import triton.language as tl
from torch import Tensor

from dynquant.encoding.search.codebooks import Codebook, Integers
from dynquant.encoding.search.rows import Rows, Spread

_ROWS = 16


def serves(book: Codebook) -> bool:
    """Tell whether these kernels find the values of a codebook."""
    return isinstance(book, Integers)


def feed_back_chunk(
    rows: Rows, spread: Spread, earlier: Tensor, factor: Tensor, start: int, values: Tensor, errors: Tensor
) -> None:
    """Write values and errors [E, R, C] of the columns from `start` on, as many as `earlier` [E, R, width] has.

    `earlier` is what errors of the columns before give to these: their product with `factor` [E, C, C].
    """
    experts, num_rows, width = earlier.shape
    book, b = rows.layout.codebook, spread.a if spread.b is None else spread.b
    _feed_back_kernel[triton.cdiv(num_rows, _ROWS), experts](
        rows.x, earlier, spread.a, spread.inverse, b, factor, values, errors,
        num_rows, rows.x.shape[-1], start, *factor.stride(),
        LOW=book.low, HIGH=book.high, HAS_MINIMUMS=spread.b is not None, ROWS=_ROWS, WIDTH=width,
    )  # fmt: skip


def descend_chunk(
    rows: Rows,
    spread: Spread,
    decoded: Tensor,
    slope: Tensor,
    hessian: Tensor,
    start: int,
    steps: Tensor,
    values: Tensor,
) -> None:
    """Visit the columns from `start` on, as many as `steps` [E, R, width] has.

    Changes `values` [E, R, C] and writes `steps`, what errors grow by. `slope` [E, R, C] is half the gradient before
    the chunk, and stays.
    """
    experts, num_rows, width = steps.shape
    book, b = rows.layout.codebook, spread.a if spread.b is None else spread.b
    _descend_kernel[triton.cdiv(num_rows, _ROWS), experts](
        decoded, slope, spread.a, spread.inverse, b, hessian, steps, values,
        num_rows, rows.x.shape[-1], start, *hessian.stride(),
        LOW=book.low, HIGH=book.high, HAS_MINIMUMS=spread.b is not None, ROWS=_ROWS, WIDTH=width,
    )  # fmt: skip


@triton.jit
def _nearest(target, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.minimum(tl.maximum(tl.floor(target + 0.5), LOW), HIGH)  # halves go up; torch rounds them to even


@triton.jit
def _feed_back_kernel(
    x_ptr, earlier_ptr, a_ptr, inverse_ptr, b_ptr, factor_ptr, values_ptr, errors_ptr,
    num_rows, num_columns, start, expert_stride, row_stride, column_stride,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_MINIMUMS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    line = (expert * num_rows + rows) * num_columns + start
    short_line = (expert * num_rows + rows) * WIDTH
    before = tl.arange(0, WIDTH)
    square = factor_ptr + expert * expert_stride + (start + before) * row_stride + start * column_stride
    errors = tl.zeros((ROWS, WIDTH), tl.float32)
    for c in range(WIDTH):
        column = tl.load(square + c * column_stride, mask=before <= c, other=0.0)
        diagonal = tl.sum(tl.where(before == c, column, 0.0))
        x = tl.load(x_ptr + line + c, mask=inside, other=0.0)
        a = tl.load(a_ptr + line + c, mask=inside, other=0.0)
        b = tl.zeros((ROWS,), tl.float32)
        if HAS_MINIMUMS:
            b = tl.load(b_ptr + line + c, mask=inside, other=0.0)
        pending = tl.load(earlier_ptr + short_line + c, mask=inside, other=0.0) + tl.sum(errors * column[None, :], 1)
        target = (x + pending / diagonal + b) * tl.load(inverse_ptr + line + c, mask=inside, other=0.0)
        nearest = _nearest(target, LOW, HIGH)
        error = x - (a * nearest - b)
        tl.store(values_ptr + line + c, nearest, mask=inside)
        tl.store(errors_ptr + line + c, error, mask=inside)
        errors = tl.where((before == c)[None, :], error[:, None], errors)


@triton.jit
def _descend_kernel(
    decoded_ptr, slope_ptr, a_ptr, inverse_ptr, b_ptr, hessian_ptr, steps_ptr, values_ptr,
    num_rows, num_columns, start, expert_stride, row_stride, column_stride,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_MINIMUMS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    line = (expert * num_rows + rows) * num_columns + start
    short_line = (expert * num_rows + rows) * WIDTH
    columns = tl.arange(0, WIDTH)
    square = hessian_ptr + expert * expert_stride + start * row_stride + (start + columns) * column_stride
    slopes = tl.load(slope_ptr + line[:, None] + columns[None, :], mask=inside[:, None], other=0.0)
    for c in range(WIDTH):
        here = tl.load(square + c * row_stride)
        diagonal = tl.sum(tl.where(columns == c, here, 0.0))
        slope = tl.sum(tl.where((columns == c)[None, :], slopes, 0.0), 1)
        target = tl.load(decoded_ptr + line + c, mask=inside, other=0.0) + slope / diagonal
        if HAS_MINIMUMS:
            target += tl.load(b_ptr + line + c, mask=inside, other=0.0)
        target *= tl.load(inverse_ptr + line + c, mask=inside, other=0.0)
        nearest = _nearest(target, LOW, HIGH)
        value = tl.load(values_ptr + line + c, mask=inside, other=0.0)
        step = tl.load(a_ptr + line + c, mask=inside, other=0.0) * (value - nearest)
        better = (2.0 * slope + step * diagonal) * step < 0.0
        step = tl.where(better, step, 0.0)
        tl.store(values_ptr + line + c, tl.where(better, nearest, value), mask=inside)
        tl.store(steps_ptr + short_line + c, step, mask=inside)
        slopes += step[:, None] * here[None, :]
