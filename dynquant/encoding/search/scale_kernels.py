"""Triton: coordinate descent over the scale codes of sub-blocks, each tried with codewords found anew.

As in `column_kernels` a program takes some rows through all columns, here one sub-block at a time: its present fields
and all trials are judged in registers, each trial by error feedback within the sub-block.
"""

from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from dynquant.encoding.search import column_kernels
from dynquant.encoding.search.codeword_kernels import group_of, jit_for_any_rows, nearest, times, with_group
from dynquant.encoding.search.column_kernels import inverse_of, rows_of_program, slopes_at
from dynquant.encoding.search.layouts import Fields
from dynquant.encoding.search.rows import Rows


def descend_scales(rows: Rows, fields: Fields, values: Tensor, hessian: Tensor) -> tuple[Fields, Tensor]:
    """As `descent.descend_scales`."""
    layout = rows.layout
    if len(layout.multipliers) == 1:
        return fields, values
    values, errors = values.clone(), rows.x - rows.decoded(fields, values)
    fields = fields.map(Tensor.clone)
    parts = column_kernels.of_each_expert(_sub_block_parts, hessian, layout.sub_block, layout.codebook.group)
    hessian = column_kernels.dense(hessian)
    steps = _trials(layout.num_mins > 0, layout.shift_width == layout.sub_block, rows.x.device)
    _descend_scales_kernel[column_kernels.grid(rows)](
        errors, values, fields.scales, fields.scales if fields.mins is None else fields.mins,
        fields.d if fields.shifts is None else fields.shifts,
        hessian, *parts, layout.multiplier_table(rows.x.device), steps, rows.x, fields.d,
        fields.d if fields.dmin is None else fields.dmin, rows.x.shape[1], rows.x.shape[2],
        *hessian.stride()[:2], parts[0].stride(0), parts[-1].stride(0),
        **trial_constants(rows),
    )  # fmt: skip
    return fields, values


def trial_constants(rows: Rows) -> dict[str, object]:
    """Return the constants of a walk, and which trials there are."""
    layout = rows.layout
    flips = layout.shift_width == layout.sub_block
    return column_kernels.walk_constants(rows) | {
        "SUPER_BLOCK": layout.super_block, "TRIALS": len(_trials(layout.num_mins > 0, flips, rows.x.device)),
        "FLIPS": flips, "LAST_SCALE": len(layout.multipliers) - 1, "LAST_MINIMUM": layout.num_mins - 1,
    }  # fmt: skip


def _sub_block_parts(hessian: Tensor, width: int, group: int) -> tuple[Tensor, ...]:
    """Return what belongs to a hessian's squares of one sub-block along the diagonal.

    These are their inverses, their upper factors and the relative ones, one below the other [E, C, sub_block], and the
    metrics of groups [E, C].
    """
    blocks = column_kernels.diagonal_blocks(hessian, width)
    factors = torch.linalg.cholesky_ex(blocks.to(torch.float64).flip(-1, -2)).L.flip(-1, -2)
    factors = factors.to(torch.float32).contiguous().flatten(0, 1)
    inverse = torch.linalg.inv_ex(blocks).inverse
    relative, metric = column_kernels.relative_factor(factors, group)
    experts, columns = hessian.shape[:2]
    squares = (t.reshape(experts, columns, width).contiguous() for t in (inverse, factors, relative))
    return *squares, metric.reshape(experts, columns).contiguous()


@cache
def _trials(has_minimums: bool, flips: bool, device: torch.device) -> Tensor:
    """Steps of the scale code and of the minimum, and the sign of the shift, of each trial [n, 3]."""
    trials = [(0, 0, 1)]
    for step in (-1, 1):
        trials += [(step, 0, 1), (0, step, 1)] if has_minimums else [(step, 0, 1)]
    if flips:
        trials.append((0, 0, -1))
    return torch.tensor(trials, dtype=torch.int32, device=device)


