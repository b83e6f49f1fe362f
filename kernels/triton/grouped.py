"""Triton: products of tokens with the planar weights of their experts, forward and gradient, in one launch.

A pair is a token and one of its slots. Few pairs: every pair reads its own expert's rows, bound by memory
(`gemv.routed` for 16-bit activations, otherwise `_pair_kernel`). Many pairs: they are sorted by expert, cut into tiles
of pairs of one expert, and a tile decodes each piece of the matrix once for all its pairs (`tiles`). The tile table is
made on the device for the most tiles there can be, so that nothing waits for the host; tiles left over exit before they
read anything. On Hopper GPUs `gluon.ring` and `gluon.ring_grad` take most tiles of pairs. Products are summed in
float32 in a fixed order.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dynquant.formats.quant_types import quant_type
from dynquant.kernels import shapes
from dynquant.kernels.triton import gemv, tiles
from dynquant.kernels.triton.activations import has_tensor_cores, runs_gluon
from dynquant.kernels.triton.unpack import table, unpack_groups

_MOST_SINGLE_PAIRS = 128  # up to this many pairs, and one for every expert, read the weights one by one
_CHUNK = 128  # pairs that a program sorts
_TABLED = 32  # tiles of a program
_found: WeakIdKeyDictionary = WeakIdKeyDictionary()  # `_tiles_of` by the tensor of ids, for as long as that lives


def linear(x: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str) -> Tensor:
    """x [T, K] or [T, k, K] times planar experts uint8 [E, N, row_bytes] transposed: [T, k, N].

    Pairs whose id in `expert_ids` int [T, k] is outside 0 to E - 1 give zeros. All tensors are contiguous.
    """
    rows, name = x.reshape(-1, x.shape[-1]), quant_type(type_name).name
    if is_few(expert_ids, len(weight)) and gemv.takes(name, rows):
        return gemv.routed(rows, weight, expert_ids, name).view(*expert_ids.shape, -1)
    return _product(x, weight, expert_ids, type_name, transposed=False)


def input_grad(dy: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str) -> Tensor:
    """dy [T, N] or [T, k, N] times planar experts uint8 [E, N, row_bytes]: [T, k, K]; see `linear`."""
    return _product(dy, weight, expert_ids, type_name, transposed=True)


def is_few(expert_ids: Tensor, num_experts: int) -> bool:
    """Tell whether every pair reads the rows of its expert for itself."""
    return expert_ids.numel() <= min(_MOST_SINGLE_PAIRS, max(32, num_experts))


def _product(inputs: Tensor, weight: Tensor, expert_ids: Tensor, type_name: str, *, transposed: bool) -> Tensor:
    stored = quant_type(type_name)
    num_experts, num_rows, _ = weight.shape
    length, num_pairs = shapes.row_length(weight, stored), expert_ids.numel()
    product = inputs.new_empty(*expert_ids.shape, length if transposed else num_rows)
    if not is_few(expert_ids, num_experts):
        mean, dtype = num_pairs / num_experts, inputs.dtype
        if not has_tensor_cores(inputs.device, dtype):
            dtype = torch.float32
        run, config = (
            _ring(stored.name, mean, num_rows, transposed) if runs_gluon(inputs.device, dtype) else (None, None)
        )
        if config is None:
            run = tiles.multiply_back if transposed else tiles.multiply
            config = (tiles.input_grad_config if transposed else tiles.linear_config)(mean, dtype)
        return run(product, inputs, weight, stored, config, _tiles_of(expert_ids, num_experts, config["BM"]))
    width, config = (128, {"BN": 32, "G": 4}) if transposed else (16, {"BN": 16, "G": 8})
    _pair_kernel[(shapes.ceil_div(product.shape[-1], width), num_pairs)](
        inputs, weight, table(stored.name, weight.device), expert_ids.contiguous(), product,
        weight.numel() // stored.block_bytes, num_experts, num_rows, length // 32,
        expert_ids.shape[1] if inputs.dim() == 2 else 1, TYPE=stored.name, TRANSPOSED=transposed, num_warps=4, **config,
    )  # fmt: skip
    return product


def _ring(type_name: str, mean: float, num_rows: int, transposed: bool) -> tuple[Callable, dict[str, int] | None]:
    """Return the product beside decoding, on a Hopper GPU, and its constants: None where `tiles` are faster."""
    from dynquant.kernels.gluon import ring, ring_grad  # which can only be imported where they run

    if transposed:
        return ring_grad.multiply_back, ring_grad.experts_config(mean, num_rows)
    return ring.multiply, ring.experts_config(mean, type_name)


def _tiles_of(expert_ids: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """`sorted_tiles`, which gate, up and down, their gradients and a recomputed pass ask for with the same ids.

    Sorting is three launches; in training, launches from Python decide the time of a step. Ids that may change unseen
    are sorted every time: inference tensors count no versions, a replayed CUDA graph runs no Python, and code that
    `torch.compile` makes writes the ids of a layer over those of another (`ops` marks what Python gives it).
    """
    counts = getattr(expert_ids, "counts_changes", False) and not expert_ids.is_inference()
    if not counts or not expert_ids.is_cuda or torch.cuda.is_current_stream_capturing():
        return sorted_tiles(expert_ids, num_experts, block_m)
    key = (expert_ids._version, num_experts, block_m, torch.cuda.current_stream(expert_ids.device))
    last, pairs = _found.get(expert_ids, (None, None))
    if last != key:
        pairs = sorted_tiles(expert_ids, num_experts, block_m)
        _found[expert_ids] = key, pairs
    return pairs


def sorted_tiles(expert_ids: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor]:
    """Pairs in the order of their experts, and how tiles of `block_m` cover them, without waiting for the device.

    Pairs are counted by chunks and put where those of their chunk begin, in three launches, 9 to 16 us for up to 4,096
    tokens on an H200: `torch.sort` and what made its result a table took 48 to 90, a third of a product of
    small experts.

    Returns:
        order int64 [pairs], and int32 [3, tiles]: the expert (-1: ids that are no expert here, -2: left over), the
        first place in `order`, and the place after the last. Of those left over, which the last tile is one of, the
        first place is how many are not.
    """
    ids, num_pairs, device = expert_ids.reshape(-1), expert_ids.numel(), expert_ids.device
    chunks, segments = shapes.ceil_div(num_pairs, _CHUNK), triton.next_power_of_2(num_experts + 2)
    num_tiles = shapes.ceil_div(num_pairs, block_m) + num_experts + 2
    counts = torch.empty(chunks, segments, dtype=torch.int32, device=device)
    totals = torch.empty(segments, dtype=torch.int32, device=device)
    order = torch.empty(num_pairs, dtype=torch.int64, device=device)
    tiles = torch.empty(3, num_tiles, dtype=torch.int32, device=device)
    sizes = {"SEGMENTS": segments, "CHUNK": _CHUNK, "num_warps": 4}
    _count_kernel[(chunks,)](ids, counts, num_pairs, num_experts, **sizes)
    width = min(segments, 32)
    _before_kernel[(segments // width,)](
        counts, totals, chunks, SEGMENTS=segments, WIDTH=width, TOGETHER=256, num_warps=8
    )
    _order_kernel[(chunks + shapes.ceil_div(num_tiles, _TABLED),)](
        ids, counts, totals, order, tiles, chunks, num_pairs, num_experts, num_tiles,
        BM=block_m, TABLED=_TABLED, **sizes,
    )  # fmt: skip
    return order, tiles


@triton.jit
def _segments_of(ids_ptr, chunk, num_pairs, num_experts, CHUNK: tl.constexpr, SEGMENTS: tl.constexpr):
    """Return pairs of a chunk, which of them exist, and their segments.

    Segment 0 holds ids below zero, 1 + e those of expert e, num_experts + 1 those above.
    """
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    is_pair = pair < num_pairs
    ids = tl.load(ids_ptr + pair, mask=is_pair, other=0)
    return pair, is_pair, (tl.minimum(tl.maximum(ids, -1), num_experts) + 1).to(tl.int32)


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def _count_kernel(ids_ptr, counts_ptr, num_pairs, num_experts, SEGMENTS: tl.constexpr, CHUNK: tl.constexpr):
    """Count a chunk's pairs by segments, int32 [chunks, SEGMENTS]."""
    _, is_pair, segment = _segments_of(ids_ptr, tl.program_id(0), num_pairs, num_experts, CHUNK, SEGMENTS)
    at = tl.arange(0, SEGMENTS)
    tl.store(counts_ptr + tl.program_id(0) * SEGMENTS + at, tl.histogram(segment, SEGMENTS, mask=is_pair))


