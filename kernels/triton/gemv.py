"""y = x W^T for few rows of activations and packed weights: a memory-bound product, 4 bytes a time.

Every thread multiplies whole chunks of weights (`bit_chunks`, `codebook_rows`) with integer activations
(`activations`) by dp4a. A program owns BN rows of W and M of x, takes T chunks at a time, and walks along K; with
SPLIT > 1 several programs share the rows and their float32 results are added in a fixed order, so that results never
depend on timing. `supports` and `linear` are for 1 to 4 rows, `routed` for rows of which each has its own expert's
matrix.
"""

# ruff: noqa: RUF005  (Triton has no `(*tuple, item)`)
import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.kernels import shapes
from dynquant.kernels.planes import PLANES, plane_starts
from dynquant.kernels.triton.activations import has_hopper_instructions, quantize_activations
from dynquant.kernels.triton.bit_chunks import (
    crumb_chunk,
    digit_chunk,
    neighbour_chunk,
    nibble_chunk,
    plain_chunk,
    table_chunk,
)
from dynquant.kernels.triton.bit_words import Inputs, Weights
from dynquant.kernels.triton.codebook_rows import codebook_rows, codebook_words, shared_codebook
from dynquant.kernels.triton.unpack import table

MAX_ROWS = 4

_CHUNKS = {
    **dict.fromkeys(("Q2_K", "Q3_K", "Q6_K", "TQ2_0"), (crumb_chunk, 64)),
    **dict.fromkeys(("Q4_K", "Q5_K"), (nibble_chunk, 64)),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), (plain_chunk, 32)),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"), (table_chunk, 32)),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (codebook_rows, 64)),
    "Q2_0": (neighbour_chunk, 64),
    "Q1_0": (neighbour_chunk, 128),
    "TQ1_0": (digit_chunk, 256),
}
"""Quant type -> the function that multiplies a chunk, and weights per chunk."""


@dataclass(frozen=True)
class GemvConfig:
    """A tiling of `gemv`: weight rows and warps (each 32 chunks wide) of a program, programs that share a row, rows of
    activations of a program, and dependent launch, which overlaps the start of a kernel with the end of the last one.
    Codebook types take `bn` rows a warp; fewer than eight warps would need more shared memory than there is.
    """

    bn: int
    warps: int
    split: int = 1
    rows: int = 1
    pdl: bool = False


@functools.cache
def gemv_config(type_name: str, num_x_rows: int) -> GemvConfig:
    """Return the tiling for `num_x_rows` rows of activations: measured choices, no search at run time."""
    rows = min(num_x_rows, MAX_ROWS)
    if _CHUNKS[type_name][0] is codebook_rows:
        return GemvConfig(bn=4 if rows <= 2 else 2, warps=8, rows=rows, pdl=True)
    is_wide = num_x_rows == 1 and type_name in ("Q4_K", "Q5_K")
    return GemvConfig(bn=2 if is_wide else 4, warps=1, rows=rows, pdl=True)


@triton.jit
def _store_codebook_rows(totals, y_ptr, N, num_x_rows, BN: tl.constexpr, WARPS: tl.constexpr):
    """Add up lanes; lane r stores row r of its warp."""
    M: tl.constexpr = len(totals) // BN
    lane, warp = tl.arange(0, 32)[:, None], tl.arange(0, WARPS)[None, :]
    for m in tl.static_range(M):
        y = tl.zeros([32, WARPS], tl.float32)
        for r in tl.static_range(BN):
            y = tl.where(lane == r, tl.sum(totals[r * M + m], axis=0)[None, :], y)
        mask = (lane < BN) & (m < num_x_rows)
        tl.store(y_ptr + m * N + (warp * BN + lane), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "num_x_rows", "num_experts", "slots"])
