"""Float32 products of many rows on a GPU's tensor cores, which multiply float16 numbers.

A float32 number is the sum of two float16 numbers of eleven bits each, up to its last places, when the largest of its
row or matrix has been brought to 2^15 by a power of two. Three of the four products of parts are added up in float32;
the fourth is below the last place. Weights that have no second part, as those of bfloat16 checkpoints, need two. On an
H200 that is several times as fast as float32 arithmetic, and about as exact up to what the cores themselves add: they
cut sums off where float32 arithmetic rounds. Measured there on 1,536 channels, results are off by 2e-6 of their spread,
seven times float32's error. TF32 keeps eleven bits of each factor, which is a few times 1e-4.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynquant.packed.layers import PackedLinear

_PAIRS = ((1, 0), (0, 1), (0, 0))  # parts of x and of the weight; the smallest products come first
_SHORT_PAIRS = ((1, 0), (0, 0))
_FEWEST_ROWS = 64  # below, reading the weights takes the time
_SLICE_ELEMENTS = 1 << 26  # weights that are split at a time: 400 MB of parts


def use_tensor_cores(model: nn.Module, *, weights_stay: bool = True) -> None:
    """Let the linear layers of a float32 model on a GPU multiply by parts.

    Where `weights_stay`, those that have one part are found out now and must not be changed afterwards.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] >= 8:
            multiply_by_parts(module, weights_stay=weights_stay)


def multiply_by_parts(module: nn.Module, *, weights_stay: bool = True) -> None:
    """Replace the forward pass of a linear layer, packed or float32, for many rows and without gradients."""
    if isinstance(module.forward, partial):  # it does so already
        return
    if isinstance(module, PackedLinear):
        module.forward = partial(_forward, module, module.forward, is_short=False)
    elif type(module) is nn.Linear and module.weight.dtype == torch.float32:
        is_short = weights_stay and _is_short(module.weight.detach())
        module.forward = partial(_forward, module, module.forward, is_short=is_short)


def linear(x: Tensor, weight: Tensor, *, is_short: bool = False) -> Tensor:
    """Return x [..., K] times the transposed weight [N, K], both float32: [..., N]. A short weight has one part."""
    pairs = _SHORT_PAIRS if is_short else _PAIRS
    flat = x.reshape(-1, x.shape[-1])
    x_factor, weight_factor = _factor(flat, per_row=True), _factor(weight)
    rows = _side_by_side(flat * x_factor, [of_x for of_x, _ in pairs])
    of_weight = [part for _, part in pairs]
    slices = weight.split(max(1, _SLICE_ELEMENTS // weight.shape[1]))
    product = flat.new_empty(len(flat), len(weight)) if len(slices) > 1 else None
    start = 0
    for part in slices:
        columns = _product(rows, _side_by_side(part * weight_factor, of_weight))
        if product is None:
            product = columns
        else:
            product[:, start : start + len(part)] = columns
        start += len(part)
    return product.mul_(1 / x_factor * (1 / weight_factor)).view(*x.shape[:-1], -1)


def _forward(module: Any, plain: Callable[[Tensor], Tensor], x: Tensor, *, is_short: bool) -> Tensor:
    if x.dtype != torch.float32 or x.numel() < _FEWEST_ROWS * x.shape[-1] or torch.is_grad_enabled():
        return plain(x)
    if isinstance(module, PackedLinear):
        if module.round_input is not None:
            x = module.round_input(x, module.types["weight"])
        y = linear(x, module.dense("weight", torch.float32))
    else:
        y = linear(x, module.weight, is_short=is_short)
    return y if module.bias is None else y.add_(module.bias)


def _factor(values: Tensor, *, per_row: bool = False) -> Tensor:
    """Return the power of two that brings the largest value, or that of each row, to between 2^14 and 2^15."""
    highest = values.abs().amax(-1, keepdim=True) if per_row else torch.stack(values.aminmax()).abs().amax()
    return torch.exp2((15 - highest.frexp().exponent).clamp(-100, 100).float())


def _side_by_side(values: Tensor, order: list[int]) -> Tensor:
    """Return parts of float32 [rows, K] in an order, float16 [rows, parts * K]: one product then adds all of them."""
    parts = [values.half()]
    if 1 in order:
        parts.append((values - parts[0]).half())
    return torch.cat([parts[number] for number in order], dim=1)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x times the transposed weight, both float16, in float32."""
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return x.float() @ weight.float().T


def _is_short(weight: Tensor) -> bool:
    factor = _factor(weight)
    return all(torch.equal((part * factor).half().float(), part * factor) for part in weight.split(4096))