@triton.jit(do_not_specialize=["chunks"])
def _before_kernel(counts_ptr, totals_ptr, chunks, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr):
    """Put for every count how many of its segment chunks before have, and tell how many all have."""
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    totals = tl.zeros([WIDTH], tl.int32)
    for first in range(0, chunks, TOGETHER):
        chunk = first + tl.arange(0, TOGETHER)[:, None]
        counts_ptrs = counts_ptr + chunk * SEGMENTS + at[None, :]
        counts = tl.load(counts_ptrs, mask=chunk < chunks, other=0)
        tl.store(counts_ptrs, totals[None, :] + tl.cumsum(counts, 0) - counts, mask=chunk < chunks)
        totals += tl.sum(counts, 0)
    tl.store(totals_ptr + at, totals)


@triton.jit(do_not_specialize=["chunks", "num_pairs", "num_experts", "num_tiles"])
def _order_kernel(
    ids_ptr, before_ptr, totals_ptr, order_ptr, tiles_ptr, chunks, num_pairs, num_experts, num_tiles,
    SEGMENTS: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, TABLED: tl.constexpr,
):  # fmt: skip
    """Put the pairs of a chunk in their places, or tell the tiles of a part of the table."""
    totals = tl.load(totals_ptr + tl.arange(0, SEGMENTS))
    stop = tl.cumsum(totals, 0)
    start = stop - totals
    if tl.program_id(0) < chunks:
        pair, is_pair, segment = _segments_of(ids_ptr, tl.program_id(0), num_pairs, num_experts, CHUNK, SEGMENTS)
        i = tl.arange(0, CHUNK)
        is_before = (segment[:, None] == segment[None, :]) & (i[:, None] > i[None, :])
        place = tl.sum(is_before.to(tl.int32), 1) + tl.load(before_ptr + tl.program_id(0) * SEGMENTS + segment)
        tl.store(order_ptr + place + tl.gather(start, segment, 0), pair.to(tl.int64), mask=is_pair)
    else:
        counts = (totals + BM - 1) // BM
        ends = tl.cumsum(counts, 0)
        tile = (tl.program_id(0) - chunks) * TABLED + tl.arange(0, TABLED)
        is_own = (ends[None, :] > tile[:, None]) & ((ends - counts)[None, :] <= tile[:, None])  # [TABLED, SEGMENTS]
        expert = tl.sum(tl.where(is_own, tl.arange(0, SEGMENTS)[None, :], 0), 1) - 1
        first = tl.sum(tl.where(is_own, (start - (ends - counts) * BM)[None, :], 0), 1) + tile * BM
        last = tl.minimum(tl.sum(tl.where(is_own, stop[None, :], 0), 1), first + BM)
        has_own = tl.sum(is_own.to(tl.int32), 1) > 0
        expert = tl.where(has_own, tl.where(expert == num_experts, -1, expert), -2)
        first = tl.where(has_own, first, tl.sum(counts, 0))
        is_tile = tile < num_tiles
        tl.store(tiles_ptr + tile, expert, mask=is_tile)
        tl.store(tiles_ptr + num_tiles + tile, first, mask=is_tile)
        tl.store(tiles_ptr + 2 * num_tiles + tile, last, mask=is_tile)