@jit_for_any_rows
def _descend_scales_kernel(
    errors_ptr, values_ptr, scales_ptr, mins_ptr, shifts_ptr, hessian_ptr, inverse_ptr, factor_ptr, relative_ptr,
    metric_ptr, multipliers_ptr, steps_ptr, x_ptr, d_ptr, dmin_ptr, num_rows, num_columns,
    expert_stride, row_stride, block_stride, metric_stride, words_ptr, pairs_ptr,
    KIND: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, NUM_WORDS: tl.constexpr, WORD: tl.constexpr,
    HAS_MINIMUMS: tl.constexpr, SHIFT: tl.constexpr, SHIFT_WIDTH: tl.constexpr, SUB_BLOCK: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, SUPER_BLOCK: tl.constexpr,
    TRIALS: tl.constexpr, FLIPS: tl.constexpr, LAST_SCALE: tl.constexpr, LAST_MINIMUM: tl.constexpr,
):  # fmt: skip
    expert, row, line, inside = rows_of_program(num_rows, num_columns, ROWS)
    hessian_ptr += expert * expert_stride
    chunk = tl.arange(0, WIDTH)
    columns = tl.arange(0, SUB_BLOCK)
    for start in range(0, num_columns, WIDTH):
        slopes = slopes_at(
            errors_ptr, line, inside, hessian_ptr, row_stride, start, num_columns, WIDTH, ROWS, PRECISION
        )
        width = tl.minimum(WIDTH, num_columns - start)
        for s in range(0, width // SUB_BLOCK):
            first = start + s * SUB_BLOCK
            spot = line[:, None] + (first + columns)[None, :]
            x = tl.load(x_ptr + spot, mask=inside[:, None], other=0.0)
            error = tl.load(errors_ptr + spot, mask=inside[:, None], other=0.0)
            best_values = tl.load(values_ptr + spot, mask=inside[:, None], other=0.0)
            square = expert * block_stride + (first + columns)[:, None] * SUB_BLOCK + columns[None, :]
            pull = tl.dot(group_of(slopes, s, SUB_BLOCK), tl.load(inverse_ptr + square), input_precision="tf32x3")
            factor = tl.load(factor_ptr + square)
            target = x - error + pull
            best_error = pull  # what is left of the target by the present values
            lost = tl.dot(pull, factor, input_precision="tf32x3")
            least = tl.sum(lost * lost, 1)
            block = row * (num_columns // SUPER_BLOCK) + first // SUPER_BLOCK
            place = row * (num_columns // SUB_BLOCK) + first // SUB_BLOCK
            d = tl.load(d_ptr + block, mask=inside, other=0.0)
            code = tl.load(scales_ptr + place, mask=inside, other=0).to(tl.int32)
            best_code = code
            if HAS_MINIMUMS:
                dmin = tl.load(dmin_ptr + block, mask=inside, other=0.0)
                minimum = tl.load(mins_ptr + place, mask=inside, other=0).to(tl.int32)
                best_minimum = minimum
            best_flip = tl.full((ROWS,), 1.0, tl.float32)
            for trial in range(0, TRIALS):
                step = steps_ptr + 3 * trial
                trial_code = tl.minimum(tl.maximum(code + tl.load(step), 0), LAST_SCALE)
                trial_flip = tl.load(step + 2).to(tl.float32)
                b = tl.zeros((ROWS,), tl.float32)
                if HAS_MINIMUMS:
                    trial_minimum = tl.minimum(tl.maximum(minimum + tl.load(step + 1), 0), LAST_MINIMUM)
                    b = dmin * trial_minimum.to(tl.float32)
                a = d * tl.load(multipliers_ptr + trial_code)
                inverse = inverse_of(a)
                pending = target
                values = tl.zeros((ROWS, SUB_BLOCK), tl.float32)
                left = tl.zeros((ROWS, SUB_BLOCK), tl.float32)
                # as many as the sub-block has; a constant would have the loop unrolled, with too few registers
                for g in range(0, tl.minimum(SUB_BLOCK, num_columns) // GROUP):
                    groups = first + g * GROUP + tl.arange(0, GROUP)
                    y = (group_of(pending, g, GROUP) + b[:, None]) * inverse[:, None]
                    if SHIFT != 0:
                        shift = row * (num_columns // SHIFT_WIDTH) + (first + g * GROUP) // SHIFT_WIDTH
                        offset = SHIFT * trial_flip * tl.load(shifts_ptr + shift, mask=inside, other=0.0)[:, None]
                        y -= offset
                    metric = tl.load(metric_ptr + expert * metric_stride + groups)
                    value = nearest(y, metric, words_ptr, pairs_ptr, KIND, LOW, HIGH, NUM_WORDS, WORD)
                    values = with_group(values, g, value, GROUP)
                    if SHIFT != 0:
                        value += offset
                    rest = group_of(target, g, GROUP) - (a[:, None] * value - b[:, None])
                    left = with_group(left, g, rest, GROUP)
                    later = tl.load(
                        relative_ptr + expert * block_stride + groups[:, None] * SUB_BLOCK + columns[None, :]
                    )
                    pending += times(rest, later)
                lost = tl.dot(left, factor, input_precision="tf32x3")
                loss = tl.sum(lost * lost, 1)
                better = loss < least
                least = tl.where(better, loss, least)
                best_code = tl.where(better, trial_code, best_code)
                if HAS_MINIMUMS:
                    best_minimum = tl.where(better, trial_minimum, best_minimum)
                best_flip = tl.where(better, trial_flip, best_flip)
                best_values = tl.where(better[:, None], values, best_values)
                best_error = tl.where(better[:, None], left, best_error)
            tl.store(scales_ptr + place, best_code, mask=inside)
            if HAS_MINIMUMS:
                tl.store(mins_ptr + place, best_minimum, mask=inside)
            if FLIPS:
                shift = tl.load(shifts_ptr + place, mask=inside, other=0.0)
                tl.store(shifts_ptr + place, shift * best_flip, mask=inside)
            tl.store(values_ptr + spot, best_values, mask=inside[:, None])
            tl.store(errors_ptr + spot, error + best_error - pull, mask=inside[:, None])
            others = tl.load(
                hessian_ptr + (first + columns)[:, None] * row_stride + (start + chunk)[None, :],
                mask=(chunk < width)[None, :], other=0.0,
            )  # fmt: skip
            slopes = tl.dot(best_error - pull, others, slopes, input_precision=PRECISION)
        tl.debug_barrier()  # other threads of the program read these errors
