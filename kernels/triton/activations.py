"""Activations as `gemv` and as `tiles` take them: integers with a scale for every 32, or floats in another order.

`int8` keeps round(x / d) with d = max|x| / 127. `fixed16` keeps 16-bit fixed point as a signed high and low byte,
x = d * (256 * high + low), d a power of two: a value within 2^-6 of the largest of its group keeps all bits of bf16,
and nothing is off by more than 2^-15 of the largest, so that sums of products are as good as bf16 products.
Layout of the bytes: `[M, P, 8, K / 128, 16]`, see `bit_words`.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dynquant.kernels import shapes
from dynquant.kernels.triton.fragments import columns, step_of


@triton.jit
def _act_quant_kernel(
    x_ptr, q_ptr, d_ptr, stride_xm, K, padded_K, IS_FIXED16: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        # The product may only start to read weights once whatever wrote them is done: wait first.
        gdc_wait()
        gdc_launch_dependents()
    m = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    k = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + m * stride_xm + k, mask=k < K, other=0.0).to(tl.float32)  # [GROUPS, 32]
    largest = tl.max(tl.abs(x), axis=1)
    # Infinite or missing activations make the scale, and so every sum over the group, not a number.
    poison = tl.sum(x, axis=1) * 0.0
    unit = k // 16
    place = (unit % 8 * (padded_K // 128) + unit // 8) * 16 + k % 16
    if IS_FIXED16:
        exponent = tl.maximum(tl.minimum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 254), 16)
        d = ((exponent - 13) << 23).to(tl.float32, bitcast=True)
        inverse = ((267 - exponent) << 23).to(tl.float32, bitcast=True)
        v = tl.floor(x * inverse[:, None] + 0.5).to(tl.int32)  # 2^14 at most
        high = (v + 128) >> 8  # rounded, so that the low byte is signed
        base = q_ptr + m * 2 * padded_K
        tl.store(base + place, high.to(tl.int8), mask=k < K)
        tl.store(base + padded_K + place, (v - high * 256).to(tl.int8), mask=k < K)
    else:
        d = largest / 127.0
        inverse = tl.where(largest > 0.0, 127.0 / largest, 0.0)
        v = tl.floor(x * inverse[:, None] + 0.5)
        v = tl.minimum(tl.maximum(v, -127.0), 127.0).to(tl.int32)
        tl.store(q_ptr + m * padded_K + place, v.to(tl.int8), mask=k < K)
    d += poison
    tl.store(d_ptr + m * (padded_K // 32) + group, d, mask=group < K // 32)


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, (0, 0) of another GPU, None of what is no GPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_capability(device) if torch.version.hip is None else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; those of an H100 or H200 where there is none to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def has_hopper_instructions(device: torch.device) -> bool:
    """Tell whether the device has what sm_90 brought: a kernel may start before the one ahead of it ends (programmatic
    dependent launch)."""
    return (capability(device) or (0, 0)) >= (9, 0)


def is_hopper(device: torch.device) -> bool:
    """Tell whether the device is of the generation of an H100, on which constants were measured."""
    return (capability(device) or (0, 0))[0] == 9


def runs_gluon(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether `kernels.gluon` runs: on a Hopper GPU, by the Triton it was tested with (Gluon changes between
    versions), for activations of 16 bits."""
    return dtype in (torch.bfloat16, torch.float16) and is_hopper(device) and triton.__version__.startswith("3.6.")


def takes_fragments(device: torch.device) -> bool:
    """Tell whether `fragments` run on the device: not on a GPU before an A100, which has no pairs of bfloat16 and turns
    no float32 into pairs. Those of a CPU are interpreted."""
    return (capability(device) or (8, 0)) >= (8, 0)


