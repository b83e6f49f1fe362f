"""Products of some dozens to hundreds of rows with planar weights, decoded inside the matrix product.

Where `two_pass` would cut a matrix into slices too narrow to keep a GPU busy, and no dense weight is ever stored.
"""

import torch
import triton
from torch import Tensor

from dynquant.formats.quant_types import quant_type
from dynquant.kernels import shapes
from dynquant.kernels.triton.gemv import add_splits
from dynquant.kernels.triton.tiles import column_shares, tile_config, tile_input_grad_kernel, tile_linear_kernel
from dynquant.kernels.triton.unpack import table


def supports(type_name: str, x: Tensor) -> bool:
    """Return whether tensor cores take these activations; float32 has none that are exact enough."""
    return x.dtype in (torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, type_name: str) -> Tensor:
    """x [M, K] times planar rows uint8 [N, row_bytes] transposed: [M, N]. Both are contiguous."""
    return _product(x, weight, type_name, is_transposed=False)


def input_grad(dy: Tensor, weight: Tensor, type_name: str) -> Tensor:
    """dy [M, N] times planar rows uint8 [N, row_bytes]: [M, K]. Both are contiguous."""
    return _product(dy, weight, type_name, is_transposed=True)


def _product(inputs: Tensor, weight: Tensor, type_name: str, *, is_transposed: bool) -> Tensor:
    stored = quant_type(type_name)
    length = shapes.row_length(weight, stored)
    extent = length if is_transposed else weight.shape[0]
    product = inputs.new_empty(len(inputs), extent)
    config = tile_config(len(inputs), inputs.dtype)
    kernel = tile_input_grad_kernel if is_transposed else tile_linear_kernel
    grid = (
        triton.cdiv(extent, 32 * config["G"] if is_transposed else config["BN"]),
        triton.cdiv(len(inputs), config["BM"]),
    )
    shares = 1 if is_transposed else column_shares(grid[0] * grid[1], config, length // 32)
    target = product if shares == 1 else product.new_empty(shares, *product.shape, dtype=torch.float32)
    kernel[(*grid, shares)](
        inputs, weight, table(stored.name, weight.device), None, None, target,
        weight.numel() // stored.block_bytes, weight.shape[0], length // 32, 1, 0, len(inputs),
        TYPE=stored.name, **config,
    )  # fmt: skip
    if shares > 1:
        add_splits(target, product, pdl=False)
    return product
