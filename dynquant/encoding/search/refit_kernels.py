"""Triton: the equations from which all super-block scales of a row follow together.

They are set up for the change of the scales, with the errors at hand on the right side: what products on tensor cores
round then spoils a small correction and not the scales.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynquant.encoding.search.codeword_kernels import jit_for_any_rows
from dynquant.encoding.search.column_kernels import product
from dynquant.encoding.search.layouts import Fields
from dynquant.encoding.search.rows import Rows
from dynquant.encoding.search.scales import merged

_ROWS = 32
_LARGEST_BLOCK = 256
_LARGEST_SYSTEM = 128
"""Unknowns of a row that fit in a program."""
_RIDGE = 1e-7
"""Added to the diagonal, relative to its mean: super-blocks of zeros have no equation."""


def serves(rows: Rows) -> bool:
    """Tell whether a super-block of some rows fits in a program."""
    width = rows.layout.super_block
    return 16 <= width <= _LARGEST_BLOCK and width & (width - 1) == 0


def refit(rows: Rows, fields: Fields, values: Tensor, hessian: Tensor) -> Fields:
    """As `descent.refit`, for types that store scales."""
    units, errors = torch.stack(rows.units(fields, values)), rows.x - rows.decoded(fields, values)
    left, right = _equations(units, errors, hessian, rows.layout.super_block)
    present = fields.d if fields.dmin is None else torch.cat((fields.d, fields.dmin), dim=-1)
    solution = rows.rounded(present + _solved(left, right))
    step = (solution - present).unsqueeze(-1)
    change = ((left @ step - 2 * right.unsqueeze(-1)) * step).sum((-2, -1))
    blocks = fields.d.shape[-1]
    new = replace(fields, d=solution[..., :blocks], dmin=None if fields.dmin is None else solution[..., blocks:])
    better = (change < 0).unsqueeze(-1).expand_as(fields.d)
    return merged(better, (new, values), (fields, values))[0]


def _equations(units: Tensor, errors: Tensor, hessian: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Matrices [E, R, k B, k B] and right sides [E, R, k B] for the coefficients of `units` [k, E, R, C]."""
    kinds, experts, num_rows, columns = units.shape
    size = kinds * columns // width
    left = torch.empty(experts, num_rows, size, size, device=units.device)
    right = torch.empty(experts, num_rows, size, device=units.device)
    _equations_kernel[triton.cdiv(num_rows, _ROWS), columns // width, experts](
        left, right, units, errors, hessian, num_rows, columns, units.stride(0), *hessian.stride()[:2],
        KINDS=kinds, BLOCK=width, ROWS=_ROWS, num_warps=8, num_stages=3,
    )  # fmt: skip
    return left, right


def _solved(left: Tensor, right: Tensor) -> Tensor:
    """Solutions [E, R, n] of left [E, R, n, n] times solution = right [E, R, n], left being symmetric and positive."""
    size = right.shape[-1]
    if size > _LARGEST_SYSTEM:
        ridge = _RIDGE * left.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
        left = left.to(torch.float64) + torch.diag_embed(ridge.expand_as(right).to(torch.float64))
        return torch.linalg.solve_ex(left, right.to(torch.float64).unsqueeze(-1)).result.squeeze(-1).to(torch.float32)
    solution, width = torch.empty_like(right), max(16, triton.next_power_of_2(size))
    _solve_kernel[(right[..., 0].numel(),)](
        solution, left, right, size, RIDGE=_RIDGE, SIZE=width, num_warps=max(1, width * width // 1024)
    )
    return solution


@triton.jit
def _solve_kernel(solution_ptr, left_ptr, right_ptr, size, RIDGE: tl.constexpr, SIZE: tl.constexpr):
    """Gauss-Jordan elimination in float64; what is symmetric and positive needs no pivots."""
    system = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    left = tl.load(left_ptr + (system * size + i) * size + j, mask=(i < size) & (j < size), other=0.0).to(tl.float64)
    right = tl.load(right_ptr + system * size + i, mask=i < size, other=0.0).to(tl.float64)
    ridge = RIDGE * tl.sum(tl.sum(tl.where(i == j, left, 0.0), 1), 0) / size + 1.1754943508222875e-38
    left += tl.where(i == j, ridge, 0.0)
    for c in range(0, size):
        column = tl.sum(tl.where(j == c, left, 0.0), 1)[:, None]
        row = tl.sum(tl.where(i == c, left, 0.0), 0)[None, :]
        share = tl.where(i == c, 0.0, column / tl.sum(tl.where(j == c, row, 0.0), 1)[:, None])
        left -= share * row
        right -= share * tl.sum(tl.where(i == c, right, 0.0), 0)[None, :]
    diagonal = tl.sum(tl.where(i == j, left, 0.0), 1)[:, None]
    tl.store(solution_ptr + system * size + i, (right / diagonal).to(tl.float32), mask=i < size)


@jit_for_any_rows
def _equations_kernel(
    left_ptr, right_ptr, units_ptr, errors_ptr, hessian_ptr, num_rows, num_columns, kind_stride, expert_stride,
    row_stride,
    KINDS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    expert, here = tl.program_id(2).to(tl.int64), tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    row = expert * num_rows + rows
    line = row * num_columns
    blocks = num_columns // BLOCK
    size = KINDS * blocks
    hessian_ptr += expert * expert_stride
    spot = line[:, None] + (here * BLOCK + tl.arange(0, BLOCK))[None, :]
    pulled = product(
        errors_ptr, line, inside, hessian_ptr, row_stride, here * BLOCK, 0, num_columns, num_columns, BLOCK, ROWS,
        "tf32",
    )  # fmt: skip
    for k in range(0, KINDS):
        unit = tl.load(units_ptr + k * kind_stride + spot, mask=inside[:, None], other=0.0)
        tl.store(right_ptr + row * size + k * blocks + here, tl.sum(pulled * unit, 1), mask=inside)
    for other in range(0, KINDS * (here + 1)):
        block, kind = other // KINDS, other % KINDS
        pulled = product(
            units_ptr + kind * kind_stride, line, inside, hessian_ptr, row_stride, here * BLOCK, block * BLOCK,
            block * BLOCK + BLOCK, num_columns, BLOCK, ROWS, "tf32x3",  # they may be nearly dependent
        )  # fmt: skip
        for k in range(0, KINDS):
            unit = tl.load(units_ptr + k * kind_stride + spot, mask=inside[:, None], other=0.0)
            entry = tl.sum(pulled * unit, 1)
            mine, theirs = k * blocks + here, kind * blocks + block
            tl.store(left_ptr + (row * size + theirs) * size + mine, entry, mask=inside)
            tl.store(left_ptr + (row * size + mine) * size + theirs, entry, mask=inside)
