"""Gluon: gradients of activations, many rows, on an H100 or H200: dy W, decoding beside multiplying.

A program has two groups of four warps and one warp more, which brings the gradients of results by TMA into a ring of
slices of 64 rows of weights each, as in `ring`. Rows of weights are what is summed over here, so that tensor cores take
them from shared memory: a group decodes 64 rows of its half of 256 columns into one of its two buffers and starts their
product, which runs while it decodes the next 64 rows into the other.

Programs stay and take tiles of the product in turn, neighbours together.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dynquant.formats.quant_types import QuantType, quant_type
from dynquant.kernels import shapes
from dynquant.kernels.triton.activations import multiprocessors
from dynquant.kernels.triton.fragments import columns, decode, fetch, joined, kind_of, step_of
from dynquant.kernels.triton.gemv import add_splits
from dynquant.kernels.triton.unpack import table

_DEPTHS = {64: 8, 128: 6}
"""Rows of gradients of a program -> slices that the ring holds."""

_ROWS = gl.constexpr(64)  # of weights, of a slice
_WIDTH = gl.constexpr(128)  # columns of a group
_SLICES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def supports(type_name: str, x: Tensor, product: str = "input_grad") -> bool:
    """Return whether gradients of results [M, N] are rows that TMA takes, and long enough for this to be faster than
    `two_pass`, as measured on an H200.
    """
    return x.shape[1] % 8 == 0 and x.shape[1] >= 2048


def input_grad(dy: Tensor, weight: Tensor, type_name: str) -> Tensor:
    """dy [M, N] times planar rows uint8 [N, row_bytes]: [M, K]. Both are contiguous, and `supports` is true."""
    stored = quant_type(type_name)
    product = dy.new_empty(len(dy), shapes.row_length(weight, stored))
    if dy.data_ptr() % 16:  # a part of a larger tensor, which TMA does not take
        dy = dy.clone()
    return multiply_back(product, dy, weight, stored, _constants(64 if len(dy) <= 64 else 128))


def experts_config(num_rows: float, width: int) -> dict[str, int] | None:
    """Return constants for experts with so many rows on average of so many gradients each, or None where `tiles` are
    faster, or all that there is. As measured on an H200.
    """
    return None if num_rows < 12 or width % 8 else _constants(64 if num_rows < 48 else 128)


def _constants(block_m: int) -> dict[str, int]:
    return {"BM": block_m, "DEPTH": _DEPTHS[block_m]}


def multiply_back(
    product: Tensor, dy: Tensor, weight: Tensor, stored: QuantType, constants: dict[str, int], pairs=(None, None)
) -> Tensor:
    """Write dy W into `product` [pairs, K] and return it; `constants` of `experts_config`, `pairs` as in `tiles`."""
    order, tiles = pairs
    length, name, block_m = product.shape[-1], stored.name, constants["BM"]
    num_pairs, dy = product.numel() // length, dy.reshape(-1, dy.shape[-1])
    num_tiles = shapes.ceil_div(num_pairs, block_m) if tiles is None else tiles.shape[1]
    programs = multiprocessors(dy.device)
    shares = 1
    if tiles is None:
        num_steps = shapes.ceil_div(dy.shape[1], _ROWS.value)
        shares = _shares(shapes.ceil_div(length, 256) * num_tiles, programs, num_steps, product.numel())
    target = product if shares == 1 else product.new_empty(shares, *product.shape, dtype=torch.float32)
    taken, run = columns_of(name, weight.device)
    sorted_dy = dy if order is None else dy[order // (num_pairs // len(dy))]
    ring_grad_kernel[(programs,)](
        TensorDescriptor.from_tensor(sorted_dy, [block_m, _ROWS.value], _SLICES),
        weight, table(name, weight.device), taken, order, tiles, target,
        weight.numel() // stored.block_bytes, weight.shape[-2], length, weight.shape[-1] // stored.block_bytes,
        num_tiles, num_pairs, shares, TYPE=name, RUN=run, **constants, num_warps=4,
    )  # fmt: skip
    if shares > 1:
        add_splits(target, product, pdl=False)
    return product


def _shares(num_tiles: int, programs: int, num_steps: int, num_results: int) -> int:
    """Return how many programs should share the rows of weights of a tile, each of which adds up a part.

    A step of 64 rows takes about 1.4 us on an H200, which stores and adds up parts of 400,000 results in another.
    """

    def microseconds(shares: int) -> float:
        added = 0 if shares == 1 else 3 + shares * num_results / 400e3
        return math.ceil(num_tiles * shares / programs) * math.ceil(num_steps / shares) * 1.4 + added

    return min((1, 2, 4, 8, 16), key=microseconds)


@functools.cache
def columns_of(type_name: str, device: torch.device) -> tuple[Tensor, int]:
    """Return which columns of 256 those of both groups are, int32 [256], by fours of pairs, then threads, as stored,
    and how many beside each other are neighbours.
    """
    taken = columns(type_name)  # [4 threads, pairs, 2]
    steps = 256 // step_of.fn(type_name)
    taken = torch.cat([taken + i * step_of.fn(type_name) for i in range(steps)], 1)
    taken = taken.view(4, -1, 8)
    run = 8 if bool((taken == taken[..., :1] + torch.arange(8)).all()) else 2
    return taken.transpose(0, 1).flatten().int().to(device), run


@triton.constexpr_function
def _held():
    """Rows and quarters of a step [64, 4] as a group holds them: a thread has rows g and g + 8 of a warp's sixteen.

    Eight lanes store at a time, two rows: 4 apart, they are swizzled into different banks.
    """
    lanes = [[0, 1], [0, 2], [4, 0], [1, 0], [2, 0]]
    return gl.DistributedLinearLayout([[8, 0]], lanes, [[16, 0], [32, 0]], [], [64, 4])


@gluon.jit
def _buffered(pairs, dtype: gl.constexpr):
    """Pairs of `decode` as they lie in a buffer, [64, 8 * len(pairs)]: a thread stores sixteen bytes at a time."""
    level = ()
    for e in tl.static_range(len(pairs)):
        first, second = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs[e]], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
        )
        both = gl.join(first.to(dtype, bitcast=True), second.to(dtype, bitcast=True))
        level += (gl.reshape(both, [both.shape[0], 4, 1, 2]),)
    w = gl.reshape(joined(level), [level[0].shape[0], 4, len(pairs) // 4, 8])
    return gl.reshape(gl.permute(w, (0, 2, 1, 3)), [w.shape[0], 8 * len(pairs)])


@gluon.jit
def _place(item, tiles_ptr, across, N, num_tiles, num_pairs, shares, BM: gl.constexpr):
    """Return the column of an item, its expert (-1: none), first row of gradients and the one after the last, its share
    of the rows of weights, the first of them and the one after the last.
    """
    tile = item // across
    if tiles_ptr is None:
        share = tile // num_tiles
        length = tl.cdiv(tl.cdiv(N, shares), _ROWS) * _ROWS
        begin = share * length
        return item % across, item * 0, tile % num_tiles * BM, num_pairs, share, begin, tl.minimum(begin + length, N)
    else:
        expert = gl.load(tiles_ptr + tile)
        first, last = gl.load(tiles_ptr + num_tiles + tile), gl.load(tiles_ptr + 2 * num_tiles + tile)
        return item % across, expert, first, last, item * 0, item * 0, gl.where(expert < 0, 0, N)


@gluon.jit
def _items(tiles_ptr, across, num_tiles, shares):
    if tiles_ptr is not None:
        num_tiles = gl.load(tiles_ptr + 2 * num_tiles - 1)
    return num_tiles * across * shares


@gluon.jit
def _bring(
    dy_desc, ring, filled, emptied, tiles_ptr, across, N, num_tiles, num_pairs, shares,
    BM: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Fill slices with the gradients of a program's tiles, in their order."""
    BYTES: gl.constexpr = BM * _ROWS * ring.dtype.primitive_bitwidth // 8
    i = 0
    for item in range(gl.program_id(0), _items(tiles_ptr, across, num_tiles, shares), gl.num_programs(0)):
        _, _, first, _, _, begin, end = _place(item, tiles_ptr, across, N, num_tiles, num_pairs, shares, BM)
        for start in range(begin, end, _ROWS):
            stage = i % DEPTH
            mbarrier.wait(emptied.index(stage), 1 - i // DEPTH % 2)
            mbarrier.expect(filled.index(stage), BYTES)
            tma.async_copy_global_to_shared(dy_desc, [first, start], filled.index(stage), ring.index(stage))
            i += 1


@gluon.jit
def _multiply(
    ring, buffers, filled, emptied, planes_ptr, table_ptr, columns_ptr, order_ptr, tiles_ptr, dx_ptr,
    num_blocks, N, K, row_blocks, across, num_steps, num_tiles, num_pairs, shares,
    GROUP: gl.constexpr, TYPE: gl.constexpr, RUN: gl.constexpr, BM: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Multiply a group's half of 256 columns in every tile of a program, and store it."""
    PAIRS: gl.constexpr = _WIDTH // 8
    PER_STEP: gl.constexpr = step_of(TYPE) // _WIDTH
    KIND: gl.constexpr = kind_of(ring.dtype)
    HELD: gl.constexpr = _held()
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _WIDTH, 16])
    nb = num_blocks.to(gl.int64)
    t = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, HELD)), 0)
    n = gl.expand_dims(gl.arange(0, _ROWS, gl.SliceLayout(1, HELD)), 1)
    n, t = gl.broadcast(n, t)
    i = 0
    for item in range(gl.program_id(0), _items(tiles_ptr, across, num_tiles, shares), gl.num_programs(0)):
        column, expert, first, last, share, begin, end = _place(
            item, tiles_ptr, across, N, num_tiles, num_pairs, shares, BM
        )  # fmt: skip
        step = tl.minimum(column if PER_STEP == 2 else column * 2 + GROUP, num_steps - 1)
        base = tl.maximum(expert, 0) * N
        acc = warpgroup_mma_init(gl.zeros([BM, _WIDTH], gl.float32, SUMS))
        raw = fetch(TYPE, planes_ptr, nb, base + tl.minimum(begin + n, N - 1), row_blocks, step, t)
        begun = i
        target_ptr = dx_ptr + share.to(gl.int64) * num_pairs * K
        for start in range(begin, end, _ROWS):
            # The next rows' bytes are on their way while these are decoded.
            row = base + tl.minimum(start + _ROWS + n, N - 1)
            following = fetch(TYPE, planes_ptr, nb, row, row_blocks, step, t)
            pairs = decode(TYPE, raw, table_ptr, t, KIND)
            part = ()
            for e in tl.static_range(PAIRS):
                part += (pairs[(GROUP if PER_STEP == 2 else 0) * PAIRS + e],)
            w = _buffered(part, ring.dtype)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            gl.thread_barrier()  # every warp has done with the product before the last
            mbarrier.arrive(emptied.index((i + DEPTH - 2) % DEPTH), count=1, pred=i >= begun + 2)
            buffer = buffers.index(2 * GROUP + i % 2)
            buffer.store(w)
            fence_async_shared()
            stage = i % DEPTH
            mbarrier.wait(filled.index(stage), i // DEPTH % 2)
            acc = warpgroup_mma(ring.index(stage), buffer, acc, is_async=True)
            raw = following
            i += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(emptied.index((i + DEPTH - 2) % DEPTH), count=1, pred=i >= begun + 2)
        mbarrier.arrive(emptied.index((i + DEPTH - 1) % DEPTH), count=1, pred=i > begun)
        half = GROUP * _WIDTH
        _store(target_ptr, columns_ptr + half, order_ptr, acc, column * (2 * _WIDTH), K, first, last, RUN)


@gluon.jit
def _store(dx_ptr, columns_ptr, order_ptr, sums, at, K, first, last, RUN: gl.constexpr):
    """Store sums of rows from `first` on, before `last`, in columns `at` and those of `columns_ptr`."""
    if sums.shape[1] > 32:  # for want of shared memory
        half: gl.constexpr = sums.shape[1] // 2
        left, right = gl.split(gl.permute(gl.reshape(sums, [sums.shape[0], 2, half]), (0, 2, 1)))
        _store(dx_ptr, columns_ptr, order_ptr, left, at, K, first, last, RUN)
        _store(dx_ptr, columns_ptr + half, order_ptr, right, at, K, first, last, RUN)
    else:
        STORED: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
        y = gl.convert_layout(sums.to(dx_ptr.dtype.element_ty), STORED)
        k = gl.load(columns_ptr + gl.arange(0, sums.shape[1], gl.SliceLayout(0, STORED)))
        k = at + gl.max_contiguous(gl.multiple_of(k, [RUN]), [RUN])
        place = first + gl.arange(0, sums.shape[0], gl.SliceLayout(1, STORED))
        is_pair = place < last
        pair = place.to(gl.int64)
        if order_ptr is not None:
            pair = gl.load(order_ptr + place, mask=is_pair, other=0)
        dx_ptrs = dx_ptr + gl.expand_dims(pair * K, 1) + gl.expand_dims(k, 0)
        gl.store(dx_ptrs, y, mask=gl.expand_dims(is_pair, 1) & gl.expand_dims(k < K, 0))


@gluon.jit(do_not_specialize=["num_blocks", "num_tiles", "num_pairs", "shares"])
def ring_grad_kernel(
    dy_desc, planes_ptr, table_ptr, columns_ptr, order_ptr, tiles_ptr, dx_ptr,
    num_blocks, N, K, row_blocks, num_tiles, num_pairs, shares,
    TYPE: gl.constexpr, RUN: gl.constexpr, BM: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """dx = dy W, in tiles of BM rows and 256 columns."""
    across, num_steps = tl.cdiv(K, 256), tl.cdiv(K, step_of(TYPE))
    ring = gl.allocate_shared_memory(dy_desc.dtype, [DEPTH, BM, _ROWS], dy_desc.layout)
    buffers = gl.allocate_shared_memory(dy_desc.dtype, [4, _ROWS, _WIDTH], dy_desc.layout)
    filled = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for i in tl.static_range(DEPTH):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(emptied.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (ring, buffers, filled, emptied, planes_ptr, table_ptr, columns_ptr, order_ptr, tiles_ptr,
                         dx_ptr, num_blocks, N, K, row_blocks, across, num_steps, num_tiles, num_pairs, shares,
                         0, TYPE, RUN, BM, DEPTH)),
            (_multiply, (ring, buffers, filled, emptied, planes_ptr, table_ptr, columns_ptr, order_ptr, tiles_ptr,
                         dx_ptr, num_blocks, N, K, row_blocks, across, num_steps, num_tiles, num_pairs, shares,
                         1, TYPE, RUN, BM, DEPTH)),
            (_bring, (dy_desc, ring, filled, emptied, tiles_ptr, across, N, num_tiles, num_pairs, shares, BM,
                     DEPTH)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
