"""Gluon: products of many rows on an H100 or H200, decoding beside multiplying.

A program has two groups of four warps and one warp more. That one brings activations by the tensor memory accelerator
(TMA) into a ring of slices in shared memory, as fast as slices become free. Each group decodes 64 rows of weights into
the registers that tensor cores read, and starts products that run on their own: while those of one group run, the other
decodes. In `tiles`, whose warps all load, decode and multiply together, tensor cores wait meanwhile.

Arguments in common are those of `triton.tiles`; a slice is BM rows of activations by CHUNK columns of `arrange`.
"""

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
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dynquant.formats.quant_types import QuantType, quant_type
from dynquant.kernels import shapes
from dynquant.kernels.triton.activations import arrange
from dynquant.kernels.triton.fragments import decode, fetch, joined, kind_of, step_of
from dynquant.kernels.triton.gemv import add_splits
from dynquant.kernels.triton.tiles import column_shares
from dynquant.kernels.triton.unpack import table

_CONFIGS = {
    64: {"BM": 64, "CHUNK": 128, "DEPTH": 6},
    128: {"BM": 128, "CHUNK": 256, "DEPTH": 3},
    256: {"BM": 256, "CHUNK": 128, "DEPTH": 3},
}
"""Rows of activations of a program -> constants of the kernel, as measured on an H200."""

_GROUPS = gl.constexpr(2)
_ROWS = gl.constexpr(64)  # of weights, of a group: the tensor cores' tile
_RESIDENT = 132  # programs that keep the GPU busy, one a multiprocessor
_SLICES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def supports(type_name: str, x: Tensor, product: str = "linear") -> bool:
    """Return whether this is faster than `tiles`, where `activations.runs_gluon`: to 64 rows blocks of 32 are not,
    but for those of tables."""
    name = quant_type(type_name).name
    return len(x) > 64 or step_of.fn(name) == 256 or name in ("MXFP4", "NVFP4", "IQ4_NL")


def config(num_rows: int) -> dict[str, int]:
    """Return constants of the kernel for so many rows of activations of one matrix."""
    return next((constants for most, constants in _CONFIGS.items() if num_rows <= most), _CONFIGS[256])


def experts_config(num_rows: float, row_length: int) -> dict[str, int] | None:
    """Return constants for experts with so many rows of activations on average, or None where `tiles` are faster.

    Experts get more rows or fewer than the average. Short rows of weights end before the ring has filled.
    """
    if num_rows < 32 or row_length < 2048:
        return None
    return _CONFIGS[64 if num_rows < 48 else 128]


def linear(x: Tensor, weight: Tensor, type_name: str) -> Tensor:
    """x [M, K] times planar rows uint8 [N, row_bytes] transposed: [M, N]. Both are contiguous."""
    return multiply(x.new_empty(len(x), len(weight)), x, weight, quant_type(type_name), config(len(x)))


def multiply(
    product: Tensor, x: Tensor, weight: Tensor, stored: QuantType, constants: dict[str, int], pairs=(None, None)
) -> Tensor:
    """Write x W^T into `product` [pairs, N] and return it; `constants` of `config`, `pairs` as in `tiles.multiply`."""
    order, tiles = pairs
    num_rows, name, block_m = product.shape[-1], stored.name, constants["BM"]
    num_pairs, x = product.numel() // num_rows, x.reshape(-1, x.shape[-1])
    num_tiles = shapes.ceil_div(num_pairs, block_m) if tiles is None else tiles.shape[1]
    arranged = arrange(x, name, num_pairs, places=order, slots=num_pairs // len(x))
    step = step_of.fn(name)
    num_steps, chunk = arranged.shape[1] // step, min(step, constants["CHUNK"])
    columns = shapes.ceil_div(num_rows, _GROUPS.value * _ROWS.value)
    shares = column_shares(columns * num_tiles, _RESIDENT, num_steps) if tiles is None else 1
    target = product if shares == 1 else product.new_empty(shares, *product.shape, dtype=torch.float32)
    ring_kernel[(columns * num_tiles, shares)](
        TensorDescriptor.from_tensor(arranged, [block_m, chunk], _SLICES),
        weight, table(name, weight.device), order, tiles, target,
        weight.numel() // stored.block_bytes, num_rows, weight.shape[-1] // stored.block_bytes, num_steps,
        num_tiles, num_pairs, TYPE=name, **{**constants, "CHUNK": chunk}, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    if shares > 1:
        add_splits(target, product, pdl=True)
    return product


@triton.constexpr_function
def _held():
    """Rows and quarters of a step [64, 4] as a group holds them: a thread has rows g and g + 8 of a warp's sixteen."""
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8, 0]], lanes, [[16, 0], [32, 0]], [], [64, 4])


