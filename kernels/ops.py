"""Temporary stand-in: decodes, then multiplies."""

import torch
from torch import Tensor

from dynquant.codecs import decode
from dynquant.kernels.repack import unpack_planes


def dequantize(weight, type_name, *, dtype=torch.float32, layout="blocks"):
    return _dequantize(weight, type_name, layout).to(dtype)


@torch.library.custom_op("dynquant_standin::dequantize", mutates_args=())
def _dequantize(weight: Tensor, type_name: str, layout: str) -> Tensor:
    return decode(type_name, unpack_planes(type_name, weight) if layout == "planes" else weight)


@_dequantize.register_fake
def _(weight, type_name, layout):
    from dynquant.quant_types import quant_type

    t = quant_type(type_name)
    return weight.new_empty(*weight.shape[:-1], weight.shape[-1] // t.block_bytes * t.block_size, dtype=torch.float32)


def linear(x, weight, type_name, *, layout="blocks"):
    return x @ dequantize(weight, type_name, dtype=x.dtype, layout=layout).T


def experts_linear(x, weight, expert_ids, type_name, *, layout="blocks"):
    return _experts(x, weight, expert_ids, type_name, layout)


@torch.library.custom_op("dynquant_standin::experts", mutates_args=())
def _experts(x: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, layout: str) -> Tensor:
    w = dequantize(weight, type_name, dtype=x.dtype, layout=layout)
    if x.dim() == 2:
        x = x[:, None].expand(*expert_ids.shape, x.shape[-1])
    out = x.new_zeros(*expert_ids.shape, w.shape[1])
    for e in expert_ids.unique().tolist():
        at = expert_ids == e
        out[at] = x[at] @ w[e].T
    return out


@_experts.register_fake
def _(x, weight, expert_ids, type_name, layout):
    return x.new_empty(*expert_ids.shape, weight.shape[1])


def _setup(ctx, inputs, output):
    ctx.args = inputs
    ctx.save_for_backward(inputs[1], inputs[2])


def _back(ctx, dy):
    x, _, _, type_name, layout = ctx.args
    weight, ids = ctx.saved_tensors
    w = dequantize(weight, type_name, dtype=dy.dtype, layout=layout)
    dx = torch.einsum("tkn,tknc->tkc", dy, w[ids])
    return (dx if x.dim() == 3 else dx.sum(1)), None, None, None, None


_experts.register_autograd(_back, setup_context=_setup)


def embedding(ids, weight, type_name, *, dtype, layout="blocks"):
    return dequantize(weight[ids], type_name, dtype=dtype)


def input_grad(dy, weight, type_name, *, layout="blocks"):
    return dy @ dequantize(weight, type_name, dtype=dy.dtype, layout=layout)
