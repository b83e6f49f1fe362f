"""Triton: tiles of products, rows of activations by rows (or columns) of packed weights, on the tensor cores.

A program decodes each piece of the matrix once for its BM rows, rounds it to the dtype of the activations and adds
products in float32. `grouped` and `fused` launch these kernels: the one with a table of tiles that each belong to an
expert (-1: nobody's, the result is zero; -2: nothing to do), the other without, for a single matrix.

Arguments in common: `num_blocks` of the whole tensor, N rows of a matrix, `K_groups` groups of 32 weights in a row,
`slots` results that share a row of activations, `num_pairs` results. The third axis of the forward grid shares out the
columns of the matrix: its programs write partial sums, float32 [splits, num_pairs, N].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynquant.formats.quant_types import QuantType
from dynquant.kernels import shapes
from dynquant.kernels.triton.gemv import add_splits
from dynquant.kernels.triton.unpack import table, unpack_groups

_RESIDENT = {16: 896, 32: 640, 64: 512, 128: 384}  # rows of a program -> programs that an H100 runs at once


def tile_config(num_rows: float, dtype: torch.dtype) -> dict[str, int]:
    """Return constants and launch options of the kernels for about so many rows of activations that share a matrix."""
    if dtype == torch.float32:  # no tensor cores: larger tiles were seen to spill registers
        return {"BM": 16, "BN": 64, "G": 1, "num_warps": 4, "num_stages": 2}
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64 if num_rows <= 64 else 128
    # A pipeline of loads needs registers and shared memory that more programs at once make better use of. A limit that
    # is not needed makes the compiler take more registers.
    limit = {"maxnreg": 168} if block_m == 128 else {}
    return {"BM": block_m, "BN": 64, "G": 2, "num_warps": 4, "num_stages": 1, **limit}


def column_shares(num_programs: int, config: dict[str, int], num_groups: int) -> int:
    """Return how many programs should share the columns of a matrix so that the device is busy: a power of two."""
    shares, steps = 1, num_groups // config["G"]
    while 2 * shares * num_programs <= _RESIDENT[config["BM"]] and steps >= 8 * shares:
        shares *= 2
    return shares


@triton.jit
def _pairs_of(tile, order_ptr, tiles_ptr, num_tiles, num_pairs, BM: tl.constexpr):
    """Return the pairs of a tile, int64 [BM], and which of them exist; others stand for a pair that does."""
    if order_ptr is None:
        place = tile * BM + tl.arange(0, BM)
        is_pair = place < num_pairs
        pair = tl.minimum(place, num_pairs - 1).to(tl.int64)
    else:
        place = tl.load(tiles_ptr + num_tiles + tile) + tl.arange(0, BM)
        is_pair = place < tl.load(tiles_ptr + 2 * num_tiles + tile)
        pair = tl.load(order_ptr + place, mask=is_pair, other=0)
    return pair, is_pair


@triton.jit(do_not_specialize=["num_blocks", "num_tiles", "num_pairs"])
def tile_linear_kernel(
    x_ptr, planes_ptr, table_ptr, order_ptr, tiles_ptr, y_ptr,
    num_blocks, N, K_groups, slots, num_tiles, num_pairs,
    TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """y^T = W x^T: as the left operand the decoded weights go to the tensor cores straight from registers."""
    tile = tl.program_id(1)
    expert = 0
    if order_ptr is not None:
        expert = tl.load(tiles_ptr + tile)
        if expert == -2:
            return
    pair, is_pair = _pairs_of(tile, order_ptr, tiles_ptr, num_tiles, num_pairs, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN, BM], tl.float32)
    if expert >= 0:
        r = tl.arange(0, BN * G)
        row = expert * N + tl.minimum(tl.program_id(0) * BN + r // G, N - 1)
        k = tl.arange(0, G * 32)
        x_ptrs = x_ptr + (pair // slots)[None, :] * (K_groups * 32) + k[:, None]
        share = tl.cdiv(tl.cdiv(K_groups, G), tl.num_programs(2)) * G
        for start in range(tl.program_id(2) * share, tl.minimum((tl.program_id(2) + 1) * share, K_groups), G):
            groups = row * K_groups + tl.minimum(start + r % G, K_groups - 1)
            w = unpack_groups(TYPE, planes_ptr, table_ptr, num_blocks.to(tl.int64), groups)
            x = tl.load(
                x_ptrs + start * 32, mask=is_pair[None, :] & (start * 32 + k < K_groups * 32)[:, None], other=0.0
            )
            acc = tl.dot(tl.reshape(w, [BN, G * 32]).to(x.dtype), x, acc, input_precision="ieee")
    y_ptrs = y_ptr + (tl.program_id(2) * num_pairs.to(tl.int64) + pair)[None, :] * N + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=is_pair[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["num_blocks", "num_tiles", "num_pairs"])
def tile_input_grad_kernel(
    dy_ptr, planes_ptr, table_ptr, order_ptr, tiles_ptr, dx_ptr,
    num_blocks, N, K_groups, slots, num_tiles, num_pairs,
    TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    expert = 0
    if order_ptr is not None:
        expert = tl.load(tiles_ptr + tile)
        if expert == -2:
            return
    pair, is_pair = _pairs_of(tile, order_ptr, tiles_ptr, num_tiles, num_pairs, BM)
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


def multiply_tiles(
    product: Tensor, x: Tensor, weight: Tensor, stored: QuantType, transposed: bool, config: dict, pairs=(None, None)
) -> Tensor:
    """Write x W^T, or x W if `transposed`, into `product` [pairs, extent] and return it; `config` of `tile_config`.

    `pairs` is what `grouped.sorted_tiles` returns; without it the weight is a single matrix.
    """
    order, tiles = pairs
    extent, num_groups = product.shape[-1], shapes.row_length(weight, stored) // 32
    num_pairs = product.numel() // extent
    num_tiles = triton.cdiv(num_pairs, config["BM"]) if tiles is None else tiles.shape[1]
    grid = (triton.cdiv(extent, 32 * config["G"] if transposed else config["BN"]), num_tiles)
    is_shared = tiles is None and not transposed
    shares = column_shares(grid[0] * num_tiles, config, num_groups) if is_shared else 1
    target = product if shares == 1 else product.new_empty(shares, *product.shape, dtype=torch.float32)
    kernel = tile_input_grad_kernel if transposed else tile_linear_kernel
    kernel[(*grid, shares)](
        x, weight, table(stored.name, weight.device), order, tiles, target,
        weight.numel() // stored.block_bytes, weight.shape[-2], num_groups,
        num_pairs * x.shape[-1] // x.numel(), num_tiles, num_pairs, TYPE=stored.name, **config,
    )  # fmt: skip
    if shares > 1:
        add_splits(target, product, pdl=False)
    return product
