"""Triton: planar tensors to dense weights, whole rows, a range of columns, or the rows that an index picks.

Each program writes a tile of rows by 256 columns; every thread loads 8 codes at once and stores 8 weights at once.
"""

import triton
import triton.language as tl
from torch import Tensor

from dynquant.formats.quant_types import quant_type
from dynquant.kernels import shapes
from dynquant.kernels.triton.bit_words import USE_ASM
from dynquant.kernels.triton.fragments import decode, fetch, kind_of, step_of
from dynquant.kernels.triton.unpack import table, unpack_groups

_TILE_ROWS, _STREAM_ROWS = 4, 32


def dequantize(
    weight: Tensor, type_name: str, out: Tensor, *, first_row=0, first_column=0, row_ids: Tensor | None = None
) -> Tensor:
    """Fill `out` with weights of a planar tensor.

    Args:
        weight: uint8 [..., row_bytes] of `planes.pack_planes`, contiguous.
        type_name: its quant type.
        out: float32, float16 or bfloat16 [rows, columns], contiguous; both may be fewer than the tensor has.
        first_row: the row of the tensor, over all leading dimensions, that comes first.
        first_column: the column that comes first, a multiple of 32.
        row_ids: int [rows] instead of `first_row`; a row outside the tensor becomes NaN.

    Returns:
        `out`. In float32 its bits are those of `dynquant.formats.decode`.
    """
    stored = quant_type(type_name)
    num_rows, num_columns = out.shape
    if out.numel():
        grid = (shapes.ceil_div(num_columns, 256) * shapes.ceil_div(num_rows, _TILE_ROWS),)
        dequantize_kernel[grid](
            weight, table(stored.name, weight.device), out, row_ids,
            weight.numel() // stored.block_bytes, weight.numel() // weight.shape[-1],
            weight.shape[-1] // stored.block_bytes * stored.block_size // 32,
            num_rows, num_columns // 32, first_row, first_column // 32,
            TYPE=stored.name, ROWS=_TILE_ROWS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_blocks", "first_row", "first_group", "tensor_rows"])
def dequantize_kernel(
    planes_ptr, table_ptr, out_ptr, ids_ptr,
    num_blocks, tensor_rows, tensor_groups,
    num_rows, num_groups, first_row, first_group,
    TYPE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`_groups` are groups of 32 weights in a row; a tile is ROWS rows by 8 groups, its index r = 8 * row + group."""
    r = tl.arange(0, ROWS * 8)
    column_tiles = tl.cdiv(num_groups, 8)  # one grid axis: the others end at 65535 programs
    row = tl.program_id(0) // column_tiles * ROWS + r // 8
    group = tl.program_id(0) % column_tiles * 8 + r % 8
    is_inside = (row < num_rows) & (group < num_groups)
    if ids_ptr is None:
        source = first_row + tl.minimum(row, num_rows - 1)
        is_found = is_inside
    else:
        source = tl.load(ids_ptr + tl.minimum(row, num_rows - 1))
        is_found = (source >= 0) & (source < tensor_rows)
        source = tl.where(is_found, source, 0).to(tl.int32)
    groups = source * tensor_groups + tl.minimum(first_group + group, tensor_groups - 1)
    w = unpack_groups(TYPE, planes_ptr, table_ptr, num_blocks.to(tl.int64), groups)
    if ids_ptr is not None:
        w = tl.where(is_found[:, None, None], w, float("nan"))
    i = tl.arange(0, 4)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    out = out_ptr + (row.to(tl.int64) * num_groups + group)[:, None, None] * 32 + i
    tl.store(out, w.to(out_ptr.dtype.element_ty), mask=is_inside[:, None, None])


def dequantize_arranged(weight: Tensor, type_name: str, out: Tensor, first_row: int) -> Tensor:
    """Fill `out` [rows, whole steps] with rows of weights as tiles decode them, columns as `activations.arrange` puts
    those of activations with `is_stream`; return it. Columns beyond the row repeat others.
    """
    name = quant_type(type_name).name
    grid = (out.shape[1] // step_of.fn(name), shapes.ceil_div(len(out), _STREAM_ROWS))
    arranged_kernel[grid](
        weight, table(name, weight.device), out, weight.numel() // quant_type(name).block_bytes, first_row, len(out),
        weight.shape[-1] // quant_type(name).block_bytes, TYPE=name, ROWS=_STREAM_ROWS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_blocks", "first_row", "num_rows"])
def arranged_kernel(
    planes_ptr, table_ptr, out_ptr, num_blocks, first_row, num_rows, row_blocks, TYPE: tl.constexpr, ROWS: tl.constexpr
):
    """Four threads a row and step; each stores eight weights at a time, beside those of the next."""
    STEP: tl.constexpr = step_of(TYPE)
    KIND: tl.constexpr = kind_of(out_ptr.dtype.element_ty)
    n = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    t = tl.arange(0, 4)[None, :]
    row = first_row + tl.minimum(n, num_rows - 1)
    pairs = decode(
        TYPE, fetch(TYPE, planes_ptr, num_blocks.to(tl.int64), row, row_blocks, tl.program_id(0), t), table_ptr, t, KIND
    )
    is_inside = (n < num_rows) & (t < 4)
    out = out_ptr + (n.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * STEP + t * 8
    for c in tl.static_range(STEP // 32):
        if not USE_ASM or KIND == 0:
            for e in tl.static_range(4):
                tl.store(out + (c * 32 + 2 * e), pairs[4 * c + e][0], mask=is_inside)
                tl.store(out + (c * 32 + 2 * e + 1), pairs[4 * c + e][1], mask=is_inside)
        else:
            tl.inline_asm_elementwise(
                "{ .reg .pred %p; setp.ne.b32 %p, $6, 0; @%p st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }",
                "=r,l,r,r,r,r,r",
                [(out + c * 32).to(tl.int64), pairs[4 * c], pairs[4 * c + 1], pairs[4 * c + 2], pairs[4 * c + 3],
                 is_inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