def gemv_kernel(
    w_ptr, xq_ptr, xd_ptr, grid_ptr, y_ptr, ids_ptr, N, num_x_rows, num_experts, slots,
    K: tl.constexpr, TYPE: tl.constexpr, MULTIPLY: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    STARTS: tl.constexpr, M: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, T: tl.constexpr, SPLIT: tl.constexpr,
    PDL: tl.constexpr, ROUTED: tl.constexpr, CODEBOOK: tl.constexpr,
):  # fmt: skip
    """With ROUTED, W is a stack of experts, M is 1, row m of y is that of x row m // slots and expert ids[m]."""
    if CODEBOOK:
        codebook = shared_codebook(grid_ptr, TYPE)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # Programs that share weight rows are neighbours, so that all but the first find the weights in the cache.
    x_blocks = tl.cdiv(num_x_rows, M)
    pid_n, pid_k = tl.program_id(0) // x_blocks, tl.program_id(1)
    first_m = tl.program_id(0) % x_blocks * M
    x_row = first_m // slots if ROUTED else first_m
    padded_K: tl.constexpr = (K + 127) // 128 * 128
    xq_ptr += x_row.to(tl.int64) * (P * padded_K // 4)
    xd_ptr += x_row * (padded_K // 32)
    row_blocks: tl.constexpr = K // BLOCK
    blocks = N.to(tl.int64) * row_blocks
    ROWS: tl.constexpr = BN * (T // 32) if CODEBOOK else BN
    # Programs of codebook types never go beyond the end: the last one does some rows again.
    first_row = tl.minimum(pid_n * ROWS, N - ROWS) if CODEBOOK else pid_n * ROWS
    first = first_row.to(tl.int64) * row_blocks
    if ROUTED:
        expert = tl.load(ids_ptr + first_m).to(tl.int64)
        if (expert < 0) | (expert >= num_experts):
            nothing = first_row + tl.arange(0, ROWS)
            offset = (pid_k * num_x_rows + first_m).to(tl.int64) * N
            tl.store(y_ptr + offset + nothing, tl.zeros([ROWS], y_ptr.dtype.element_ty), mask=nothing < N)
            return
        first += expert * blocks
        blocks *= num_experts
    if CODEBOOK:
        _store_codebook_rows(
            codebook_rows(
                Weights(w_ptr, blocks, first, STARTS),
                codebook,
                xq_ptr,
                xd_ptr,
                pid_k,
                K,
                TYPE,
                M,
                P,
                BN,
                T // 32,
                SPLIT,
            ),
            y_ptr + ((pid_k * num_x_rows + first_m).to(tl.int64) * N + first_row),
            N,
            num_x_rows - first_m,
            BN,
            T // 32,
        )
    else:
        # Rows and chunks beyond the end repeat the last ones; `valid` and the mask of the store cancel them.
        rows = tl.minimum(tl.arange(0, BN), N - 1 - pid_n * BN)[None, :]
        last: tl.constexpr = K // CHUNK - 1
        acc = ()
        for _ in tl.static_range(M):
            acc = acc + (tl.zeros([T, BN], tl.float32),)
        for step in range((last + T * SPLIT) // (T * SPLIT)):
            chunk = (step * SPLIT + pid_k) * T + tl.arange(0, T)[:, None]
            valid = chunk <= last
            chunk = tl.minimum(chunk, last)
            block = rows * row_blocks + chunk * CHUNK // BLOCK
            # Not by way of variables, in which Triton makes tensors of constants.
            parts = MULTIPLY(
                Weights(w_ptr, blocks, first, STARTS),
                block,
                chunk,
                Inputs(xq_ptr, xd_ptr, valid, padded_K, M, P),
                grid_ptr,
                TYPE,
            )
            new = ()
            for m in tl.static_range(M):
                new = new + (acc[m] + parts[m],)
            acc = new
        n = pid_n * BN + tl.arange(0, BN)
        for m in tl.static_range(M):
            y = tl.sum(acc[m], axis=0)
            offset = (pid_k * num_x_rows + first_m + m).to(tl.int64) * N
            limit = tl.where(first_m + m < num_x_rows, N, 0)
            tl.store(y_ptr + offset + n, y.to(y_ptr.dtype.element_ty), mask=n < limit)


@triton.jit
def add_splits_kernel(parts_ptr, y_ptr, num_values, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """y = the sum of SPLIT float32 arrays, first to last."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(SPLIT):
        total += tl.load(parts_ptr + s * num_values + i, mask=i < num_values, other=0.0)
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), mask=i < num_values)


def supports(type_name: str, x: Tensor, product: str = "linear") -> bool:
    """Return whether `linear` takes these activations for weights of this type."""
    return product == "linear" and takes(type_name, x) and 1 <= x.shape[0] <= MAX_ROWS


def takes(type_name: str, x: Tensor) -> bool:
    """Return whether the kernel takes these activations, however many rows they have."""
    has_rows = type_name in _CHUNKS and x.dim() == 2 and x.shape[1] % QUANT_TYPES[type_name].block_size == 0
    return has_rows and x.dtype in (torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Tensor, type_name: str, act: str = "bf16", config: GemvConfig | None = None) -> Tensor:
    """x [M, K] times planar weights uint8 [N, row_bytes], transposed: [M, N] of the dtype of x. `takes` must be true.

    `act` "bf16" is as exact as bf16 products, "int8" rounds the activations to 8 bits in groups of 32. `dispatch` gives
    it as many rows as `supports` says; more are programs of their own.
    """
    num_rows = x.shape[0]
    config = _launched(config or gemv_config(type_name, num_rows), x.device)
    padded = shapes.ceil_div(num_rows, config.rows) * config.rows
    x = x if x.stride(1) == 1 else x.contiguous()
    integers = quantize_activations(x, act, padded_rows=padded, pdl=config.pdl)
    return multiply(integers, weight, type_name, x.new_empty(num_rows, weight.shape[0]), config, None)


def routed(
    x: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, act: str = "bf16", config: GemvConfig | None = None
) -> Tensor:
    """x [T, K] or [T * k, K] times the expert of each slot, planar uint8 [E, N, row_bytes]: [T * k, N].

    `expert_ids` int [T, k]; ids outside 0 to E - 1 give zeros. `takes` must be true. Worth it for few slots only: every
    slot reads its expert's weights for itself.
    """
    config = _launched(config or gemv_config(type_name, 1), x.device)
    integers = quantize_activations(x, act, padded_rows=x.shape[0], pdl=config.pdl)
    y = x.new_empty(expert_ids.numel(), weight.shape[1])
    return multiply(integers, weight, type_name, y, config, expert_ids.contiguous())


def words_of(type_name: str, device: torch.device) -> Tensor:
    """Return what the kernel looks up: a table of its own for codebook types, that of `unpack` for others."""
    return (codebook_words if _CHUNKS[type_name][0] is codebook_rows else table)(type_name, device)


def _launched(config: GemvConfig, device: torch.device) -> GemvConfig:
    """Return the tiling as the device launches it."""
    return config if has_hopper_instructions(device) else replace(config, pdl=False)


def multiply(
    integers: tuple[Tensor, Tensor], weight: Tensor, type_name: str, y: Tensor, config: GemvConfig, ids: Tensor | None
) -> Tensor:
    """Write the product of `quantize_activations`, padded to whole programs, into y [M, N] and return it.

    With `ids` y is that of `routed`: rows of y for every row of activations are its slots.
    """
    (xq, xd), split = integers, config.split
    is_codebook = _CHUNKS[type_name][0] is codebook_rows
    num_results, width = y.shape
    if is_codebook and width < config.bn * config.warps:
        config = replace(config, bn=1, warps=1)
    target = y if split == 1 else y.new_empty(split, *y.shape, dtype=torch.float32)
    num_experts, slots = (1, 1) if ids is None else (weight.shape[0], num_results // xq.shape[0])
    row_length = shapes.row_length(weight, QUANT_TYPES[type_name])
    constants = kernel_constants(type_name, xq.shape[1], row_length, config, routed=ids is not None)
    num_rows = config.bn * config.warps if is_codebook else config.bn
    grid = (shapes.ceil_div(width, num_rows) * shapes.ceil_div(num_results, config.rows), split)
    gemv_kernel[grid](
        weight, xq.view(torch.int32), xd, words_of(type_name, weight.device), target, xd if ids is None else ids,
        width, num_results, num_experts, slots, **constants,
    )  # fmt: skip
    if split > 1:
        add_splits(target, y, config.pdl)
    return y


def add_splits(parts: Tensor, y: Tensor, pdl: bool) -> None:
    """y = parts [SPLIT, M, N] summed over the first dimension, first to last."""
    grid = (shapes.ceil_div(y.numel(), 256),)
    add_splits_kernel[grid](parts, y, y.numel(), parts.shape[0], 256, pdl, num_warps=4, launch_pdl=pdl)


@functools.cache
def kernel_constants(
    type_name: str, num_planes: int, row_length: int, config: GemvConfig, *, routed: bool = False
) -> dict[str, object]:
    """The constants and launch options of `gemv_kernel`."""
    multiply_chunk, chunk = _CHUNKS[type_name]
    starts = plane_starts(type_name, 1)
    in_block_order = sorted(PLANES[type_name], key=lambda field: field.offset)
    return {
        "K": row_length, "TYPE": type_name, "MULTIPLY": multiply_chunk, "CHUNK": chunk,
        "BLOCK": QUANT_TYPES[type_name].block_size, "STARTS": tuple(starts[field.name] for field in in_block_order),
        "M": config.rows, "P": num_planes, "BN": config.bn, "T": 32 * config.warps, "SPLIT": config.split,
        "PDL": config.pdl, "ROUTED": routed, "CODEBOOK": multiply_chunk is codebook_rows, "num_warps": config.warps,
        "launch_pdl": config.pdl,
    }  # fmt: skip
