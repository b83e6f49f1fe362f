"""Products of some dozens to hundreds of rows with planar weights, decoded inside the matrix product.

Where `two_pass` would cut a matrix into slices too narrow to keep a GPU busy, and no dense weight is ever stored.
"""

from functools import partial

import torch
from torch import Tensor

from dynquant.formats.quant_types import quant_type
from dynquant.kernels import shapes
from dynquant.kernels.triton.tiles import multiply_tiles, tile_config


def supports(type_name: str, x: Tensor) -> bool:
    """Return whether tensor cores take these activations; float32 has none that are exact enough."""
    return x.dtype in (torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, type_name: str, *, transposed: bool = False) -> Tensor:
    """x [M, K] times planar rows uint8 [N, row_bytes] transposed: [M, N]. Both are contiguous."""
    stored = quant_type(type_name)
    product = x.new_empty(len(x), shapes.row_length(weight, stored) if transposed else len(weight))
    return multiply_tiles(product, x, weight, stored, transposed, tile_config(len(x), x.dtype))


input_grad = partial(linear, transposed=True)
"""dy [M, N] times planar rows uint8 [N, row_bytes]: [M, K]. Both are contiguous."""
