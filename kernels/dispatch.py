"""Chooses what runs an operation, from the device, the layout, the dtype and the number of rows.

Planar weights on CUDA go to Triton, everything else to the reference, and the first time that a CUDA tensor does a
warning says why. Kernels are asked in the order of a table; the first that supports the type and the rows runs.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dynquant.kernels import reference

# `bench.gemv` times them, `bench.products` tiles beside `two_pass`. Four rows are for `gemv` only where there are no
# tiles, which then take as long or less.
_KERNELS = {
    "linear": (("gemv", 3), ("tiles", 16), ("ring", 2048), ("tiles", 128), ("gemv", 4)),
    "input_grad": (("ring_grad", 128),),
}
"""Product -> modules with it, and most rows; they have `supports(type_name, x, product)`."""

_GLUON = ("ring", "ring_grad")
"""Those of these modules that run on Hopper GPUs alone."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Operation:
    """One operator on packed weights. All callables take the operator's arguments in the order of its schema."""

    arguments: str  # the schema's: [activations or ids], weight, [expert ids], name of the type, [dtype], layout
    shape: Callable[..., tuple[int, ...]]  # shape of the result; raises ValueError by name for whatever does not fit
    reference: Callable[..., Tensor]
    launch: Callable[..., Tensor]  # by Triton, given the result's shape first; never for an empty result or weight
    gradient: str | None = None  # the operator that is its gradient; None where there is none

    def run(self, *arguments):
        """Return the result, from Triton where it can run and from the reference elsewhere."""
        weight, dtype = arguments[isinstance(arguments[1], Tensor)], _dtype_of(arguments)
        if not weight.is_cuda:
            return self.reference(*arguments)
        if reason := _refusal(weight, arguments[-1], dtype or arguments[0].dtype):
            _warn_once(reason)
            return self.reference(*arguments)
        shape = self.shape(*arguments)
        if 0 in shape or not weight.numel():
            return arguments[0].new_zeros(shape, dtype=dtype)
        # Triton launches on the current device, which need not be that of a model on several.
        is_current = weight.get_device() == torch.cuda.current_device()
        with nullcontext() if is_current else torch.cuda.device(weight.device):
            return self.launch(shape, *arguments)

    def fake(self, *arguments):
        """Return a tensor of the result's shape, dtype and device, which is all that tracing asks for."""
        return arguments[0].new_empty(self.shape(*arguments), dtype=_dtype_of(arguments))


def _dtype_of(arguments: tuple) -> torch.dtype | None:
    """Return the dtype that the caller asks for; None for operators whose result has that of the activations."""
    return arguments[-2] if isinstance(arguments[-2], torch.dtype) else None


def launch_product(shape, x, weight, type_name, layout, *, transposed=False):
    """Run the first kernel that takes the type and so many rows."""
    flat, name = x.reshape(-1, x.shape[-1]).contiguous(), "input_grad" if transposed else "linear"
    kernel = _first_kernel(name, type_name, flat)
    if kernel is _module("two_pass"):
        _say_what_is_missing(flat)
    return getattr(kernel, name)(flat, weight, type_name).view(shape)


def launch_experts(shape, x, weight, expert_ids, type_name, layout, *, transposed=False):
    """Run `grouped`, or for more than few rows on GPUs before an A100 the reference forward."""
    grouped = _module("grouped")
    if not grouped.is_few(expert_ids, len(weight)):
        _say_what_is_missing(x)
        if not transposed and not _module("activations").takes_fragments(x.device):
            return reference.experts_linear(x, weight, expert_ids, type_name, layout)
    return (grouped.input_grad if transposed else grouped.linear)(x.contiguous(), weight, expert_ids, type_name)


def launch_dequantize(shape, weight, type_name, dtype, layout, row_ids=None):
    """Run `dequantize` on all rows, or on those of `row_ids` [*]."""
    weights = torch.empty(shape, dtype=dtype, device=weight.device)
    _module("dequantize").dequantize(weight, type_name, weights.view(-1, shape[-1]), row_ids=row_ids)
    return weights


def launch_embedding(shape, ids, weight, type_name, dtype, layout):
    """Run `dequantize` on the rows of `ids`."""
    return launch_dequantize(shape, weight, type_name, dtype, layout, ids.reshape(-1).contiguous())


def prepare(type_name: str, device: torch.device) -> None:
    """Bring what the kernels of a type look up to a GPU, where `torch.compile` may record its first product in a CUDA
    graph: made there, it would lie in the memory of that graph, which PyTorch refuses.
    """
    _module("unpack").table(type_name, device)
    _module("gemv").words_of(type_name, device)
    for is_stream in (False, True):
        _module("activations").order_of(type_name, device, is_stream)
    if _module("activations").runs_gluon(device, torch.bfloat16):
        _module("ring_grad").columns_of(type_name, device)


def _say_what_is_missing(activations: Tensor) -> None:
    """Warn once on GPUs before an A100, for all but few rows of activations."""
    if not _module("activations").takes_fragments(activations.device):
        _warn_once(
            "GPUs before an A100 (compute capability 8.0) have kernels for few rows only; more are multiplied with a "
            "matrix decoded whole, those of experts by PyTorch. Their tensor cores take float16 and no bfloat16"
        )


def _first_kernel(product: str, type_name: str, x: Tensor) -> ModuleType:
    for name, most in _KERNELS[product]:
        is_there = name not in _GLUON or _module("activations").runs_gluon(x.device, x.dtype)
        if len(x) <= most and is_there and _module(name).supports(type_name, x, product):
            return _module(name)
    return _module("two_pass")  # takes every type and number of rows


@functools.cache
def _module(name: str) -> ModuleType:
    """Import a kernel module when it is first used: Triton need not be there to import this one."""
    return importlib.import_module(f"{__package__}.{'gluon' if name in _GLUON else 'triton'}.{name}")


def _refusal(weight: Tensor, layout: str, dtype: torch.dtype) -> str | None:
    """Return why Triton cannot run this; None when it can."""
    if layout != "planes":
        return "the weight is in blocks: convert it once with `kernels.planes.pack_planes` and pass layout='planes'"
    if not has_triton():
        return "Triton is not installed: install the `gpu` extra"
    if not weight.is_contiguous() or weight.data_ptr() % 16:
        return "the planar weight is not contiguous or does not start at a multiple of 16 bytes"
    if dtype not in _DTYPES:
        return f"there are kernels for bfloat16, float16 and float32, not for {dtype}"
    return None


@functools.cache
def has_triton() -> bool:
    """Return True where Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"packed weights on a GPU run without their kernels, slowly: {reason}", stacklevel=2)
