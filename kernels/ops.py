"""Products with packed weights as PyTorch operators `dynquant::*`: traceable, differentiable, one call each.

The weights are frozen: gradients reach activations only, and nothing but the packed bytes and the expert ids is kept
for the backward pass. `OPERATIONS` says of every operator what it takes, what shape it returns, what runs it and what
its gradient is. The operators and their gradients are registered under plain dispatch keys: `custom_op` was measured to
cost twice as much on every call without gradients.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dynquant.kernels import dispatch, reference, shapes
from dynquant.kernels.dispatch import Operation
from dynquant.kernels.shapes import Layout

_TYPED = "Tensor weight, str type_name, ScalarType dtype, str layout"


def _products(prefix: str, operands: str, *functions: Callable) -> dict[str, Operation]:
    """Return a product by transposed weights and its gradient, of the same functions: each is that of the other."""
    names = f"{prefix}linear", f"{prefix}input_grad"
    transposed = [partial(function, transposed=True) for function in functions]
    return {
        names[0]: Operation(f"Tensor x, {operands}, str type_name, str layout", *functions, names[1]),
        names[1]: Operation(f"Tensor dy, {operands}, str type_name, str layout", *transposed, names[0]),
    }


OPERATIONS = {
    **_products("", "Tensor weight", shapes.product_shape, reference.linear, dispatch.launch_product),
    **_products("experts_", "Tensor weight, Tensor expert_ids", shapes.experts_shape, reference.experts_linear,
                dispatch.launch_experts),
    "dequantize": Operation(_TYPED, shapes.dequantize_shape, reference.dequantize, dispatch.launch_dequantize),
    "embedding": Operation(f"Tensor ids, {_TYPED}", shapes.embedding_shape, reference.embedding,
                           dispatch.launch_embedding),
}  # fmt: skip
"""Name of an operator -> what it is."""

_LIBRARY = torch.library.Library("dynquant", "DEF")
_OPS = torch.ops.dynquant


def linear(x: Tensor, weight: Tensor, type_name: str, *, layout: Layout = "blocks") -> Tensor:
    """Return x [..., K] times the transposed packed rows uint8 [N, row_bytes]: [..., N] in the dtype of `x`.

    Differentiable with respect to `x`.

    Raises:
        PlanError: no quant type has this name.
        ValueError: a shape or dtype that does not fit, see `shapes.product_shape`.
    """
    return _OPS.linear(x, weight, type_name, layout)


def input_grad(dy: Tensor, weight: Tensor, type_name: str, *, layout: Layout = "blocks") -> Tensor:
    """Return dy [..., N] times the packed rows uint8 [N, row_bytes]: [..., K] in the dtype of `dy`.

    Differentiable with respect to `dy`; raises like `linear`.
    """
    return _OPS.input_grad(dy, weight, type_name, layout)


def experts_linear(
    x: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, *, layout: Layout = "blocks"
) -> Tensor:
    """Return every token times the weights of each of its experts. Differentiable with respect to `x`.

    Args:
        x: [T, K], or [T, k, K] with a row for every slot.
        weight: uint8 [E, N, row_bytes].
        expert_ids: int32 or int64 [T, k]. An id outside 0 to E - 1 is held by another rank: its product is zero.
        type_name: the quant type of `weight`.
        layout: of `weight`.

    Returns:
        [T, k, N] in the dtype of `x`.

    Raises:
        PlanError: no quant type has this name.
        ValueError: a shape or dtype that does not fit, see `shapes.experts_shape`.
    """
    if not torch.compiler.is_compiling():  # compiled code calls the operator with buffers that it writes unseen
        expert_ids.counts_changes = True
    return _OPS.experts_linear(x, weight, expert_ids, type_name, layout)


def experts_input_grad(
    dy: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, *, layout: Layout = "blocks"
) -> Tensor:
    """Return what `experts_linear` does with the weights not transposed: dy [T, k, N] or [T, N] -> [T, k, K]."""
    return _OPS.experts_input_grad(dy, weight, expert_ids, type_name, layout)


def dequantize(
    weight: Tensor, type_name: str, *, dtype: torch.dtype = torch.float32, layout: Layout = "blocks"
) -> Tensor:
    """Return all weights of packed rows: uint8 [..., row_bytes] -> `dtype` [..., K].

    Raises:
        PlanError: no quant type has this name.
        ValueError: a weight that does not fit the type, see `shapes.packed_type`.
    """
    return _OPS.dequantize(weight, type_name, dtype, layout)


def embedding(ids: Tensor, weight: Tensor, type_name: str, *, dtype: torch.dtype, layout: Layout = "blocks") -> Tensor:
    """Return the rows `ids` int [...] of a packed table uint8 [V, row_bytes], decoded: [..., K].

    An id outside the table is an IndexError on the reference path. Triton kernels cannot raise: they return NaN there.

    Raises:
        PlanError: no quant type has this name.
        ValueError: a shape or dtype that does not fit, see `shapes.embedding_shape`.
    """
    return _OPS.embedding(ids, weight, type_name, dtype, layout)


class _Product(torch.autograd.Function):
    """A product whose gradient is another operator with the same weight; saves the weight and the expert ids."""

    @staticmethod
    def forward(ctx, operators, activations, *rest):
        ctx.gradient, ctx.ndim, ctx.options = operators[1], activations.dim(), rest[-2:]
        ctx.save_for_backward(*rest[:-2])
        with torch._C._AutoDispatchBelowAutograd():
            return operators[0](activations, *rest)

    @staticmethod
    def backward(ctx, grad):
        weight_and_ids = ctx.saved_tensors
        result = ctx.gradient(grad, *weight_and_ids, *ctx.options)
        if len(weight_and_ids) == 2 and ctx.ndim == 2:
            result = result.sum(1)  # one row of activations went into every slot of its token
        return None, result, *(None,) * (len(weight_and_ids) + 2)


def _differentiate(name: str, gradient: str) -> None:
    operators = getattr(_OPS, name).default, getattr(_OPS, gradient).default

    def run(activations, *rest):
        if activations.requires_grad and torch.is_grad_enabled():
            return _Product.apply(operators, activations, *rest)
        with torch._C._AutoDispatchBelowAutograd():
            return operators[0](activations, *rest)

    _LIBRARY.impl(name, run, "Autograd")


for _name, _operation in OPERATIONS.items():
    _LIBRARY.define(f"{_name}({_operation.arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _operation.run, _key)
    torch.library.register_fake(f"dynquant::{_name}", _operation.fake, lib=_LIBRARY)
for _name, _operation in OPERATIONS.items():  # once all are defined: gradients are operators themselves
    if _operation.gradient:
        _differentiate(_name, _operation.gradient)
