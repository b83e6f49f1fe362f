"""Triton: tiles of products, rows of activations by rows (or columns) of packed weights, on the tensor cores.

A program decodes each piece of the matrix once for its BM rows, rounds it to the dtype of the activations and adds
products in float32. `grouped` launches these kernels with a table of tiles that each belong to an expert (-1: nobody's,
the result is zero; -2: nothing to do); `linear` is for a single matrix, where `two_pass` would decode more than it
multiplies. Gradients are those of experts alone.

Arguments in common: `num_blocks` of the whole tensor, N rows of a matrix, `K_groups` groups of 32 weights in a row,
`slots` results that share a row of activations, `num_pairs` results. The third axis of the forward grid shares out the
columns of the matrix: its programs write partial sums, float32 [splits, num_pairs, N].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dynquant.formats.quant_types import QuantType, quant_type
from dynquant.kernels import shapes
from dynquant.kernels.triton.activations import arrange, has_hopper_instructions, has_tensor_cores, is_hopper
from dynquant.kernels.triton.fragments import decode, fetch, kind_of, matrix, rows, step_of
from dynquant.kernels.triton.gemv import add_splits
from dynquant.kernels.triton.unpack import table, unpack_groups

_LINEAR = {
    16: {"BM": 16, "BN": 64, "WARPS": 4, "SLICES": 1, "STAGES": 1, "AHEAD": False},
    32: {"BM": 32, "BN": 64, "WARPS": 4, "SLICES": 1, "STAGES": 2, "AHEAD": False},
    64: {"BM": 64, "BN": 128, "WARPS": 8, "SLICES": 1, "STAGES": 1, "AHEAD": False},
    128: {"BM": 128, "BN": 128, "WARPS": 8, "SLICES": 2, "STAGES": 1, "AHEAD": False},
}
"""Rows of activations that share a matrix, at most -> constants of `tile_linear_kernel`, as measured on an H200."""

_FLOAT32 = {"BM": 16, "BN": 64, "WARPS": 4, "SLICES": 8, "STAGES": 1, "AHEAD": False}  # no tensor cores: short products


def linear_config(num_rows: float, dtype: torch.dtype) -> dict[str, int]:
    """Return constants of the forward kernel for about so many rows of activations that share a matrix."""
    if dtype == torch.float32:
        return _FLOAT32
    return next((config for most, config in _LINEAR.items() if num_rows <= most), _LINEAR[128])


def input_grad_config(num_rows: float, dtype: torch.dtype) -> dict[str, int]:
    """Return constants and launch options of the gradient's kernel for about so many rows that share a matrix."""
    if dtype == torch.float32:  # no tensor cores: larger tiles were seen to spill registers
        return {"BM": 16, "BN": 64, "G": 1, "num_warps": 4, "num_stages": 2}
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64 if num_rows <= 64 else 128
    # A pipeline of loads needs registers and shared memory that more programs at once make better use of. A limit that
    # is not needed makes the compiler take more registers.
    limit = {"maxnreg": 168} if block_m == 128 else {}
    return {"BM": block_m, "BN": 64, "G": 2, "num_warps": 4, "num_stages": 1, **limit}


def column_shares(num_programs: int, resident: int, num_steps: int) -> int:
    """Return how many programs should share the columns of a matrix so that the device is busy: a power of two.

    `resident` programs keep it busy.
    """
    shares = 1
    while 2 * shares * num_programs <= resident and num_steps >= 4 * shares:
        shares *= 2
    return shares


_RESIDENT = {16: 1056, 32: 528, 64: 132, 128: 132}  # rows of a program -> programs that keep an H200 busy


