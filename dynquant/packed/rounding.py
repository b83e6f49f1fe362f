"""Rounds activations before products with packed weights, as llama.cpp's CPU code does, to compare runtimes exactly.

ggml multiplies a weight type by one activation type (`vec_dot_type` of ggml-cpu's type traits): Q8_K, blocks of 256
with a float32 scale, for k-quants, codebook and ternary types; Q8_0, blocks of 32 with a float16 scale, for the rest;
F16 and BF16 weights by their own type. One product agrees with llama.cpp's to a KL of 1e-7; over many layers, values
on the edge between two codes fall either way, and the runtimes agree in distribution. Left out: MLA's latent
projection, which llama.cpp absorbs into the query.
"""

import torch
from torch import Tensor, nn

from dynquant.formats.quant_types import quant_type
from dynquant.packed.joined_rows import PackedRows
from dynquant.packed.layers import PackedExperts, PackedLinear

_Q8_K_BLOCK, _Q8_0_BLOCK = 256, 32
_LARGEST = 127
_SAME_TYPE = {"F16": torch.float16, "BF16": torch.bfloat16}


def round_activations(model: nn.Module, *, enabled: bool = True) -> None:
    """Make every packed linear layer and expert of `model` round its inputs, or stop doing so."""
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedRows | PackedExperts):
            module.round_input = rounded if enabled else None


def rounded(x: Tensor, type_name: str) -> Tensor:
    """The activations [..., row_length] that ggml multiplies by weights of this type, in the dtype of `x`."""
    if type_name in _SAME_TYPE:
        return x.to(_SAME_TYPE[type_name]).to(x.dtype)
    block = quant_type(type_name).block_size
    if block == 1:
        return x
    return _as_q8_k(x) if block == _Q8_K_BLOCK else _as_q8_0(x)


def _as_q8_k(x: Tensor) -> Tensor:
    blocks = x.float().unflatten(-1, (-1, _Q8_K_BLOCK))
    # The value of largest magnitude, with its sign, becomes -127.
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(extreme == 0, 0.0, -_LARGEST / extreme)
    codes = (blocks * inverse).round().clamp(max=_LARGEST)
    scale = torch.where(inverse == 0, 0.0, 1 / inverse)
    return (codes * scale).flatten(-2).to(x.dtype)


def _as_q8_0(x: Tensor) -> Tensor:
    blocks = x.float().unflatten(-1, (-1, _Q8_0_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(largest == 0, 0.0, _LARGEST / largest)).round()
    return (codes * (largest / _LARGEST).half().float()).flatten(-2).to(x.dtype)
