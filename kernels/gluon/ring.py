"""Gluon: products of many rows on an H100 or H200, decoding beside multiplying.

A program has two to four groups of four warps and one warp more. That one brings activations by the tensor memory
accelerator (TMA) into a ring of slices in shared memory, as fast as slices become free. Each group decodes 64 rows of
weights into the registers that tensor cores read, and starts products that run on their own: while those of one group
run, the others decode. In `tiles`, whose warps all load, decode and multiply together, tensor cores wait meanwhile.

There are as many programs as multiprocessors, and they stay: each takes whole tiles of the product in turn, and tiles
that are not enough for another round are cut by steps of their columns ("stream-K", Osama and others 2023,
arXiv:2301.03598), where that takes less time than leaving programs without work.

Arguments in common are those of `triton.tiles`; a slice is BM rows of activations by CHUNK columns of `arrange`.
"""

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
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dynquant.formats.quant_types import QuantType, quant_type
from dynquant.kernels import shapes
from dynquant.kernels.triton.activations import arrange, multiprocessors
from dynquant.kernels.triton.fragments import decode, fetch, joined, kind_of, step_of
from dynquant.kernels.triton.unpack import table

_CONFIGS = {32: (128, 3), 64: (128, 3), 128: (128, 2), 256: (64, 2)}
"""Rows of activations of a program -> columns of a slice, at most half a step; groups. As measured on an H200, as are
the following."""

_OTHER_SLICES = {64: (64, ("Q4_K", "IQ1_M", "IQ3_S")), 256: (128, ("Q2_K", "Q3_K", "Q4_K", "IQ3_S", "IQ4_XS"))}
"""Rows of activations of a program -> columns of a slice for these types, which need more or fewer registers."""

_LONG = ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
"""Types of long steps: two groups decode as much in a second as three."""

