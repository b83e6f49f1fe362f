"""Products of many rows with planar weights on CUDA: decode a slice of the matrix, multiply it with cuBLAS, repeat.

Slices are large: ones that would stay in the L2 cache between the passes leave cuBLAS too few tiles for a GPU, which
costs more than the cache saves, also where the next slice is decoded on a second stream meanwhile. The forward pass
takes slices of rows and the gradient slices of columns, so that in both every result is written once: no rounded
partial sums are added up.
"""

import torch
from torch import Tensor

from dynquant.formats.quant_types import quant_type
from dynquant.kernels import shapes
from dynquant.kernels.triton.activations import arrange, takes_fragments
from dynquant.kernels.triton.dequantize import dequantize, dequantize_arranged

_SLICE_BYTES = 128 << 20
_COLUMN_STEP = 256
_ROW_STEP = 128  # slices are whole tiles of the matrix product


def linear(x: Tensor, weight: Tensor, type_name: str) -> Tensor:
    """x [M, K] times planar rows uint8 [N, row_bytes] transposed: [M, N]."""
    num_rows, stored = weight.shape[0], quant_type(type_name)
    if not takes_fragments(x.device):
        dense = x.new_empty(num_rows, shapes.row_length(weight, stored))
        dequantize(weight, type_name, dense)
        return x @ dense.T
    arranged = arrange(x, stored.name, len(x), is_stream=True)
    product = x.new_empty(len(x), num_rows)
    step = _step(num_rows, arranged.shape[1], x, _ROW_STEP)
    dense = x.new_empty(step, arranged.shape[1])
    for start in range(0, num_rows, step):
        part = dequantize_arranged(weight, type_name, dense[: num_rows - start], start)
        torch.mm(arranged, part.T, out=product[:, start : start + step])
    return product


def input_grad(dy: Tensor, weight: Tensor, type_name: str) -> Tensor:
    """dy [M, N] times planar rows uint8 [N, row_bytes]: [M, K]."""
    num_rows, length = weight.shape[0], shapes.row_length(weight, quant_type(type_name))
    product = dy.new_empty(len(dy), length)
    step = _step(length, num_rows, dy, _COLUMN_STEP)
    dense = dy.new_empty(num_rows * step)
    for start in range(0, length, step):
        width = min(step, length - start)
        part = dense[: num_rows * width].view(num_rows, width)
        dequantize(weight, type_name, part, first_column=start)
        torch.mm(dy, part, out=product[:, start : start + width])
    return product


def _step(extent: int, other: int, activations: Tensor, multiple: int) -> int:
    """Return how much of `extent` one slice spans: as near to equal slices as multiples allow."""
    limit = max(1, _SLICE_BYTES // max(1, other * activations.element_size()))
    slices = -(-extent // max(multiple, limit // multiple * multiple))
    even = -(-extent // max(1, slices))
    return max(1, min(extent, -(-even // multiple) * multiple))
