"""Error feedback: what rounding one group of columns loses, the columns after it make up for.

The loss of a row is e H eᵀ with e = weights - decoded and H the second moment of the layer's input. With the block
factorisation H = U Uᵀ, U upper triangular, it is a sum over groups g of

    |(e_g + sum_{h<g} e_h U_hg U_gg⁻¹) U_gg|²

so that, groups being rounded in order, each should round x_g + sum_{h<g} e_h U_hg U_gg⁻¹ under the metric U_gg U_ggᵀ
(LDLQ, arXiv:2307.13304; the same as GPTQ, arXiv:2210.17323, with groups of the codebook's width). The metric is taken
by its diagonal; `descent` makes up for what that loses. Scales, minimums and shifts are frozen during the pass.

Rows make up for rows before them likewise, where G, the second moment of gradients of the outputs, is known: the loss
of a matrix is then tr(G E H Eᵀ), G and H the Kronecker factors of the Hessian of the KL (YAQA, arXiv:2505.22988). With
G = U Uᵀ it is a sum over groups of rows of

    |U_ggᵀ (E_g + sum_{h<g} (U_hg U_gg⁻¹)ᵀ E_h)|²  under H

so that each should encode W_g + sum_{h<g} (U_hg U_gg⁻¹)ᵀ E_h. Within a group rows are independent, as if U_gg U_ggᵀ
were diagonal: of 256 rows, groups of 32 gain more than twice what halves do.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from dynquant.encoding.parts import as_slice, ranges
from dynquant.encoding.search.compiled.jit import ROWS
from dynquant.encoding.search.layouts import Fields
from dynquant.encoding.search.rows import Rows

CHUNK = 64
"""Columns whose mutual feedback is applied at once; feedback from earlier ones comes in one product."""
_MOST_COLUMNS = 46340
"""Kernels count the places of a hessian with 32 bits."""
_FEWEST_ROWS = 16
"""In a group: fewer take no less time."""
_GROUPS = 8


def upper_factor(hessian: Tensor) -> Tensor:
    """U [E, C, C], upper triangular, with hessian = U Uᵀ.

    Raises:
        torch.linalg.LinAlgError: a hessian is not positive definite; damping belongs to the caller.
    """
    reversed_factor = torch.linalg.cholesky(hessian.flip(-1, -2).to(torch.float64))  # lower; upper once flipped
    return reversed_factor.to(torch.float32).flip(-1, -2)


def has_kernels(rows: Rows) -> bool:
    """Tell whether Triton's kernels search these rows, in passes over all columns."""
    fits = rows.x.shape[-1] <= _MOST_COLUMNS
    return fits and not rows.is_plain and rows.x.is_cuda and find_spec("triton") is not None


def feed_back(rows: Rows, fields: Fields, factor: Tensor) -> Tensor:
    """Values [E, R, C] of one pass; `factor` is `upper_factor` of the hessian."""
    if has_kernels(rows):
        from dynquant.encoding.search import column_kernels

        return column_kernels.feed_back(rows, fields, factor)
    x, group = rows.x, rows.layout.codebook.group
    spread = rows.spread(fields)
    values, errors = torch.empty_like(x), torch.empty_like(x)
    for start in range(0, x.shape[-1], CHUNK):
        stop = min(start + CHUNK, x.shape[-1])
        earlier = errors[..., :start] @ factor[:, :start, start:stop]
        for first in range(start, stop, group):
            columns = slice(first, first + group)
            pending = earlier[..., first - start : first - start + group]
            if first > start:
                pending = pending + errors[..., start:first] @ factor[:, start:first, columns]
            diagonal = factor[:, columns, columns]
            if group == 1:
                pending = pending / diagonal
            else:
                pending = torch.linalg.solve_triangular(diagonal, pending, upper=True, left=False)
            target = spread.targets(x[..., columns] + pending, columns)
            values[..., columns] = rows.layout.codebook.nearest(target, diagonal.square().sum(-1))
            errors[..., columns] = x[..., columns] - spread.decoded(values[..., columns], columns)
    return values


def encode_in_turn(weights: Tensor, output_hessian: Tensor, encode: Callable[[slice, Tensor], Tensor]) -> None:
    """Have `encode` encode groups of rows of `weights` [E, R, C] in order; it returns what they are decoded to.

    `output_hessian` is [E or 1, R, R], on the device of the weights.
    """
    num_rows = weights.shape[1]
    group = min(ROWS, -(-num_rows // (_GROUPS * _FEWEST_ROWS)) * _FEWEST_ROWS)
    factor, errors = upper_factor(output_hessian), torch.empty_like(weights)
    for rows in map(as_slice, ranges(num_rows, group)):
        target = weights[:, rows]
        if rows.start:
            pending = _products(factor[:, : rows.start, rows].mT, errors[:, : rows.start])
            target = target + torch.linalg.solve_triangular(factor[:, rows, rows].mT, pending, upper=False)
        errors[:, rows] = weights[:, rows] - encode(rows, target)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return left [E or 1, R, K] @ right [E, K, C]; on a CPU one by one: products of several matrices would round in
    other ways, and experts are to have the same blocks in any company."""
    if right.is_cuda:
        return left @ right
    return torch.stack([a @ b for a, b in zip(left.expand(len(right), -1, -1), right, strict=True)])
