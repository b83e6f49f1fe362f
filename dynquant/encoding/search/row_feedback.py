"""Error feedback across rows: what rounding some rows loses, the rows after them make up for.

The loss of a matrix under second moments H of its input and G of its outputs' gradients is tr(G E H Eᵀ), with
E = weights - decoded: G and H are the Kronecker factors of the Hessian of the KL (YAQA, arXiv:2505.22988). With
G = U Uᵀ, U upper triangular, it is a sum over groups g of rows

    |U_ggᵀ (E_g + sum_{h<g} (U_hg U_gg⁻¹)ᵀ E_h)|²  under H

so that, groups being encoded in order, each should encode W_g + sum_{h<g} (U_hg U_gg⁻¹)ᵀ E_h under H alone. Inside a
group rows are independent, as if U_gg U_ggᵀ were diagonal: of 256 rows, groups of 32 gain more than twice what halves
do. Tall matrices have more groups, and these as many rows as are searched at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dynquant.encoding.parts import as_slice, ranges
from dynquant.encoding.search.compiled.jit import ROWS
from dynquant.encoding.search.feedback import upper_factor

_FEWEST_ROWS = 16
"""In a group: fewer take no less time."""
_GROUPS = 8


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
            pending = factor[:, : rows.start, rows].mT @ errors[:, : rows.start]
            target = target + torch.linalg.solve_triangular(factor[:, rows, rows].mT, pending, upper=False)
        errors[:, rows] = weights[:, rows] - encode(rows, target)
