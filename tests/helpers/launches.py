"""Compiles what `dispatch` would launch on a GPU that is not there, and tells what the machine code needs of it."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.kernels import dispatch
from dynquant.kernels.triton import activations
from tests.helpers.sm90 import TOOLS, compiled

_POINTERS = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
_EXPERTS, _ROWS, _COLUMNS = 128, 2048, 4096


@dataclass(frozen=True)
class Needs:
    """What a program of a kernel takes: bytes of local memory (spilled registers), of shared memory, tensor memory."""

    kernel: str
    local: int
    shared: int
    tensor: int


def needs(capability: int, type_name: str, product: str, rows: int, dtype: torch.dtype) -> list[Needs]:
    """Return what each kernel needs that `dispatch` launches for a product, in the order of launches.

    Args:
        capability: of the GPU, 80 for 8.0.
        type_name: the quant type of the weights, a matrix or a stack of experts.
        product: linear, input_grad, experts_linear, experts_input_grad, or `dequantize` or `embedding`.
        rows: of activations; of experts tokens, each of which goes to eight; ids of an embedding.
        dtype: of the activations, or of decoded weights.
    """
    with pytest.MonkeyPatch.context() as patch:
        launches = []
        patch.setattr(activations, "capability", lambda device: divmod(capability, 10))
        patch.setattr(JITFunction, "run", lambda self, *given, **options: launches.append((self, given, options)))
        _ask(type_name, product, rows, dtype)
    return [_needs(capability, *launch) for launch in launches]


def _ask(type_name: str, product: str, rows: int, dtype: torch.dtype) -> None:
    stored, transposed = QUANT_TYPES[type_name], product.endswith("input_grad")
    row_bytes = _COLUMNS // stored.block_size * stored.block_bytes
    width, result = (_ROWS, _COLUMNS) if transposed else (_COLUMNS, _ROWS)
    if product.startswith("experts"):
        weight, ids = _empty(torch.uint8, _EXPERTS, _ROWS, row_bytes), _empty(torch.int64, rows, 8)
        x = _empty(dtype, rows, *([8] if transposed else []), width)
        dispatch.launch_experts(None, x, weight, ids, type_name, "planes", transposed=transposed)
        return
    weight = _empty(torch.uint8, _ROWS, row_bytes)
    if product == "dequantize":
        dispatch.launch_dequantize((_ROWS, _COLUMNS), weight, type_name, dtype, "planes")
    elif product == "embedding":
        ids = _empty(torch.int64, rows)
        dispatch.launch_embedding((rows, _COLUMNS), ids, weight, type_name, dtype, "planes")
    else:
        x = _empty(dtype, rows, width)
        dispatch.launch_product((rows, result), x, weight, type_name, "planes", transposed=transposed)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _needs(capability: int, kernel: JITFunction, given: tuple, options: dict[str, object]) -> Needs:
    values = dict(zip(kernel.arg_names, given, strict=False)) | options
    types, constants, multiples = {}, {}, set()
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        is_plain = parameter.do_not_specialize
        if isinstance(value, Tensor):
            types[name] = _POINTERS[value.dtype]
        elif isinstance(value, TensorDescriptor):
            block = f"{_POINTERS[value.base.dtype][1:]}{value.block_shape}"
            types[name] = f"tensordesc<{block},{value.layout!r}>"
        elif parameter.is_constexpr or value is None or (value == 1 and not is_plain):
            constants[name] = value
        else:
            types[name] = "i32" if abs(value) < 1 << 31 else "i64"
            multiples |= {name} if value % 16 == 0 and not is_plain else set()
    launched = values.keys() - set(kernel.arg_names) - {"grid", "warmup", "launch_pdl"}
    options = {name: values[name] for name in launched}
    result = compiled(kernel, types, constants, multiples, capability=capability, **options)
    with NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(result.asm["cubin"])
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(STACK|SHARED|LOCAL):(\d+)", listing)}
    shared = found["SHARED"] + result.metadata.shared
    return Needs(kernel.fn.__name__, found["STACK"] + found["LOCAL"], shared, result.metadata.tmem_size)