_LEAN = ("MXFP4", "NVFP4", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""Types whose decoding takes few registers and gathers: four groups to 64 rows hide more of what they wait for."""

_TILES_TO_32 = ("IQ1_S", "IQ1_M", "IQ2_S", "IQ3_S", "IQ4_XS", "Q5_1", "Q8_0")
"""Types of which up to 32 rows take less time in `tiles`, and experts with less than 24."""

_LEAST_FOR_256 = 192  # rows of activations of experts, on average, that are worth tiles of 256
_TO_128 = ("Q2_K", "Q4_K", "Q5_K", "Q6_K")
"""Types that are decoded fast enough for tiles of 128, of which the last of an expert has less to waste."""

_COLUMNS = {32: 1024, 64: 768, 128: 768, 256: 384}  # of activations that the ring holds
_ROWS = gl.constexpr(64)  # of weights, of a group: the tensor cores' tile
_LEAST_STEPS = gl.constexpr(4)  # of a program
_STEPS_OF_PARTS = 3  # that take as long as handing over sums of a part
_SLICES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def supports(type_name: str, x: Tensor, product: str = "linear") -> bool:
    """Return whether this is faster than `tiles`, where `activations.runs_gluon`."""
    return len(x) > (32 if quant_type(type_name).name in _TILES_TO_32 else 16)


def config(num_rows: int, weight: Tensor, type_name: str) -> dict[str, int]:
    """Return constants of the kernel for so many rows of activations of a matrix, planar rows uint8 [N, row_bytes]."""
    name, block_m = quant_type(type_name).name, next((most for most in _CONFIGS if num_rows <= most), 256)
    is_round = shapes.ceil_div(len(weight), 2 * _ROWS.value) <= multiprocessors(weight.device)
    if block_m == 64 and is_round and name in _LONG:
        return _constants(name, 64, 2, chunk=128)  # tiles that need not be cut
    is_short = block_m == 128 and step_of.fn(name) == 128
    return _constants(name, block_m, 3 if is_short else None)


def experts_config(num_rows: float, type_name: str) -> dict[str, int] | None:
    """Return constants for experts with so many rows of activations on average, or None where `tiles` are faster.

    Experts get more rows or fewer than the average.
    """
    if num_rows < (24 if type_name in _TILES_TO_32 else 12):
        return None
    if num_rows >= _LEAST_FOR_256 and type_name not in _TO_128:
        return _constants(type_name, 256)
    return _constants(type_name, 32 if num_rows < 24 else 64 if num_rows < 48 else 128)


def _constants(type_name: str, block_m: int, groups: int | None = None, chunk: int | None = None) -> dict[str, int]:
    usual_chunk, usual_groups = _CONFIGS[block_m]
    other_chunk, types = _OTHER_SLICES.get(block_m, (usual_chunk, ()))
    chunk = chunk or (other_chunk if type_name in types else usual_chunk)
    groups = groups or (4 if block_m <= 64 and type_name in _LEAN else usual_groups)
    # Decoding a step's second half while the first is multiplied needs two slices at least.
    chunk = min(chunk, step_of.fn(type_name) // 2)
    return {"BM": block_m, "CHUNK": chunk, "DEPTH": _COLUMNS[block_m] // chunk, "GROUPS": groups}


def linear(x: Tensor, weight: Tensor, type_name: str) -> Tensor:
    """x [M, K] times planar rows uint8 [N, row_bytes] transposed: [M, N]. Both are contiguous."""
    constants = config(len(x), weight, type_name)
    return multiply(x.new_empty(len(x), len(weight)), x, weight, quant_type(type_name), constants)


def multiply(
    product: Tensor, x: Tensor, weight: Tensor, stored: QuantType, constants: dict[str, int], pairs=(None, None)
) -> Tensor:
    """Write x W^T into `product` [pairs, N] and return it; `constants` of `config`, `pairs` as in `tiles.multiply`."""
    order, tiles = pairs
    num_rows, name, block_m, groups = product.shape[-1], stored.name, constants["BM"], constants["GROUPS"]
    num_pairs, x = product.numel() // num_rows, x.reshape(-1, x.shape[-1])
    num_tiles = shapes.ceil_div(num_pairs, block_m) if tiles is None else tiles.shape[1]
    num_steps = shapes.ceil_div(x.shape[-1], step_of.fn(name))
    columns, programs = shapes.ceil_div(num_rows, groups * _ROWS.value), multiprocessors(x.device)
    if tiles is None:
        items = columns * num_tiles
        programs = min(programs, shapes.ceil_div(items * num_steps, _LEAST_STEPS.value))
        rest = items / programs - max(items // programs - 1, 0)  # of a program, after the rounds of `_work`
        is_cut = rest * num_steps + _STEPS_OF_PARTS < math.ceil(rest) * num_steps
    else:
        is_cut = True  # how many tiles experts have is known on the GPU
    flags = torch.empty(programs, groups, dtype=torch.int32, device=x.device)
    parts = torch.empty(programs, groups, _ROWS.value, block_m, dtype=torch.float32, device=x.device)
    arranged = arrange(x, name, num_pairs, places=order, slots=num_pairs // len(x), zeros=flags)
    ring_kernel[(programs,)](
        TensorDescriptor.from_tensor(arranged, [block_m, constants["CHUNK"]], _SLICES),
        weight, table(name, weight.device), order, tiles, product, parts, flags,
        weight.numel() // stored.block_bytes, num_rows, weight.shape[-1] // stored.block_bytes, num_steps,
        num_tiles, num_pairs, 1 if is_cut else num_steps, TYPE=name, **constants, num_warps=4, launch_pdl=True,
    )  # fmt: skip
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
def _work(tiles_ptr, columns, num_steps, num_tiles, grain):
    """Return what a program works on: of how many programs, its number, whole rounds, items before the rest, its first
    and last step of the rest, all steps of that, and the number of its segments.

    An item is a tile of the product. Programs take items in turn, neighbours together; the rest, more than one for each
    of them and less than two, is shared out by steps, `grain` at a time. Numbers run backwards, since a program
    waits for those of higher numbers: they were launched before it.
    """
    items = columns * num_tiles
    if tiles_ptr is not None:
        items = gl.load(tiles_ptr + 2 * num_tiles - 1) * columns
    programs = tl.minimum(gl.num_programs(0), tl.cdiv(items * num_steps, _LEAST_STEPS))
    number = programs - 1 - gl.program_id(0)
    rounds = tl.maximum(items // programs - 1, 0)
    grains = ((items - rounds * programs) * num_steps // grain).to(gl.int64)
    begin = (number * grains // programs).to(gl.int32) * grain
    end = ((number + 1) * grains // programs).to(gl.int32) * grain
    segments = gl.where(number < 0, 0, rounds + tl.cdiv(end, num_steps) - begin // num_steps)
    return programs, number, rounds, rounds * programs, begin, end, (items - rounds * programs) * num_steps, segments


@gluon.jit
def _segment(i, programs, number, rounds, before, begin, end, num_steps):
    """Return the item of a program's segment, and first and last step."""
    item = i * programs + number
    first_step = (i - rounds + begin // num_steps) * num_steps
    start, stop = tl.maximum(begin - first_step, 0), tl.minimum(end - first_step, num_steps)
    is_whole = i < rounds
    return (
        gl.where(is_whole, item, before + first_step // num_steps),
        gl.where(is_whole, 0, start),
        gl.where(is_whole, num_steps, stop),
    )


@gluon.jit
def _place(item, tiles_ptr, columns, num_tiles, num_pairs, BM: gl.constexpr):
    """Return the column of an item, its expert (-1: none), first row of activations and the one after the last."""
    if tiles_ptr is None:  # items of the same weights run together
        return item // num_tiles, item * 0, item % num_tiles * BM, num_pairs
    else:  # those of the same tokens do: of experts there are too many to stay in the cache
        tile = item // columns
        first, last = gl.load(tiles_ptr + num_tiles + tile), gl.load(tiles_ptr + 2 * num_tiles + tile)
        return item % columns, gl.load(tiles_ptr + tile), first, last


@gluon.jit
def _bring(held, BM: gl.constexpr, DEPTH: gl.constexpr, CHUNK: gl.constexpr, CHUNKS: gl.constexpr):
    """Fill slices with the activations of a program's segments, in their order."""
    x_desc, ring, filled, emptied, tiles_ptr, columns, num_steps, num_tiles, num_pairs, grain = held
    gdc_wait()
    BYTES: gl.constexpr = BM * CHUNK * ring.dtype.primitive_bitwidth // 8
    programs, number, rounds, before, begin, end, _, segments = _work(tiles_ptr, columns, num_steps, num_tiles, grain)
    i = 0
    for segment in range(segments):
        item, start, stop = _segment(segment, programs, number, rounds, before, begin, end, num_steps)
        _, expert, first, _ = _place(item, tiles_ptr, columns, num_tiles, num_pairs, BM)
        for at in range(start * CHUNKS, gl.where(expert < 0, start, stop) * CHUNKS):
            stage = i % DEPTH
            mbarrier.wait(emptied.index(stage), 1 - i // DEPTH % 2)
            mbarrier.expect(filled.index(stage), BYTES)
            tma.async_copy_global_to_shared(x_desc, [first, at * CHUNK], filled.index(stage), ring.index(stage))
            i += 1


@gluon.jit
def _multiply(
    common, GROUP: gl.constexpr, GROUPS: gl.constexpr, TYPE: gl.constexpr,
    BM: gl.constexpr, DEPTH: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """Multiply a group's 64 rows of weights in every segment of a program, and store them."""
    (ring, filled, emptied, planes_ptr, table_ptr, y_ptr, order_ptr, tiles_ptr, parts_ptr, flags_ptr,
     num_blocks, N, row_blocks, columns, num_steps, num_tiles, num_pairs, grain) = common  # fmt: skip
    CHUNKS: gl.constexpr = step_of(TYPE) // CHUNK
    PAIRS: gl.constexpr = CHUNK // 8
    KIND: gl.constexpr = kind_of(ring.dtype)
    HELD: gl.constexpr = _held()
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    nb = num_blocks.to(gl.int64)
    t = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, HELD)), 0)
    n = GROUP * _ROWS + gl.expand_dims(gl.arange(0, _ROWS, gl.SliceLayout(1, HELD)), 1)
    n, t = gl.broadcast(n, t)
    work = _work(tiles_ptr, columns, num_steps, num_tiles, grain)
    programs, number, rounds, before, begin, end, rest, segments = work
    i = 0
    for segment in range(segments):
        item, start, stop = _segment(segment, programs, number, rounds, before, begin, end, num_steps)
        column, expert, first, last = _place(item, tiles_ptr, columns, num_tiles, num_pairs, BM)
        row = tl.maximum(expert, 0) * N + tl.minimum(column * (GROUPS * _ROWS) + n, N - 1)
        raw = fetch(TYPE, planes_ptr, nb, row, row_blocks, start, t)
        acc = gl.zeros([_ROWS, BM], gl.float32, SUMS)
        for step in range(start, gl.where(expert < 0, start, stop)):
            # The next step's bytes are on their way while this one's are multiplied.
            following = fetch(TYPE, planes_ptr, nb, row, row_blocks, tl.minimum(step + 1, num_steps - 1), t)
            running = ()
            for c in tl.static_range(CHUNKS):
                pairs = decode(TYPE, raw, table_ptr, t, KIND)
                part = ()
                for e in tl.static_range(PAIRS):
                    part += (pairs[c * PAIRS + e],)
                w = _operand(part, LEFT, ring.dtype)
                stage = i % DEPTH
                mbarrier.wait(filled.index(stage), i // DEPTH % 2)
                acc = warpgroup_mma(w, ring.index(stage).permute((1, 0)), acc, is_async=True)
                running += (w,)
                if c + 1 < CHUNKS:
                    raw = _again(raw)  # the next slice's weights are decoded while this one's are multiplied
                i += 1
            # Products read their weights while they run. Were they to run on into the next step, the compiler would put
            # all of them in a row.
            acc = warpgroup_mma_wait(0, deps=(acc,) + running)[0]  # noqa: RUF005 (Triton knows no starred tuples)
            for c in tl.static_range(CHUNKS):
                mbarrier.arrive(emptied.index((i + DEPTH - CHUNKS + c) % DEPTH), count=1)
            raw = following
        gdc_launch_dependents()
        if start > 0:
            if expert >= 0:
                slot = number * GROUPS + GROUP
                _store_part(parts_ptr + slot * (_ROWS * BM), acc, segment)
                _tell(flags_ptr + slot)
        else:
            if (stop < num_steps) & (expert >= 0):
                beyond = ((item - before + 1) * num_steps).to(gl.int64) * programs - 1
                for other in range(number + 1, (beyond // rest).to(gl.int32) + 1):
                    slot = other * GROUPS + GROUP
                    _hear(flags_ptr + slot)
                    acc = _plus_part(acc, parts_ptr + slot * (_ROWS * BM), segment)
            _store(y_ptr, order_ptr, acc, column * (GROUPS * _ROWS) + GROUP * _ROWS, N, first, last, segment)


@triton.constexpr_function
def _stored():
    """Rows of weights and of activations [64, 64] as they are stored: a thread has eight neighbours of a row of y."""
    return gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])


@gluon.jit
def _halves(sums):
    """Return the left and the right half of columns, which threads keep."""
    return gl.split(gl.permute(gl.reshape(sums, [sums.shape[0], 2, sums.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def _store(y_ptr, order_ptr, sums, at, N, first, last, segment):
    """Store sums of weights from row `at` on with rows of activations from `first` on, before `last`."""
    if sums.shape[1] > 64:  # for want of registers and of shared memory
        left, right = _halves(sums)
        _store(y_ptr, order_ptr, left, at, N, first, last, segment)
        _store(y_ptr, order_ptr, right, at, N, first + sums.shape[1] // 2, last, segment)
    else:
        STORED: gl.constexpr = _stored()
        # In the product's layout eight threads would have neighbours of a row, two bytes each.
        y = gl.convert_layout(sums.to(y_ptr.dtype.element_ty), STORED)
        n = at + gl.arange(0, sums.shape[0], gl.SliceLayout(1, STORED))
        place = first + gl.arange(0, sums.shape[1], gl.SliceLayout(0, STORED)) + _opaque(segment)
        is_pair = place < last
        pair = place.to(gl.int64)
        if order_ptr is not None:
            pair = gl.load(order_ptr + place, mask=is_pair, other=0)
        y_ptrs = y_ptr + gl.expand_dims(pair * N, 0) + gl.expand_dims(n, 1)
        gl.store(y_ptrs, y, mask=gl.expand_dims(is_pair, 0) & gl.expand_dims(n < N, 1))


@gluon.jit
def _opaque(number):
    """Return 0 in a way that the compiler cannot see through, so that it computes what follows where it stands."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [number], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _store_part(ptr, sums, segment):
    """Store sums [64, BM], at most 64 columns at a time: there are not registers for more addresses."""
    if sums.shape[1] > 64:
        left, right = _halves(sums)
        _store_part(ptr, left, segment)
        _store_part(ptr + _ROWS * (sums.shape[1] // 2), right, segment)
    else:
        gl.store(ptr + _offsets(sums, segment), sums)


@gluon.jit
def _plus_part(sums, ptr, segment):
    """Add what `_store_part` stored."""
    if sums.shape[1] > 64:
        left, right = _halves(sums)
        left = _plus_part(left, ptr, segment)
        right = _plus_part(right, ptr + _ROWS * (sums.shape[1] // 2), segment)
        both = gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), sums.shape)
        return gl.convert_layout(both, sums.type.layout, assert_trivial=True)
    else:
        return sums + gl.load(ptr + _offsets(sums, segment), cache_modifier=".cg")


@gluon.jit
def _offsets(sums, segment):
    """Return where sums [64, n] lie: by eight columns of all rows, so that what a warp has is together."""
    row = gl.arange(0, sums.shape[0], gl.SliceLayout(1, sums.type.layout)) + _opaque(segment)
    column = gl.arange(0, sums.shape[1], gl.SliceLayout(0, sums.type.layout))
    return gl.expand_dims(row * 8, 1) + gl.expand_dims(column // 8 * (8 * _ROWS) + column % 8, 0)


@gluon.jit
def _again(raw):
    """Return words in a way that the compiler cannot see through, so that what is decoded of them is decoded then."""
    words = ()
    for i in tl.static_range(len(raw)):
        word = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [raw[i]], dtype=gl.int32, is_pure=False, pack=1)
        words += (word,)
    return words


@gluon.jit
def _tell(flag_ptr):
    """Raise a flag by one for each warp of a group, once that warp has stored what it holds."""
    ASM: gl.constexpr = (
        "{ .reg .pred %first; .reg .b32 %lane; bar.warp.sync -1; mov.u32 %lane, %laneid; "
        "setp.eq.u32 %first, %lane, 0; @%first red.release.gpu.global.add.u32 [$1], 1; mov.b32 $0, 0; }"
    )
    _each_thread(flag_ptr, ASM)


@gluon.jit
def _hear(flag_ptr):
    """Wait until all warps of a group have raised a flag."""
    ASM: gl.constexpr = (
        "{ .reg .pred %more; SPIN: ld.acquire.gpu.global.u32 $0, [$1]; setp.lt.u32 %more, $0, 4; @%more bra SPIN; }"
    )
    _each_thread(flag_ptr, ASM)


@gluon.jit
def _each_thread(flag_ptr, ASM: gl.constexpr):
    at = flag_ptr + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0])) * 0
    gl.inline_asm_elementwise(ASM, "=r,l", [at.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit(do_not_specialize=["num_blocks", "num_tiles", "num_pairs", "grain", "num_steps"])
def ring_kernel(
    x_desc, planes_ptr, table_ptr, order_ptr, tiles_ptr, y_ptr, parts_ptr, flags_ptr,
    num_blocks, N, row_blocks, num_steps, num_tiles, num_pairs, grain,
    TYPE: gl.constexpr, BM: gl.constexpr, CHUNK: gl.constexpr, DEPTH: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """y = x W^T for activations of `arrange`, in tiles of BM rows and 64 GROUPS of weights: programs of `_work`."""
    CHUNKS: gl.constexpr = step_of(TYPE) // CHUNK
    columns = tl.cdiv(N, GROUPS * _ROWS)
    ring = gl.allocate_shared_memory(x_desc.dtype, [DEPTH, BM, CHUNK], x_desc.layout)
    filled = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for i in tl.static_range(DEPTH):
        mbarrier.init(filled.index(i), count=1)
        mbarrier.init(emptied.index(i), count=GROUPS)
    fence_async_shared()
    common = (ring, filled, emptied, planes_ptr, table_ptr, y_ptr, order_ptr, tiles_ptr, parts_ptr, flags_ptr,
              num_blocks, N, row_blocks, columns, num_steps, num_tiles, num_pairs, grain)  # fmt: skip
    held = (x_desc, ring, filled, emptied, tiles_ptr, columns, num_steps, num_tiles, num_pairs, grain)
    # Names of types cannot be among them: Triton 3.6 loses them in a tuple that has a name.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (common, 0, GROUPS, TYPE, BM, DEPTH, CHUNK)),
                (_multiply, (common, 1, GROUPS, TYPE, BM, DEPTH, CHUNK)),
                (_bring, (held, BM, DEPTH, CHUNK, CHUNKS)),
            ],
            [4, 1],
            [240, 24],
        )
    elif GROUPS == 3:
        gl.warp_specialize(
            [
                (_multiply, (common, 0, GROUPS, TYPE, BM, DEPTH, CHUNK)),
                (_multiply, (common, 1, GROUPS, TYPE, BM, DEPTH, CHUNK)),
                (_multiply, (common, 2, GROUPS, TYPE, BM, DEPTH, CHUNK)),
                (_bring, (held, BM, DEPTH, CHUNK, CHUNKS)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (common, 0, GROUPS, TYPE, BM, DEPTH, CHUNK)),
                (_multiply, (common, 1, GROUPS, TYPE, BM, DEPTH, CHUNK)),
                (_multiply, (common, 2, GROUPS, TYPE, BM, DEPTH, CHUNK)),
                (_multiply, (common, 3, GROUPS, TYPE, BM, DEPTH, CHUNK)),
                (_bring, (held, BM, DEPTH, CHUNK, CHUNKS)),
            ],
            [4, 4, 4, 1],
            [120, 120, 120, 24],
        )