@triton.jit(do_not_specialize=["num_blocks", "num_tiles", "num_pairs"])
def tile_linear_kernel(
    x_ptr, planes_ptr, table_ptr, order_ptr, tiles_ptr, y_ptr,
    num_blocks, N, row_blocks, num_steps, num_tiles, num_pairs,
    TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WARPS: tl.constexpr, SLICES: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y^T = W x^T for activations of `arrange`, a row for every place of a tile."""
    STEP: tl.constexpr = step_of(TYPE)
    KIND: tl.constexpr = kind_of(x_ptr.dtype.element_ty)
    tile = tl.program_id(1)
    share = tl.cdiv(num_steps, tl.num_programs(2))
    start = tl.program_id(2) * share
    stop = tl.minimum(start + share, num_steps)
    expert, first, last = 0, tile * BM, num_pairs
    if tiles_ptr is not None:
        expert = tl.load(tiles_ptr + tile)
        if expert == -2:
            return
        first, last = tl.load(tiles_ptr + num_tiles + tile), tl.load(tiles_ptr + 2 * num_tiles + tile)
        stop = tl.where(expert < 0, start, stop)
        expert = tl.maximum(expert, 0)
    nb = num_blocks.to(tl.int64)
    row = (expert * N + tl.minimum(tl.program_id(0) * BN + rows(BN, WARPS), N - 1))[:, None]
    t = tl.arange(0, 4)[None, :]
    place = first + tl.arange(0, BM)
    x_ptrs = x_ptr + place.to(tl.int64)[None, :] * (num_steps * STEP) + tl.arange(0, STEP // SLICES)[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    raw = fetch(TYPE, planes_ptr, nb, row, row_blocks, tl.minimum(start, num_steps - 1), t)
    if PDL:
        gdc_wait()
    if AHEAD:
        x = tl.load(x_ptrs + tl.minimum(start, num_steps - 1) * STEP)
    for step in tl.range(start, stop, num_stages=STAGES):
        # The next step's bytes are on their way while this one's are multiplied.
        beyond = tl.minimum(step + 1, num_steps - 1)
        following = fetch(TYPE, planes_ptr, nb, row, row_blocks, beyond, t)
        if AHEAD:
            next_x = tl.load(x_ptrs + beyond * STEP)
        pairs = decode(TYPE, raw, table_ptr, t, KIND)
        for s in tl.static_range(SLICES):
            part = ()
            for e in tl.static_range(STEP // 8 // SLICES):
                part += (pairs[s * (STEP // 8 // SLICES) + e],)
            if not AHEAD:
                x = tl.load(x_ptrs + (step * STEP + s * (STEP // SLICES)))
            acc = tl.dot(matrix(part, BN, WARPS, x.dtype, KIND), x, acc, input_precision="ieee")
        raw = following
        if AHEAD:
            x = next_x
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    is_pair = place < last
    pair = place.to(tl.int64)
    if order_ptr is not None:
        pair = tl.load(order_ptr + place, mask=is_pair, other=0)
    y_ptrs = y_ptr + (tl.program_id(2) * num_pairs.to(tl.int64) + pair)[None, :] * N + n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=is_pair[None, :] & (n < N)[:, None])


@triton.jit(do_not_specialize=["num_blocks", "num_tiles"])
def tile_input_grad_kernel(
    dy_ptr, planes_ptr, table_ptr, order_ptr, tiles_ptr, dx_ptr,
    num_blocks, N, K_groups, slots, num_tiles,
    TYPE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """dx = dy W for a tile of pairs of an expert and G groups of columns."""
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


def supports(type_name: str, x: Tensor, product: str = "linear") -> bool:
    """Return whether tensor cores take these activations."""
    return has_tensor_cores(x.device, x.dtype)


def linear(x: Tensor, weight: Tensor, type_name: str) -> Tensor:
    """x [M, K] times planar rows uint8 [N, row_bytes] transposed: [M, N]. Both are contiguous."""
    product, config = x.new_empty(len(x), len(weight)), linear_config(len(x), x.dtype)
    return multiply(product, x, weight, quant_type(type_name), config)


def multiply(
    product: Tensor, x: Tensor, weight: Tensor, stored: QuantType, config: dict[str, int], pairs=(None, None)
) -> Tensor:
    """Write x W^T into `product` [pairs, N] and return it; `config` of `linear_config`.

    `pairs` is what `grouped.sorted_tiles` returns; without it the weight is a single matrix.
    """
    order, tiles = pairs
    num_rows, name = product.shape[-1], stored.name
    num_pairs, x = product.numel() // num_rows, x.reshape(-1, x.shape[-1])
    num_tiles = shapes.ceil_div(num_pairs, config["BM"]) if tiles is None else tiles.shape[1]
    # A tile of an expert reads beyond its last place.
    places = num_tiles * config["BM"] if tiles is None else num_pairs + config["BM"]
    arranged = arrange(x, name, places, places=order, slots=num_pairs // len(x))
    programs, num_steps = shapes.ceil_div(num_rows, config["BN"]) * num_tiles, arranged.shape[1] // step_of.fn(name)
    shares = column_shares(programs, _RESIDENT[config["BM"]], num_steps) if tiles is None else 1
    target = product if shares == 1 else product.new_empty(shares, *product.shape, dtype=torch.float32)
    is_early = has_hopper_instructions(x.device)
    tile_linear_kernel[(programs // num_tiles, num_tiles, shares)](
        arranged, weight, table(name, weight.device), order, tiles, target,
        weight.numel() // stored.block_bytes, num_rows, weight.shape[-1] // stored.block_bytes, num_steps,
        num_tiles, num_pairs, TYPE=name, **config, PDL=is_early, num_warps=config["WARPS"], launch_pdl=is_early,
    )  # fmt: skip
    if shares > 1:
        add_splits(target, product, pdl=is_early)
    return product


def multiply_back(
    product: Tensor, dy: Tensor, weight: Tensor, stored: QuantType, config: dict[str, int], pairs: tuple[Tensor, Tensor]
) -> Tensor:
    """Write dy W into `product` [pairs, K] and return it; `config` of `input_grad_config`, `pairs` as in `multiply`."""
    order, tiles = pairs
    num_pairs, num_tiles = product.numel() // product.shape[-1], tiles.shape[1]
    if not is_hopper(dy.device):
        config = {**config, "maxnreg": None}  # others' products take more registers: MXFP4 would spill some
    tile_input_grad_kernel[(shapes.ceil_div(product.shape[-1], 32 * config["G"]), num_tiles)](
        dy, weight, table(stored.name, weight.device), order, tiles, product,
        weight.numel() // stored.block_bytes, weight.shape[-2], shapes.row_length(weight, stored) // 32,
        num_pairs * dy.shape[-1] // dy.numel(), num_tiles, TYPE=stored.name, **config,
    )  # fmt: skip
    return product
