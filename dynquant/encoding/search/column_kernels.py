"""Triton: error feedback and coordinate descent over all columns of a matrix, for every codebook.

Columns depend on each other, rows do not: a program takes some rows of an expert through all columns, one group of the
codebook at a time. What the groups of the other chunks give to a chunk is one product on tensor cores, read back from
the errors that the program has written before; inside a chunk it is added as groups are rounded. Column by
column from the host the same passes are some fifteen launches for each of thousands of columns, and the GPU waits.
"""

from collections.abc import Callable, MutableMapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dynquant.encoding.search.codeword_kernels import book_arguments, group_of, jit_for_any_rows, nearest, times
from dynquant.encoding.search.layouts import SHIFT, Fields
from dynquant.encoding.search.rows import Rows

_parts: MutableMapping[Tensor, dict[tuple, tuple[int, tuple[Tensor, ...]]]] = WeakTensorKeyDictionary()
_ROWS = 16
PRECISION = "tf32"
"""Precision of products with hessians and factors. Targets move by a thousandth of what other columns give to them: the
loss is within 0.5 % of what exact products give, also with channels a thousand times as strong as others."""
STAGES = 5
"""Tiles of a product on their way: a program with few others beside it waits for memory and little else."""


def feed_back(rows: Rows, fields: Fields, factor: Tensor) -> Tensor:
    """As `feedback.feed_back`."""
    group = rows.layout.codebook.group
    values, errors = torch.empty_like(rows.x), torch.empty_like(rows.x)
    weights, metric = of_each_expert(relative_factor, factor, group)
    _feed_back_kernel[grid(rows)](
        errors, values, weights, metric, *arguments(rows, fields), *weights.stride()[:2], metric.stride(0),
        **walk_constants(rows),
    )  # fmt: skip
    return values


def descend(rows: Rows, fields: Fields, values: Tensor, hessian: Tensor) -> Tensor:
    """As `descent.descend`."""
    group = rows.layout.codebook.group
    values, errors = values.clone(), rows.x - rows.decoded(fields, values)
    hessian, (inverse,) = dense(hessian), of_each_expert(inverse_blocks, hessian, group)
    _descend_kernel[grid(rows)](
        errors, values, hessian, inverse, *arguments(rows, fields), *hessian.stride()[:2], inverse.stride(0),
        **walk_constants(rows),
    )  # fmt: skip
    return values


def grid(rows: Rows) -> tuple[int, int]:
    experts, num_rows, _ = rows.x.shape
    return triton.cdiv(num_rows, _ROWS), experts


def arguments(rows: Rows, fields: Fields) -> tuple[object, ...]:
    """Weights, scales and minimums of sub-blocks, shifts, sizes."""
    a, b = rows.scales(fields), rows.minimums(fields)
    return (
        rows.x, a, a if b is None else b, a if fields.shifts is None else fields.shifts,
        rows.x.shape[1], rows.x.shape[2],
    )  # fmt: skip


def constants(rows: Rows) -> dict[str, object]:
    """Return the codebook and what blocks look like."""
    layout = rows.layout
    return book_arguments(layout.codebook, rows.x.device) | {
        "HAS_MINIMUMS": layout.num_mins > 0, "SHIFT": SHIFT if layout.shift_width else 0.0, "ROWS": _ROWS,
        "SHIFT_WIDTH": layout.shift_width or 1, "SUB_BLOCK": layout.sub_block, "GROUP": layout.codebook.group,
    }  # fmt: skip


def walk_constants(rows: Rows) -> dict[str, object]:
    """Return these for a walk over columns, and what runs it best."""
    num_warps = 4 if rows.layout.codebook.group == 1 else 8  # four have too few registers for words
    return constants(rows) | {"WIDTH": 64, "PRECISION": PRECISION, "num_warps": num_warps, "num_stages": STAGES}


