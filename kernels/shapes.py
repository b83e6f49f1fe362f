"""Shapes that operations on packed weights take and return; others are refused by name before any byte is read.

Every `*_shape` takes the arguments of its operator in the order of the schema, see `ops`.
"""

from typing import Literal

import torch
from torch import Tensor

from dynquant.formats.quant_types import QuantType, quant_type
from dynquant.kernels.planes import planes

Layout = Literal["blocks", "planes"]
"""GGUF bytes, or `planes.pack_planes` of the whole tensor; both have the same shape."""


def packed_type(weight: Tensor, type_name: str, layout: str, *, dims: int | None = None) -> QuantType:
    """Return the type of packed rows `weight` [..., row_bytes].

    Raises:
        PlanError: no quant type has this name.
        ValueError: a plain float type, an unknown layout, a weight that is not uint8 or has other than `dims`
            dimensions, or rows that are not whole blocks.
    """
    planes(type_name)
    stored = quant_type(type_name)
    if layout not in ("blocks", "planes"):
        raise ValueError(f"`layout` must be 'blocks' or 'planes', got {layout!r}")
    if weight.dtype != torch.uint8 or weight.dim() == 0 or (dims is not None and weight.dim() != dims):
        shape = {None: "[..., row_bytes]", 2: "[rows, row_bytes]", 3: "[experts, rows, row_bytes]"}[dims]
        actual = f"{weight.dtype} of shape {list(weight.shape)}"
        raise ValueError(f"`weight` of {stored.name} must be uint8 {shape}, got {actual}")
    if weight.shape[-1] % stored.block_bytes:
        blocks = f"{stored.name} blocks of {stored.block_bytes} bytes"
        raise ValueError(f"rows of `weight` must be whole {blocks}, got rows of {weight.shape[-1]} bytes")
    return stored


def ceil_div(total: int, part: int) -> int:
    """Return how many parts cover the total; Triton's own `cdiv` takes 2 us, five times a product."""
    return -(-total // part)


def row_length(weight: Tensor, stored: QuantType) -> int:
    """Return how many weights a row of packed bytes holds."""
    return weight.shape[-1] // stored.block_bytes * stored.block_size


def check_device(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Refuse a tensor that is not where the weight is."""
    if tensor.device != weight.device:
        raise ValueError(f"`{name}` must be on the device of `weight`, {weight.device}, got {tensor.device}")


def check_activations(name: str, activations: Tensor, weight: Tensor, length: int, stored: QuantType) -> None:
    """Refuse activations that are elsewhere, not floating, or whose last dimension is not `length`."""
    check_device(name, activations, weight)
    if not activations.is_floating_point():
        raise ValueError(f"`{name}` must be floating, got {activations.dtype}")
    if activations.dim() == 0 or activations.shape[-1] != length:
        raise ValueError(
            f"the last dimension of `{name}` must be {length} to fit the {stored.name} weight, got shape "
            f"{list(activations.shape)}"
        )


def product_shape(
    x: Tensor, weight: Tensor, type_name: str, layout: str, *, transposed: bool = False
) -> tuple[int, ...]:
    """Return the shape of x [..., K] times packed rows [N, row_bytes]: [..., N], or [..., N] -> [..., K]."""
    stored = packed_type(weight, type_name, layout, dims=2)
    sides = row_length(weight, stored), weight.shape[0]
    columns, rows = sides[::-1] if transposed else sides
    check_activations("dy" if transposed else "x", x, weight, columns, stored)
    return (*x.shape[:-1], rows)


def experts_shape(
    x: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, layout: str, *, transposed: bool = False
) -> tuple[int, int, int]:
    """Return the shape of token rows times the weights of their experts: [T, k, N], or [T, k, K] if `transposed`.

    `x` is [T, columns] or [T, k, columns], one row for every slot; the columns are K, or N if `transposed`.
    """
    stored = packed_type(weight, type_name, layout, dims=3)
    if expert_ids.dim() != 2 or expert_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`expert_ids` must be int32 or int64 [tokens, slots], got {expert_ids.dtype} of shape "
            f"{list(expert_ids.shape)}"
        )
    num_tokens, num_slots = expert_ids.shape
    sides = row_length(weight, stored), weight.shape[1]
    columns, rows = sides[::-1] if transposed else sides
    name = "dy" if transposed else "x"
    check_device("expert_ids", expert_ids, weight)
    check_activations(name, x, weight, columns, stored)
    if tuple(x.shape[:-1]) not in ((num_tokens, num_slots), (num_tokens,)):
        raise ValueError(
            f"`{name}` must be [{num_tokens}, columns] or [{num_tokens}, {num_slots}, columns] to fit `expert_ids` "
            f"{list(expert_ids.shape)}, got shape {list(x.shape)}"
        )
    return num_tokens, num_slots, rows


def embedding_shape(ids: Tensor, weight: Tensor, type_name: str, dtype: torch.dtype, layout: str) -> tuple[int, ...]:
    """Return the shape of the rows that `ids` [...] pick from packed rows [V, row_bytes]: [..., K]."""
    stored = packed_type(weight, type_name, layout, dims=2)
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`ids` must be int32 or int64, got {ids.dtype}")
    check_device("ids", ids, weight)
    return (*ids.shape, row_length(weight, stored))


def dequantize_shape(weight: Tensor, type_name: str, dtype: torch.dtype, layout: str) -> tuple[int, ...]:
    """Return the shape of the weights that packed rows [..., row_bytes] hold: [..., K]."""
    stored = packed_type(weight, type_name, layout)
    return (*weight.shape[:-1], row_length(weight, stored))
