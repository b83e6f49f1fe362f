"""Chooses what runs an operation, from the device, the layout, the dtype and the number of rows.

Planar weights on CUDA go to Triton, everything else to the reference, and the first time that a CUDA tensor does a
warning says why. Kernels are asked in the order of a table; the first that supports the type and the rows runs.
"""

import functools
import importlib
import importlib.util
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from dynquant.kernels import reference, shapes

_LINEAR = (("gemv", 1, 4), ("fused", 1, 128), ("two_pass", 1, None))
_INPUT_GRAD = (("fused", 1, 256), ("two_pass", 1, None))
"""Kernel module, fewest rows, most rows. A module has `linear(x [M, K], weight, type_name)`, or `input_grad`, and may
have `supports(type_name, x)`; one that is not part of this installation is passed over."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def linear(x: Tensor, weight: Tensor, type_name: str, layout: str) -> Tensor:
    """The kernel behind `ops.linear`."""
    if not _uses_triton(x, weight, layout):
        return reference.linear(x, weight, type_name, layout=layout)
    shape = shapes.linear_shape(x, weight, type_name, layout)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.shape[0] == 0 or weight.shape[0] == 0:
        return x.new_empty(shape)
    with _on_device_of(weight):
        return _first_kernel(_LINEAR, type_name, flat).linear(flat, weight, type_name).view(shape)


def input_grad(dy: Tensor, weight: Tensor, type_name: str, layout: str) -> Tensor:
    """The kernel behind `ops.input_grad`."""
    if not _uses_triton(dy, weight, layout):
        return reference.input_grad(dy, weight, type_name, layout=layout)
    shape = shapes.input_grad_shape(dy, weight, type_name, layout)
    flat = dy.reshape(-1, dy.shape[-1]).contiguous()
    if flat.shape[0] == 0 or weight.shape[0] == 0:
        return dy.new_zeros(shape)
    with _on_device_of(weight):
        return _first_kernel(_INPUT_GRAD, type_name, flat).input_grad(flat, weight, type_name).view(shape)


def experts_linear(x: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, layout: str) -> Tensor:
    """The kernel behind `ops.experts_linear`."""
    if not _uses_triton(x, weight, layout):
        return reference.experts_linear(x, weight, expert_ids, type_name, layout=layout)
    shape = shapes.experts_shape(x, weight, expert_ids, type_name, layout)
    if 0 in (*shape, weight.shape[0]):
        return x.new_zeros(shape)
    with _on_device_of(weight):
        return _module("grouped").linear(x.contiguous(), weight, expert_ids, type_name)


def experts_input_grad(dy: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, layout: str) -> Tensor:
    """The kernel behind `ops.experts_input_grad`."""
    if not _uses_triton(dy, weight, layout):
        return reference.experts_input_grad(dy, weight, expert_ids, type_name, layout=layout)
    shape = shapes.experts_shape(dy, weight, expert_ids, type_name, layout, transposed=True)
    if 0 in (*shape, *weight.shape[:2]):
        return dy.new_zeros(shape)
    with _on_device_of(weight):
        return _module("grouped").input_grad(dy.contiguous(), weight, expert_ids, type_name)


def dequantize(weight: Tensor, type_name: str, dtype: torch.dtype, layout: str) -> Tensor:
    """The kernel behind `ops.dequantize`."""
    if not _uses_triton(None, weight, layout, dtype):
        return reference.dequantize(weight, type_name, dtype=dtype, layout=layout)
    shape = shapes.dequantize_shape(weight, type_name, layout)
    weights = torch.empty(shape, dtype=dtype, device=weight.device)
    if weights.numel():
        with _on_device_of(weight):
            _module("dequantize").dequantize(weight, type_name, weights.view(-1, shape[-1]))
    return weights


def embedding(ids: Tensor, weight: Tensor, type_name: str, dtype: torch.dtype, layout: str) -> Tensor:
    """The kernel behind `ops.embedding`."""
    if not _uses_triton(None, weight, layout, dtype):
        return reference.embedding(ids, weight, type_name, dtype=dtype, layout=layout)
    shape = shapes.embedding_shape(ids, weight, type_name, layout)
    weights = torch.empty(shape, dtype=dtype, device=weight.device)
    if weights.numel():
        flat = ids.reshape(-1).contiguous()
        with _on_device_of(weight):
            _module("dequantize").dequantize(weight, type_name, weights.view(-1, shape[-1]), row_ids=flat)
    return weights


def _first_kernel(table: tuple[tuple[str, int, int | None], ...], type_name: str, x: Tensor) -> ModuleType:
    for name, fewest, most in table:
        if x.shape[0] >= fewest and (most is None or x.shape[0] <= most):
            module = _module(name)
            if module is not None and (not hasattr(module, "supports") or module.supports(type_name, x)):
                return module
    raise AssertionError("two_pass takes every row count")


def _on_device_of(weight: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of a model spread over several."""
    is_current = weight.get_device() == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(weight.device)


@functools.cache
def _module(name: str) -> ModuleType | None:
    """A kernel module, imported when first used: Triton need not be there to import this one."""
    full_name = f"{__package__}.{name}"
    return importlib.import_module(full_name) if importlib.util.find_spec(full_name) else None


def _uses_triton(x: Tensor | None, weight: Tensor, layout: str, dtype: torch.dtype | None = None) -> bool:
    if not weight.is_cuda:
        return False
    reason = _refusal(x, weight, layout, dtype)
    if reason is not None:
        _warn_once(reason)
    return reason is None


def _refusal(x: Tensor | None, weight: Tensor, layout: str, dtype: torch.dtype | None) -> str | None:
    """Why Triton cannot run this; None when it can."""
    if layout != "planes":
        return "the weight is in blocks: convert it once with `kernels.repack.pack_planes` and pass layout='planes'"
    if not _has_triton():
        return "Triton is not installed: install the `gpu` extra"
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        return "the planar weight is not contiguous or does not start at a multiple of 16 bytes"
    if (dtype or x.dtype) not in _DTYPES:
        return f"there are kernels for bfloat16, float16 and float32, not for {dtype or x.dtype}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"packed weights on a GPU run without their kernels, slowly: {reason}", stacklevel=2)