def has_tensor_cores(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether Triton multiplies this dtype on tensor cores: it leaves those of GPUs before an A100 alone, and
    float32 has none that are exact enough."""
    return dtype in (torch.bfloat16, torch.float16) and takes_fragments(device)


def quantize_activations(x: Tensor, act: str, *, padded_rows: int = 0, pdl: bool = False) -> tuple[Tensor, Tensor]:
    """x [M, K] -> bytes int8 [M, P, K'], in the order of `bit_words`, and scales float32 [M, K' / 32].

    `act` is "int8" (P = 1) or "bf16" (P = 2: 16-bit fixed point, no worse than bf16 products). K % 32 == 0, and K' is
    the next multiple of 128. Both get `padded_rows` rows if that is more; what lies beyond M and K is not written.
    `pdl` lets the next kernel start early (programmatic dependent launch); that kernel must wait, as `gemv` does.
    """
    is_fixed16, (num_rows, row_length) = act == "bf16", x.shape
    rows = max(num_rows, padded_rows)
    padded_length = shapes.ceil_div(row_length, 128) * 128
    q = torch.empty(rows, 1 + is_fixed16, padded_length, dtype=torch.int8, device=x.device)
    d = torch.empty(rows, padded_length // 32, dtype=torch.float32, device=x.device)
    groups = 16  # of a program: 512 values, four a thread
    grid = (shapes.ceil_div(row_length, 32 * groups), num_rows)
    sizes = x.stride(0), row_length, padded_length
    _act_quant_kernel[grid](x, q, d, *sizes, is_fixed16, groups, pdl, num_warps=4, launch_pdl=pdl)
    return q, d


@functools.cache
def order_of(type_name: str, device: torch.device, is_stream: bool) -> Tensor:
    """Return the columns of a step in the order of `arrange`, int32, kept once per device."""
    taken = columns(type_name)
    if is_stream:  # sixteen bytes of a thread beside those of the next
        taken = taken.view(4, -1, 4, 2)
    return taken.transpose(0, 1).flatten().int().to(device)


def arrange(
    x: Tensor,
    type_name: str,
    num_rows: int,
    *,
    is_stream: bool = False,
    places: Tensor | None = None,
    slots: int = 1,
    zeros: Tensor | None = None,
) -> Tensor:
    """Activations [M, K] in the order of fragments, or of `two_pass` if `is_stream`: [num_rows, whole steps].

    With `places` int [P] row i of the result is row places[i] // slots of x. Rows beyond these are zero. Words
    int32 of `zeros` become zero on the way, for a kernel that comes next.
    """
    length, step = x.shape[1], step_of.fn(type_name)
    num_steps = shapes.ceil_div(length, step)
    arranged = x.new_empty(num_rows, num_steps * step)
    sources, together = len(x) if places is None else len(places), 1 if num_rows < 128 else 8
    is_early = has_hopper_instructions(x.device)
    # One grid axis: the others end at 65535 programs, fewer than 64k tokens of eight experts each take.
    _arrange_kernel[(num_steps * shapes.ceil_div(num_rows, together),)](
        x, arranged, order_of(type_name, x.device, is_stream), places, zeros, sources, num_rows, length, slots,
        0 if zeros is None else zeros.numel(),
        STEP=step, ROWS=together, PDL=is_early, num_warps=2, launch_pdl=is_early,
    )  # fmt: skip
    return arranged


@triton.jit(do_not_specialize=["num_sources", "num_rows", "slots", "num_zeros"])
def _arrange_kernel(
    x_ptr, out_ptr, order_ptr, places_ptr, zeros_ptr, num_sources, num_rows, length, slots, num_zeros,
    STEP: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if zeros_ptr is not None and tl.program_id(0) == 0:
        for first in range(0, num_zeros, 512):
            word = first + tl.arange(0, 512)
            tl.store(zeros_ptr + word, tl.zeros([512], tl.int32), mask=word < num_zeros)
    i = tl.arange(0, STEP)[None, :]
    # Two neighbours stay neighbours, all others may be anywhere.
    num_steps = tl.cdiv(length, STEP)
    step = tl.program_id(0) % num_steps
    k = step * STEP + tl.max_contiguous(tl.multiple_of(tl.load(order_ptr + i), [1, 2]), [1, 2])
    place = (tl.program_id(0) // num_steps * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    source = place
    if places_ptr is not None:
        source = tl.load(places_ptr + tl.minimum(place, num_sources - 1)) // slots
    x = tl.load(x_ptr + source * length + k, mask=(place < num_sources) & (k < length), other=0.0)
    out = out_ptr + (place * num_steps + step) * STEP + i
    tl.store(out, x, mask=place < num_rows)