@gluon.jit
def _operand(pairs, LAYOUT: gl.constexpr, dtype: gl.constexpr):
    """Pairs of `decode` as the left operand of a product, [64, 8 * len(pairs)]: threads keep what they have."""
    level = ()
    for e in tl.static_range(len(pairs)):
        first, second = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs[e]], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
        )
        both = gl.join(first.to(dtype, bitcast=True), second.to(dtype, bitcast=True))
        level += (gl.reshape(both, [both.shape[0], 4, 1, 2]),)
    w = gl.permute(joined(level), (0, 2, 1, 3))
    return gl.convert_layout(gl.reshape(w, [w.shape[0], 8 * len(pairs)]), LAYOUT, assert_trivial=True)


@gluon.jit
def _bring(x_desc, ring, filled, emptied, first, start, stop, DEPTH: gl.constexpr, CHUNK: gl.constexpr):
    """Fill slices with columns start to stop, in units of CHUNK, of the rows from `first` on."""
    gdc_wait()
    BYTES: gl.constexpr = ring.shape[1] * CHUNK * ring.dtype.primitive_bitwidth // 8
    for i in range(stop - start):
        stage = i % DEPTH
        mbarrier.wait(emptied.index(stage), 1 - i // DEPTH % 2)
        mbarrier.expect(filled.index(stage), BYTES)
        tma.async_copy_global_to_shared(x_desc, [first, (start + i) * CHUNK], filled.index(stage), ring.index(stage))


@gluon.jit
def _multiply(
    ring, filled, emptied, planes_ptr, table_ptr, y_ptr, order_ptr,
    nb, expert, N, row_blocks, num_steps, start, stop, at, first, last, base,
    TYPE: gl.constexpr, BM: gl.constexpr, DEPTH: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Multiply 64 rows of weights, from `at` on, and store them from row `base` of y on."""
    CHUNKS: gl.constexpr = step_of(TYPE) // CHUNK
    PAIRS: gl.constexpr = CHUNK // 8
    KIND: gl.constexpr = kind_of(ring.dtype)
    HELD: gl.constexpr = _held()
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    n = at + gl.expand_dims(gl.arange(0, _ROWS, gl.SliceLayout(1, HELD)), 1)
    t = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, HELD)), 0)
    row, t = gl.broadcast(expert * N + tl.minimum(n, N - 1), t)
    acc = gl.zeros([_ROWS, BM], gl.float32, SUMS)
    raw = fetch(TYPE, planes_ptr, nb, row, row_blocks, tl.minimum(start, num_steps - 1), t)
    i = 0
    for step in range(start, stop):
        # The next step's bytes are on their way while this one's are multiplied.
        following = fetch(TYPE, planes_ptr, nb, row, row_blocks, tl.minimum(step + 1, num_steps - 1), t)
        pairs = decode(TYPE, raw, table_ptr, t, KIND)
        running = ()
        for c in tl.static_range(CHUNKS):
            part = ()
            for e in tl.static_range(PAIRS):
                part += (pairs[c * PAIRS + e],)
            w = _operand(part, LEFT, ring.dtype)
            stage = i % DEPTH
            mbarrier.wait(filled.index(stage), i // DEPTH % 2)
            acc = warpgroup_mma(w, ring.index(stage).permute((1, 0)), acc, is_async=True)
            running += (w,)
            i += 1
        # Products read their weights while they run. Waiting in the next step instead, the compiler puts them in a row.
        if CHUNKS == 2:
            acc, _, _ = warpgroup_mma_wait(0, deps=[acc, running[0], running[1]])
        else:
            tl.static_assert(CHUNKS == 1, "a step is one or two slices")
            acc, _ = warpgroup_mma_wait(0, deps=[acc, running[0]])
        for c in tl.static_range(CHUNKS):
            mbarrier.arrive(emptied.index((i + DEPTH - CHUNKS + c) % DEPTH), count=1)
        raw = following
    gdc_launch_dependents()
    n = at + gl.arange(0, _ROWS, gl.SliceLayout(1, SUMS))
    place = gl.arange(0, BM, gl.SliceLayout(0, SUMS))
    is_pair = first + place < last
    if order_ptr is None:
        y_ptr += (base + first) * N
        offsets = place * N  # of a tile: 32 bits, for want of registers
    else:
        y_ptr += base * N
        offsets = gl.load(order_ptr + first + place, mask=is_pair, other=0) * N
    y_ptrs = y_ptr + gl.expand_dims(offsets, 0) + gl.expand_dims(n, 1)
    gl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=gl.expand_dims(is_pair, 0) & gl.expand_dims(n < N, 1))


@gluon.jit(do_not_specialize=["num_blocks", "num_tiles", "num_pairs"])
def ring_kernel(
    x_desc, planes_ptr, table_ptr, order_ptr, tiles_ptr, y_ptr,
    num_blocks, N, row_blocks, num_steps, num_tiles, num_pairs,
    TYPE: gl.constexpr, BM: gl.constexpr, CHUNK: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """y = x W^T for activations of `arrange`, by BM rows and 128 of weights; the second axis shares out the columns."""
    CHUNKS: gl.constexpr = step_of(TYPE) // CHUNK
    if tiles_ptr is None:  # programs of the same weights run together
        tile, column = gl.program_id(0) % num_tiles, gl.program_id(0) // num_tiles
    else:  # those of the same tokens do: of experts there are too many to stay in the cache
        columns = tl.cdiv(N, _GROUPS * _ROWS)
        tile, column = gl.program_id(0) // columns, gl.program_id(0) % columns
    share = tl.cdiv(num_steps, gl.num_programs(1))
    start = gl.program_id(1) * share
    stop = tl.minimum(start + share, num_steps)
    expert, first, last = 0, tile * BM, num_pairs
    if tiles_ptr is not None:
        expert = gl.load(tiles_ptr + tile)
        if expert == -2:
            return
        first, last = gl.load(tiles_ptr + num_tiles + tile), gl.load(tiles_ptr + 2 * num_tiles + tile)
        stop = gl.where(expert < 0, start, stop)
        expert = tl.maximum(expert, 0)
    ring = gl.allocate_shared_memory(x_desc.dtype, [DEPTH, BM, CHUNK], x_desc.layout)
    filled = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for i in tl.static_range(DEPTH):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(emptied.index(i), count=_GROUPS)
    fence_async_shared()
    at = column * _GROUPS * _ROWS
    nb, base = num_blocks.to(gl.int64), gl.program_id(1) * num_pairs.to(gl.int64)
    gl.warp_specialize(
        [
            (_multiply, (ring, filled, emptied, planes_ptr, table_ptr, y_ptr, order_ptr, nb, expert, N, row_blocks,
                         num_steps, start, stop, at, first, last, base, TYPE, BM, DEPTH, CHUNK)),
            (_multiply, (ring, filled, emptied, planes_ptr, table_ptr, y_ptr, order_ptr, nb, expert, N, row_blocks,
                         num_steps, start, stop, at + _ROWS, first, last, base, TYPE, BM, DEPTH, CHUNK)),
            (_bring, (x_desc, ring, filled, emptied, first, start * CHUNKS, stop * CHUNKS, DEPTH, CHUNK)),
        ],
        [4, 1],  # warps of the second group and of the third; the first has those of the launch
        [240, 24],  # their registers a thread
    )  # fmt: skip
