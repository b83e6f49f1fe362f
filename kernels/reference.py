"""The operations of this package in plain PyTorch: their numerical truth, and what runs where Triton does not.

Weights are decoded by `dynquant.formats` a few rows at a time, so that no dense copy of a matrix ever exists; products
are float32 (float64 for float64 activations) and come back in the dtype of the activations. Works on any device;
the expert functions read the expert ids on the host. Arguments and results are those of the operators in `ops`; shapes
and dtypes that do not fit are refused by `shapes`.
"""

from collections.abc import Callable, Iterator

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


def linear(x: Tensor, weight: Tensor, type_name: str, layout: Layout = "blocks") -> Tensor:
    """Return x [..., K] times the transposed packed rows [N, row_bytes], see `ops.linear`."""
    shape = shapes.linear_shape(x, weight, type_name, layout)
    rows = slice(0, weight.shape[0])
    return _times_rows(_flat(x), weight, type_name, layout, rows).to(x.dtype).reshape(shape)


def input_grad(dy: Tensor, weight: Tensor, type_name: str, layout: Layout = "blocks") -> Tensor:
    """Return dy [..., N] times the packed rows [N, row_bytes], see `ops.input_grad`."""
    shape = shapes.input_grad_shape(dy, weight, type_name, layout)
    rows = slice(0, weight.shape[0])
    return _times_columns(_flat(dy), weight, type_name, layout, rows).to(dy.dtype).reshape(shape)


def experts_linear(x: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, layout: Layout = "blocks") -> Tensor:
    """Return every token times the weights of each of its experts, see `ops.experts_linear`."""
    shape = shapes.experts_shape(x, weight, expert_ids, type_name, layout)
    return _experts(_times_rows, x, weight, expert_ids, type_name, layout, shape)


def experts_input_grad(
    dy: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, layout: Layout = "blocks"
) -> Tensor:
    """Return what `experts_linear` does with the weights not transposed, see `ops.experts_input_grad`."""
    shape = shapes.experts_shape(dy, weight, expert_ids, type_name, layout, transposed=True)
    return _experts(_times_columns, dy, weight, expert_ids, type_name, layout, shape)


def embedding(ids: Tensor, weight: Tensor, type_name: str, dtype: torch.dtype, layout: Layout = "blocks") -> Tensor:
    """Return rows of a packed table, decoded, see `ops.embedding`. Other rows are not read.

    Raises:
        IndexError: an id outside the table.
    """
    shape = shapes.embedding_shape(ids, weight, type_name, dtype, layout)
    return _decoded(weight, type_name, layout, ids.reshape(-1)).to(dtype).reshape(shape)


def _experts(
    times: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    expert_ids: Tensor,
    type_name: str,
    layout: str,
    shape: tuple[int, int, int],
) -> Tensor:
    num_experts, num_rows, _ = weight.shape
    product = torch.zeros(shape, dtype=x.dtype, device=x.device)
    for expert in expert_ids.unique().tolist():
        if 0 <= expert < num_experts:
            token, slot = (expert_ids == expert).nonzero(as_tuple=True)
            inputs = x[token] if x.dim() == 2 else x[token, slot]
            rows = slice(expert * num_rows, (expert + 1) * num_rows)
            product[token, slot] = times(inputs, weight, type_name, layout, rows).to(x.dtype)
    return product


def _times_rows(x: Tensor, weight: Tensor, type_name: str, layout: str, rows: slice) -> Tensor:
    """Return x [M, K] times rows: [M, rows] in the compute dtype."""
    x = x.to(_compute_dtype(x))
    product = x.new_empty(len(x), rows.stop - rows.start)
    for start, stop in _chunks(rows.stop - rows.start, x.shape[-1]):
        part = slice(rows.start + start, rows.start + stop)
        product[:, start:stop] = x @ _decoded(weight, type_name, layout, part).to(x.dtype).T
    return product


def _times_columns(dy: Tensor, weight: Tensor, type_name: str, layout: str, rows: slice) -> Tensor:
    """Return dy [M, rows] times rows: [M, K] in the compute dtype."""
    dy = dy.to(_compute_dtype(dy))
    length = shapes.row_length(weight, quant_type(type_name))
    product = dy.new_zeros(len(dy), length)
    for start, stop in _chunks(rows.stop - rows.start, length):
        part = slice(rows.start + start, rows.start + stop)
        product.addmm_(dy[:, start:stop], _decoded(weight, type_name, layout, part).to(dy.dtype))
    return product


def _compute_dtype(activations: Tensor) -> torch.dtype:
    return torch.float64 if activations.dtype == torch.float64 else torch.float32


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


def _flat(activations: Tensor) -> Tensor:
    return activations.reshape(-1, activations.shape[-1])
