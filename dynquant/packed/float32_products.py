"""Float32 products of many rows on a GPU's tensor cores, which multiply bfloat16 numbers.

A float32 number is the sum of three bfloat16 numbers of eight bits each. Of the nine products of parts the six largest
are added up in float32; the other three are below its last place. Weights that are bfloat16 numbers need three. On an
H200 that is several times as fast as float32 arithmetic, and as exact; TF32 would keep eleven bits of each factor.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.packed.layers import PackedLinear

_PAIRS = ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))  # parts of x and of the weight; the smallest come first
_BFLOAT16_PAIRS = ((2, 0), (1, 0), (0, 0))
_FEWEST_ROWS = 64  # below, reading the weights takes the time
_SLICE_ELEMENTS = 1 << 26  # weights that are split at a time: 800 MB of parts


def use_tensor_cores(model: nn.Module) -> None:
    """Let the linear layers of a float32 model on a GPU multiply by parts; their weights must not change afterwards."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] >= 8:
            multiply_by_parts(module)


def multiply_by_parts(module: nn.Module) -> None:
    """Replace the forward pass of a linear layer, packed or float32, for many rows and without gradients."""
    if isinstance(module, PackedLinear):
        module.forward = partial(_forward, module, module.forward, is_bfloat16=False)
    elif type(module) is nn.Linear and module.weight.dtype == torch.float32:
        is_bfloat16 = all(torch.equal(part.bfloat16().float(), part) for part in module.weight.detach().split(4096))
        module.forward = partial(_forward, module, module.forward, is_bfloat16=is_bfloat16)


def linear(x: Tensor, weight: Tensor, *, is_bfloat16: bool = False) -> Tensor:
    """Return x [..., K] times the transposed weight [N, K], both float32: [..., N]."""
    pairs = _BFLOAT16_PAIRS if is_bfloat16 else _PAIRS
    rows = _side_by_side(x.reshape(-1, x.shape[-1]), [of_x for of_x, _ in pairs])
    of_weight = [part for _, part in pairs]
    slices = weight.split(max(1, _SLICE_ELEMENTS // weight.shape[1]))
    if len(slices) == 1:
        return _product(rows, _side_by_side(weight, of_weight)).view(*x.shape[:-1], -1)
    product = x.new_empty(len(rows), len(weight))
    start = 0
    for part in slices:
        product[:, start : start + len(part)] = _product(rows, _side_by_side(part, of_weight))
        start += len(part)
    return product.view(*x.shape[:-1], -1)


def _forward(module: Any, plain: Callable[[Tensor], Tensor], x: Tensor, *, is_bfloat16: bool) -> Tensor:
    if x.dtype != torch.float32 or x.numel() < _FEWEST_ROWS * x.shape[-1] or torch.is_grad_enabled():
        return plain(x)
    if isinstance(module, PackedLinear):
        if module.round_input is not None:
            x = module.round_input(x, module.types["weight"])
        y = linear(x, module.dense("weight", torch.float32))
    else:
        y = linear(x, module.weight, is_bfloat16=is_bfloat16)
    return y if module.bias is None else y.add_(module.bias)


def _side_by_side(values: Tensor, order: list[int]) -> Tensor:
    """Return parts of float32 [rows, K] in an order, bfloat16 [rows, parts * K]: one product then adds all of them."""
    parts = [values.bfloat16()]
    rest = values
    while len(parts) <= max(order):
        rest = rest - parts[-1]
        parts.append(rest.bfloat16())
    return torch.cat([parts[number] for number in order], dim=1)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x times the transposed weight, both bfloat16, in float32."""
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T
