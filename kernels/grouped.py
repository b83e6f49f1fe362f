"""Triton: products of tokens with the planar weights of their experts, forward and gradient, in one launch.

A pair is a token and one of its slots. Few pairs: every pair reads its own expert's rows (`_pair_*`), bound by memory.
Many pairs: they are sorted by expert, cut into tiles of pairs of one expert, and a tile decodes each piece of the
matrix once for all its pairs (`_tile_*`). The tile table is made on the device for the most tiles there can be, so
that nothing waits for the host; tiles left over exit before they read anything. Products are summed in float32 in a
fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynquant.kernels import shapes
from dynquant.kernels.unpack import table, unpack_groups
from dynquant.quant_types import quant_type

_MOST_SINGLE_PAIRS = 32
"""Up to this many pairs read the weights one by one."""
_ZEROS, _LEFT_OVER = -1, -2


def linear(x: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str) -> Tensor:
    """x [T, K] or [T, k, K] times planar experts uint8 [E, N, row_bytes] transposed: [T, k, N].

    Pairs whose id in `expert_ids` int [T, k] is outside 0 to E - 1 give zeros. All tensors are contiguous.
    """
    return _product(x, weight, expert_ids, type_name, is_transposed=False)


def input_grad(dy: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str) -> Tensor:
    """dy [T, N] or [T, k, N] times planar experts uint8 [E, N, row_bytes]: [T, k, K]; see `linear`."""
    return _product(dy, weight, expert_ids, type_name, is_transposed=True)


def _product(inputs: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, *, is_transposed: bool) -> Tensor:
    stored = quant_type(type_name)
    num_experts, num_rows, _ = weight.shape
    length = shapes.row_length(weight, stored)
    num_pairs = expert_ids.numel()
    product = inputs.new_empty(*expert_ids.shape, length if is_transposed else num_rows)
    codebook = table(stored.name, weight.device)
    sizes = (
        weight.numel() // stored.block_bytes, num_experts, num_rows, length // 32,
        expert_ids.shape[1] if inputs.dim() == 2 else 1,
    )  # fmt: skip
    if num_pairs <= _MOST_SINGLE_PAIRS:
        kernel, extent, config = _pair_config(num_rows, length, is_transposed)
        grid = (extent, num_pairs)
        kernel[grid](inputs, weight, codebook, expert_ids.contiguous(), product, *sizes, TYPE=stored.name, **config)
    else:
        kernel, extent, config = _tile_config(num_rows, length, num_pairs // num_experts, is_transposed)
        order, tiles = sorted_tiles(expert_ids, num_experts, config["BM"])
        grid = (extent, tiles.shape[1])
        kernel[grid](
            inputs, weight, codebook, order, tiles, product, *sizes, tiles.shape[1], TYPE=stored.name, **config
        )
    return product


def _pair_config(num_rows: int, length: int, is_transposed: bool) -> tuple[object, int, dict[str, int]]:
    """Kernel, programs for one pair, and its constants."""
    if is_transposed:
        return _pair_input_grad_kernel, triton.cdiv(length, 128), {"BN": 32, "G": 4, "num_warps": 4}
    return _pair_linear_kernel, triton.cdiv(num_rows, 16), {"BN": 16, "G": 8, "num_warps": 4}


def _tile_config(
    num_rows: int, length: int, per_expert: int, is_transposed: bool
) -> tuple[object, int, dict[str, int]]:
    """Kernel, programs for one tile of pairs, and its constants."""
    block_m = 16 if per_expert <= 16 else 32 if per_expert <= 32 else 64 if per_expert <= 256 else 128
    config = {"BM": block_m, "BN": 64, "G": 2, "num_warps": 4, "num_stages": 3}
    if is_transposed:
        return _tile_input_grad_kernel, triton.cdiv(length, 64), config
    return _tile_linear_kernel, triton.cdiv(num_rows, 64), config


def sorted_tiles(expert_ids: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Pairs in the order of their experts, and how tiles of `block_m` cover them, without waiting for the device.

    Returns:
        order int64 [pairs], and int32 [3, tiles]: the expert (-1: ids that are no expert here, -2: left over), the
        first place in `order`, and the place after the last.
    """
    ids, order = torch.sort(expert_ids.reshape(-1), stable=True)
    starts = torch.searchsorted(ids, torch.arange(num_experts + 1, device=ids.device, dtype=ids.dtype))
    num_tiles = triton.cdiv(len(ids), block_m) + num_experts + 2
    tiles = torch.empty(3, num_tiles, dtype=torch.int32, device=ids.device)
    _tile_table_kernel[(triton.cdiv(num_tiles, 32),)](
        starts, tiles, len(ids), num_experts, num_tiles,
        BM=block_m, SEGMENTS=triton.next_power_of_2(num_experts + 2), num_warps=4,
    )  # fmt: skip
    return order, tiles