@triton.jit(do_not_specialize=["num_blocks"])
def _pair_kernel(
    x_ptr, planes_ptr, table_ptr, ids_ptr, y_ptr,
    num_blocks, num_experts, N, K_groups, slots,
    TYPE: tl.constexpr, TRANSPOSED: tl.constexpr, BN: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """y = x W^T, with TRANSPOSED y = x W, for a pair and BN rows (or G groups of columns) of its expert's matrix."""
    WIDTH: tl.constexpr = G * 32 if TRANSPOSED else BN
    extent = K_groups * 32 if TRANSPOSED else N
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(ids_ptr + pair).to(tl.int64)
    out = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    y_ptr += pair * extent
    if (expert < 0) | (expert >= num_experts):
        tl.store(y_ptr + out, tl.zeros([WIDTH], y_ptr.dtype.element_ty), mask=out < extent)
        return
    r = tl.arange(0, BN * G)
    acc = tl.zeros([BN * G, 4, 8], tl.float32)
    if TRANSPOSED:
        group = tl.minimum(tl.program_id(0) * G + r % G, K_groups - 1)
        x_ptr += pair // slots * N
        for start in range(0, N, BN):
            n = start + r // G
            groups = (expert.to(tl.int32) * N + tl.minimum(n, N - 1)) * K_groups + group
            w = unpack_groups(TYPE, planes_ptr, table_ptr, num_blocks.to(tl.int64), groups)
            x = tl.load(x_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            acc += w * x[:, None, None]
    else:
        row = expert.to(tl.int32) * N + tl.minimum(tl.program_id(0) * BN + r // G, N - 1)
        x_ptr += pair // slots * K_groups * 32
        i = tl.arange(0, 4)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        for start in range(0, K_groups, G):
            group = start + r % G
            groups = row * K_groups + tl.minimum(group, K_groups - 1)
            w = unpack_groups(TYPE, planes_ptr, table_ptr, num_blocks.to(tl.int64), groups)
            x = tl.load(x_ptr + group[:, None, None] * 32 + i, mask=(group < K_groups)[:, None, None], other=0.0)
            acc += w * x.to(tl.float32)
    y = tl.sum(tl.reshape(acc, [BN, G * 32]), 0 if TRANSPOSED else 1)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=out < extent)
