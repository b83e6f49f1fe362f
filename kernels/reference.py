"""The operations of this package in plain PyTorch: their numerical truth, and what runs where Triton does not.

Weights are decoded by `dynquant.formats` a few rows at a time, so that no dense copy of a matrix ever exists; products
are float32 (float64 for float64 activations) and come back in the dtype of the activations. Works on any device;
the expert functions read the expert ids on the host. Arguments and results are those of the operators in `ops`; shapes
and dtypes that do not fit are refused by `shapes`.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from dynquant.formats import decode
from dynquant.formats.quant_types import quant_type
from dynquant.kernels import shapes
from dynquant.kernels.planes import block_rows
from dynquant.kernels.shapes import Layout

_CHUNK_BYTES = 24 << 20
"""Size of the float32 weights that are decoded at once. They stay in the L2 cache of an H100, and are small beside the
activations of a layer."""


def dequantize(weight: Tensor, type_name: str, dtype: torch.dtype = torch.float32, layout: Layout = "blocks") -> Tensor:
    """Return all weights of packed rows, see `ops.dequantize`."""
    shape = shapes.dequantize_shape(weight, type_name, dtype, layout)
    weights = torch.empty(shape, dtype=dtype, device=weight.device)
    flat = weights.view(-1, shape[-1])
    for start, stop in _chunks(len(flat), shape[-1]):
        flat[start:stop] = _decoded(weight, type_name, layout, slice(start, stop))
    return weights


def linear(x: Tensor, weight: Tensor, type_name: str, layout: Layout = "blocks", *, transposed: bool = False) -> Tensor:
    """Return x [..., K] times the transposed packed rows [N, row_bytes], see `ops.linear`."""
    shape = shapes.product_shape(x, weight, type_name, layout, transposed=transposed)
    flat, rows = x.reshape(-1, x.shape[-1]), slice(0, weight.shape[0])
    return _times(flat, weight, type_name, layout, rows, transposed).to(x.dtype).reshape(shape)


input_grad = partial(linear, transposed=True)
"""dy [..., N] times the packed rows [N, row_bytes], see `ops.input_grad`."""


def experts_linear(
    x: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, layout: Layout = "blocks", transposed: bool = False
) -> Tensor:
    """Return every token times the weights of each of its experts, see `ops.experts_linear`."""
    shape = shapes.experts_shape(x, weight, expert_ids, type_name, layout, transposed=transposed)
    num_experts, num_rows, _ = weight.shape
    product = x.new_zeros(shape)
    for expert in expert_ids.unique().tolist():
        if 0 <= expert < num_experts:
            token, slot = (expert_ids == expert).nonzero(as_tuple=True)
            inputs = x[token] if x.dim() == 2 else x[token, slot]
            rows = slice(expert * num_rows, (expert + 1) * num_rows)
            product[token, slot] = _times(inputs, weight, type_name, layout, rows, transposed).to(x.dtype)
    return product


experts_input_grad = partial(experts_linear, transposed=True)
"""Every token times the weights of each of its experts, not transposed, see `ops.experts_input_grad`."""


def embedding(ids: Tensor, weight: Tensor, type_name: str, dtype: torch.dtype, layout: Layout = "blocks") -> Tensor:
    """Return rows of a packed table, decoded, see `ops.embedding`. Other rows are not read. Raises IndexError: an id
    outside the table."""
    shape = shapes.embedding_shape(ids, weight, type_name, dtype, layout)
    return _decoded(weight, type_name, layout, ids.reshape(-1)).to(dtype).reshape(shape)


def _times(x: Tensor, weight: Tensor, type_name: str, layout: str, rows: slice, transposed: bool) -> Tensor:
    """Return x [M, K] times rows: [M, rows]; `transposed`, x [M, rows] times rows: [M, K]; in float32 or float64."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    num_rows, length = rows.stop - rows.start, shapes.row_length(weight, quant_type(type_name))
    product = x.new_zeros(len(x), length if transposed else num_rows)
    for start, stop in _chunks(num_rows, length):
        part = _decoded(weight, type_name, layout, slice(rows.start + start, rows.start + stop)).to(x.dtype)
        if transposed:
            product.addmm_(x[:, start:stop], part)  # rows of W are summed over, part by part
        else:
            product[:, start:stop] = x @ part.T
    return product


def _decoded(weight: Tensor, type_name: str, layout: str, rows: slice | Tensor) -> Tensor:
    """Return float32 [n, K] of some rows, counted over all leading dimensions."""
    if layout == "planes":
        return decode(type_name, block_rows(type_name, weight, rows))
    flat = weight.reshape(-1, weight.shape[-1])
    return decode(type_name, flat[rows] if isinstance(rows, slice) else flat.index_select(0, rows))


def _chunks(num_rows: int, length: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_BYTES // max(1, 4 * length))
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