def of_each_expert(function: Callable[..., tuple[Tensor, ...]], squares: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """`function` of squares [E, C, C] and widths; once where all experts have the same.

    It is kept as long as the squares are, and must not be these: groups of rows that are encoded in turn have the same.
    """
    kept, key = _parts.setdefault(squares, {}), (function, *widths)
    version, parts = kept.get(key, (-1, ()))
    if version != squares._version:
        if squares.stride(0) == 0:
            parts = tuple(t.expand(len(squares), *t.shape[1:]) for t in function(squares[:1], *widths))
        else:
            parts = function(squares, *widths)
        kept[key] = squares._version, parts
    return parts


def relative_factor(factor: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """U_hg U_gg^-1 for an upper factor U [E, C, C], and the diagonals [E, C] of all U_gg U_gg^T."""
    if group == 1:
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        return (factor / diagonal.unsqueeze(-2)).contiguous(), diagonal.square()
    blocks = diagonal_blocks(factor, group)
    identity = torch.eye(group, device=factor.device).expand_as(blocks)
    inverse = torch.linalg.solve_triangular(blocks, identity, upper=True)
    columns = factor.unflatten(-1, (-1, group)).movedim(-2, 1)  # [E, C / group, C, group]
    return (columns @ inverse).movedim(1, -2).flatten(-2), blocks.square().sum(-1).flatten(1)


def dense(squares: Tensor) -> Tensor:
    """Return squares [E, C, C] with contiguous matrices; one where all experts have the same."""
    return squares[:1].contiguous().expand_as(squares) if squares.stride(0) == 0 else squares.contiguous()


def inverse_blocks(hessian: Tensor, group: int) -> tuple[Tensor]:
    """[E, C, group]: inverses of the square blocks along the diagonal, one below the other."""
    if group == 1:
        return (hessian.diagonal(dim1=-2, dim2=-1).reciprocal().unsqueeze(-1),)
    # `inv_ex` does not wait for the device; blocks of what has a factor have an inverse
    return (torch.linalg.inv_ex(diagonal_blocks(hessian, group)).inverse.flatten(1, 2),)


def diagonal_blocks(square: Tensor, width: int) -> Tensor:
    """[E, C, C] -> [E, C / width, width, width]."""
    tiles = square.unflatten(-1, (-1, width)).unflatten(1, (-1, width))
    return tiles.diagonal(dim1=1, dim2=3).movedim(-1, 1)


@triton.jit
def product(
    left_ptr, line, inside, square_ptr, row_stride, start, begin, end, num_columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """left [ROWS, begin : end] @ square [begin : end, start : start + WIDTH].

    `line` are the places of rows, of which `inside` marks true ones.
    """
    STEP: tl.constexpr = 32 if WIDTH > 64 else 64
    columns = start + tl.arange(0, WIDTH)[None, :]
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(begin, end, STEP):
        k = first + tl.arange(0, STEP)
        left = tl.load(left_ptr + line[:, None] + k[None, :], mask=inside[:, None] & (k < end)[None, :], other=0.0)
        right = tl.load(
            square_ptr + k[:, None] * row_stride + columns, mask=(k < end)[:, None] & (columns < num_columns), other=0.0
        )
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums


@triton.jit
def slopes_at(
    errors_ptr, line, inside, hessian_ptr, row_stride, start, num_columns,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Half the gradient [ROWS, WIDTH] of the loss by the columns from `start` on, before errors of theirs change."""
    slopes = product(
        errors_ptr, line, inside, hessian_ptr, row_stride, start, 0, num_columns, num_columns, WIDTH, ROWS, PRECISION
    )
    tl.debug_barrier()  # all errors are read before some of them change
    return slopes


@triton.jit
def rows_of_program(num_rows, num_columns, ROWS: tl.constexpr):
    """Expert of a program, its rows counted over all experts, their first weights, and what marks true rows."""
    expert = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = expert * num_rows + rows
    return expert, row, row * num_columns, rows < num_rows


@triton.jit
def inverse_of(a):
    return tl.where(a != 0, 1.0 / a, 0.0)


@jit_for_any_rows
def _feed_back_kernel(
    errors_ptr, values_ptr, weights_ptr, metric_ptr, x_ptr, a_ptr, b_ptr, shifts_ptr, num_rows, num_columns,
    expert_stride, row_stride, metric_stride, words_ptr, pairs_ptr,
    KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, NUM_WORDS: tl.constexpr, WORD: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr, SHIFT: tl.constexpr, SHIFT_WIDTH: tl.constexpr, SUB_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert, row, line, inside = rows_of_program(num_rows, num_columns, ROWS)
    weights_ptr += expert * expert_stride
    metric_ptr += expert * metric_stride
    places = tl.arange(0, GROUP)
    chunk = tl.arange(0, WIDTH)
    for start in range(0, num_columns, WIDTH):
        pending = product(
            errors_ptr, line, inside, weights_ptr, row_stride, start, 0, start, num_columns, WIDTH, ROWS, PRECISION
        )
        width = tl.minimum(WIDTH, num_columns - start)
        for g in range(0, width // GROUP):
            first = start + g * GROUP
            spot = line[:, None] + (first + places)[None, :]
            x = tl.load(x_ptr + spot, mask=inside[:, None], other=0.0)
            scale = row * (num_columns // SUB_BLOCK) + first // SUB_BLOCK
            a = tl.load(a_ptr + scale, mask=inside, other=0.0)[:, None]
            target = x + group_of(pending, g, GROUP)
            if HAS_MINIMUMS:
                b = tl.load(b_ptr + scale, mask=inside, other=0.0)[:, None]
                target += b
            target *= inverse_of(a)
            if SHIFT != 0:
                shift = row * (num_columns // SHIFT_WIDTH) + first // SHIFT_WIDTH
                offset = SHIFT * tl.load(shifts_ptr + shift, mask=inside, other=0.0)[:, None]
                target -= offset
            metric = tl.load(metric_ptr + first + places)
            value = nearest(target, metric, words_ptr, pairs_ptr, KIND, LOW, HIGH, NUM_WORDS, WORD)
            tl.store(values_ptr + spot, value, mask=inside[:, None])
            if SHIFT != 0:
                value += offset
            error = x - a * value
            if HAS_MINIMUMS:
                error += b
            tl.store(errors_ptr + spot, error, mask=inside[:, None])
            later = tl.load(
                weights_ptr + (first + places)[:, None] * row_stride + (start + chunk)[None, :],
                mask=(chunk < width)[None, :], other=0.0,
            )  # fmt: skip
            pending += times(error, later)
        tl.debug_barrier()  # other threads of the program read these errors


@jit_for_any_rows
def _descend_kernel(
    errors_ptr, values_ptr, hessian_ptr, inverse_ptr, x_ptr, a_ptr, b_ptr, shifts_ptr, num_rows, num_columns,
    expert_stride, row_stride, inverse_stride, words_ptr, pairs_ptr,
    KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, NUM_WORDS: tl.constexpr, WORD: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr, SHIFT: tl.constexpr, SHIFT_WIDTH: tl.constexpr, SUB_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert, row, line, inside = rows_of_program(num_rows, num_columns, ROWS)
    hessian_ptr += expert * expert_stride
    inverse_ptr += expert * inverse_stride
    places = tl.arange(0, GROUP)
    chunk = tl.arange(0, WIDTH)
    for start in range(0, num_columns, WIDTH):
        slopes = slopes_at(
            errors_ptr, line, inside, hessian_ptr, row_stride, start, num_columns, WIDTH, ROWS, PRECISION
        )
        width = tl.minimum(WIDTH, num_columns - start)
        for g in range(0, width // GROUP):
            first = start + g * GROUP
            spot = line[:, None] + (first + places)[None, :]
            x = tl.load(x_ptr + spot, mask=inside[:, None], other=0.0)
            error = tl.load(errors_ptr + spot, mask=inside[:, None], other=0.0)
            old = tl.load(values_ptr + spot, mask=inside[:, None], other=0.0)
            scale = row * (num_columns // SUB_BLOCK) + first // SUB_BLOCK
            a = tl.load(a_ptr + scale, mask=inside, other=0.0)[:, None]
            slope = group_of(slopes, g, GROUP)
            solver = tl.load(inverse_ptr + (first + places)[:, None] * GROUP + places[None, :])
            target = x - error + times(slope, solver)
            if HAS_MINIMUMS:
                target += tl.load(b_ptr + scale, mask=inside, other=0.0)[:, None]
            target *= inverse_of(a)
            if SHIFT != 0:
                shift = row * (num_columns // SHIFT_WIDTH) + first // SHIFT_WIDTH
                target -= SHIFT * tl.load(shifts_ptr + shift, mask=inside, other=0.0)[:, None]
            metric = tl.load(hessian_ptr + (first + places) * (row_stride + 1))
            value = nearest(target, metric, words_ptr, pairs_ptr, KIND, LOW, HIGH, NUM_WORDS, WORD)
            step = a * (old - value)  # what the error grows by
            here = tl.load(hessian_ptr + (first + places)[:, None] * row_stride + (first + places)[None, :])
            change = tl.sum((2.0 * slope + times(step, here)) * step, 1)[:, None]
            step = tl.where(change < 0, step, 0.0)
            tl.store(values_ptr + spot, tl.where(change < 0, value, old), mask=inside[:, None])
            tl.store(errors_ptr + spot, error + step, mask=inside[:, None])
            others = tl.load(
                hessian_ptr + (first + places)[:, None] * row_stride + (start + chunk)[None, :],
                mask=(chunk < width)[None, :], other=0.0,
            )  # fmt: skip
            slopes += times(step, others)
        tl.debug_barrier()  # other threads of the program read these errors
