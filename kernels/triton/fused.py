"""Products of some dozens to hundreds of rows with planar weights, decoded inside the matrix product.

Where `two_pass` would cut a matrix into slices too narrow to keep a GPU busy, and no dense weight is ever stored.
"""

import torch
from torch import Tensor

from dynquant.formats.quant_types import quant_type
from dynquant.kernels import shapes
from dynquant.kernels.triton import tiles


def supports(type_name: str, x: Tensor) -> bool:
    """Return whether tensor cores take these activations; float32 has none that are exact enough."""
    return x.dtype in (torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, type_name: str) -> Tensor:
    """x [M, K] times planar rows uint8 [N, row_bytes] transposed: [M, N]. Both are contiguous."""
    product, config = x.new_empty(len(x), len(weight)), tiles.linear_config(len(x), x.dtype)
    return tiles.linear(product, x, weight, quant_type(type_name), config)


def input_grad(dy: Tensor, weight: Tensor, type_name: str) -> Tensor:
    """dy [M, N] times planar rows uint8 [N, row_bytes]: [M, K]. Both are contiguous."""
    stored = quant_type(type_name)
    product = dy.new_empty(len(dy), shapes.row_length(weight, stored))
    return tiles.input_grad(product, dy, weight, stored, tiles.input_grad_config(len(dy), dy.dtype))
