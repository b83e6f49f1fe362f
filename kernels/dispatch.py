"""Chooses what runs an operation: the reference for now."""

import torch
from torch import Tensor

from dynquant.kernels import reference


def linear(x: Tensor, weight: Tensor, type_name: str, layout: str) -> Tensor:
    return reference.linear(x, weight, type_name, layout=layout)


def input_grad(dy: Tensor, weight: Tensor, type_name: str, layout: str) -> Tensor:
    return reference.input_grad(dy, weight, type_name, layout=layout)


def experts_linear(x: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, layout: str) -> Tensor:
    return reference.experts_linear(x, weight, expert_ids, type_name, layout=layout)


def experts_input_grad(dy: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, layout: str) -> Tensor:
    return reference.experts_input_grad(dy, weight, expert_ids, type_name, layout=layout)


def dequantize(weight: Tensor, type_name: str, dtype: torch.dtype, layout: str) -> Tensor:
    return reference.dequantize(weight, type_name, dtype=dtype, layout=layout)


def embedding(ids: Tensor, weight: Tensor, type_name: str, dtype: torch.dtype, layout: str) -> Tensor:
    return reference.embedding(ids, weight, type_name, dtype=dtype, layout=layout)