@triton.jit
def _tile_table_kernel(
    starts_ptr, tiles_ptr, num_pairs, num_experts, num_tiles, BM: tl.constexpr, SEGMENTS: tl.constexpr
):
    """Segment 0 holds ids below zero, 1 + e those of expert e, num_experts + 1 those above."""
    segment = tl.arange(0, SEGMENTS)
    is_used = segment < num_experts + 2
    start = tl.load(starts_ptr + segment - 1, mask=is_used & (segment > 0), other=0).to(tl.int32)
    stop = tl.load(starts_ptr + segment, mask=segment <= num_experts, other=num_pairs).to(tl.int32)
    counts = tl.where(is_used, (stop - start + BM - 1) // BM, 0)
    ends = tl.cumsum(counts, 0)
    tile = tl.program_id(0) * 32 + tl.arange(0, 32)
    is_own = (ends[None, :] > tile[:, None]) & ((ends - counts)[None, :] <= tile[:, None])  # [32, SEGMENTS]
    expert = tl.sum(tl.where(is_own, segment[None, :], 0), 1) - 1
    first = tl.sum(tl.where(is_own, (start - (ends - counts) * BM)[None, :], 0), 1) + tile * BM
    last = tl.minimum(tl.sum(tl.where(is_own, stop[None, :], 0), 1), first + BM)
    has_own = tl.sum(is_own.to(tl.int32), 1) > 0
    expert = tl.where(has_own, tl.where(expert == num_experts, -1, expert), -2)
    is_tile = tile < num_tiles
    tl.store(tiles_ptr + tile, expert, mask=is_tile)
    tl.store(tiles_ptr + num_tiles + tile, first, mask=is_tile)
    tl.store(tiles_ptr + 2 * num_tiles + tile, last, mask=is_tile)


@triton.jit
def _pair_linear_kernel(
    x_ptr, planes_ptr, table_ptr, ids_ptr, y_ptr,
    num_blocks, num_experts, N, K_groups, slots,
    TYPE: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    y_ptr += pair * N
    if (expert < 0) | (expert >= num_experts):
        tl.store(y_ptr + n, tl.zeros([BN], y_ptr.dtype.element_ty), mask=n < N)
        return
    r = tl.arange(0, BN * G)
    g = r % G
    row = expert.to(tl.int32) * N + tl.minimum(tl.program_id(0) * BN + r // G, N - 1)
    x_ptr += pair // slots * K_groups * 32
    i = tl.arange(0, 4)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    acc = tl.zeros([BN * G, 4, 8], tl.float32)
    for start in range(0, K_groups, G):
        group = start + g
        w = unpack_groups(
            TYPE, planes_ptr, table_ptr, num_blocks.to(tl.int64), row * K_groups + tl.minimum(group, K_groups - 1)
        )
        x = tl.load(x_ptr + group[:, None, None] * 32 + i, mask=(group < K_groups)[:, None, None] & (i >= 0), other=0.0)
        acc += w * x.to(tl.float32)
    y = tl.sum(tl.reshape(acc, [BN, G * 32]), 1)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _pair_input_grad_kernel(
    dy_ptr, planes_ptr, table_ptr, ids_ptr, dx_ptr,
    num_blocks, num_experts, N, K_groups, slots,
    TYPE: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    k = tl.program_id(0) * G * 32 + tl.arange(0, G * 32)
    dx_ptr += pair * K_groups * 32
    if (expert < 0) | (expert >= num_experts):
        tl.store(dx_ptr + k, tl.zeros([G * 32], dx_ptr.dtype.element_ty), mask=k < K_groups * 32)
        return
    r = tl.arange(0, BN * G)
    group = tl.minimum(tl.program_id(0) * G + r % G, K_groups - 1)
    dy_ptr += pair // slots * N
    acc = tl.zeros([BN * G, 4, 8], tl.float32)
    for start in range(0, N, BN):
        n = start + r // G
        row = expert.to(tl.int32) * N + tl.minimum(n, N - 1)
        w = unpack_groups(TYPE, planes_ptr, table_ptr, num_blocks.to(tl.int64), row * K_groups + group)
        dy = tl.load(dy_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        acc += w * dy[:, None, None]
    dx = tl.sum(tl.reshape(acc, [BN, G * 32]), 0)
    tl.store(dx_ptr + k, dx.to(dx_ptr.dtype.element_ty), mask=k < K_groups * 32)


@triton.jit
def _tile_linear_kernel(
    x_ptr, planes_ptr, table_ptr, order_ptr, tiles_ptr, y_ptr,
    num_blocks, num_experts, N, K_groups, slots, num_tiles,
    TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """y^T = W x^T: as the left operand the decoded weights go to the tensor cores straight from registers."""
    tile = tl.program_id(1)
    expert = tl.load(tiles_ptr + tile)
    if expert == -2:
        return
    place = tl.load(tiles_ptr + num_tiles + tile) + tl.arange(0, BM)
    is_pair = place < tl.load(tiles_ptr + 2 * num_tiles + tile)
    pair = tl.load(order_ptr + place, mask=is_pair, other=0)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN, BM], tl.float32)
    if expert >= 0:
        r = tl.arange(0, BN * G)
        row = expert * N + tl.minimum(tl.program_id(0) * BN + r // G, N - 1)
        k = tl.arange(0, G * 32)
        x_ptrs = x_ptr + (pair // slots)[None, :] * (K_groups * 32) + k[:, None]
        for start in range(0, K_groups, G):
            groups = row * K_groups + tl.minimum(start + r % G, K_groups - 1)
            w = unpack_groups(TYPE, planes_ptr, table_ptr, num_blocks.to(tl.int64), groups)
            x = tl.load(
                x_ptrs + start * 32, mask=is_pair[None, :] & (start * 32 + k < K_groups * 32)[:, None], other=0.0
            )
            acc = tl.dot(tl.reshape(w, [BN, G * 32]).to(x.dtype), x, acc, input_precision="ieee")
    y_ptrs = y_ptr + pair[None, :] * N + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=is_pair[None, :] & (n < N)[:, None])


@triton.jit
def _tile_input_grad_kernel(
    dy_ptr, planes_ptr, table_ptr, order_ptr, tiles_ptr, dx_ptr,
    num_blocks, num_experts, N, K_groups, slots, num_tiles,
    TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    expert = tl.load(tiles_ptr + tile)
    if expert == -2:
        return
    place = tl.load(tiles_ptr + num_tiles + tile) + tl.arange(0, BM)
    is_pair = place < tl.load(tiles_ptr + 2 * num_tiles + tile)
    pair = tl.load(order_ptr + place, mask=is_pair, other=0)
    k = tl.program_id(0) * G * 32 + tl.arange(0, G * 32)
    acc = tl.zeros([BM, G * 32], tl.float32)
    if expert >= 0:
        r = tl.arange(0, BN * G)
        group = tl.minimum(tl.program_id(0) * G + r % G, K_groups - 1)
        n = tl.arange(0, BN)
        dy_ptrs = dy_ptr + (pair // slots)[:, None] * N + n[None, :]
        for start in range(0, N, BN):
            row = expert * N + tl.minimum(start + r // G, N - 1)
            w = unpack_groups(TYPE, planes_ptr, table_ptr, num_blocks.to(tl.int64), row * K_groups + group)
            dy = tl.load(dy_ptrs + start, mask=is_pair[:, None] & (start + n < N)[None, :], other=0.0)
            acc = tl.dot(dy, tl.reshape(w, [BN, G * 32]).to(dy.dtype), acc, input_precision="ieee")
    dx_ptrs = dx_ptr + pair[:, None] * (K_groups * 32) + k[None, :]
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=is_pair[:, None] & (k < K_groups * 32)[None, :])
