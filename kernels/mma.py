"""y = x W^T on the int8 tensor cores, for 5 to 64 rows of activations and types whose codes are plain bit fields.

A program owns BN rows of W and all rows of x, padded to MP. Groups of 32 weights are unpacked to int8 [BN, 32] and
multiplied with x^T [32, MP] (`act_quant`, row by row); the integer sums are scaled by d_w * d_x and added in float32.
Q2_K has two scales in a group: it is multiplied by x with either half set to zero. Minimums and code offsets are
taken from sums of activations. SPLIT programs share a row as in `gemv`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dynquant.kernels.act_quant import quantize_with_sums
from dynquant.kernels.gemv import add_splits, plane_constants
from dynquant.kernels.plans import MmaConfig
from dynquant.kernels.words import USE_ASM, half, plane

TYPES = ("TQ2_0", "Q2_K", "Q4_K", "Q5_K", "Q8_0")

_SHIFT_AND = "{{ .reg .b32 t; shr.b32 t, $1, {shift}; and.b32 $0, t, {mask}; }}"
_FIVE_BITS = (
    "{{ .reg .b32 t, u; shr.b32 t, $1, {shift}; and.b32 t, t, 0x0F0F0F0F; shr.b32 u, $2, {bit}; "
    "and.b32 u, u, 0x01010101; shl.b32 u, u, 4; or.b32 $0, t, u; }}"
)
CRUMBS = tl.constexpr(tuple(_SHIFT_AND.format(shift=2 * s, mask="0x03030303") for s in range(4)))
NIBBLES = tl.constexpr(tuple(_SHIFT_AND.format(shift=4 * s, mask="0x0F0F0F0F") for s in range(2)))
FIVE_BITS = tl.constexpr(tuple(_FIVE_BITS.format(shift=4 * (bit % 2), bit=bit) for bit in range(8)))


@triton.jit
def _crumb(q, S: tl.constexpr):
    """Crumb S of bytes as int8."""
    if USE_ASM:
        return tl.inline_asm_elementwise(CRUMBS[S], "=r,r", [q], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return ((q >> (2 * S)) & 3).to(tl.int8)


@triton.jit
def _nibble(q, S: tl.constexpr):
    """Nibble S of bytes as int8."""
    if USE_ASM:
        return tl.inline_asm_elementwise(NIBBLES[S], "=r,r", [q], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return ((q >> (4 * S)) & 15).to(tl.int8)


@triton.jit
def _five_bits(q, qh, BIT: tl.constexpr):
    """A nibble of `q` and bit BIT of `qh` above it, as int8."""
    if USE_ASM:
        return tl.inline_asm_elementwise(FIVE_BITS[BIT], "=r,r,r", [q, qh], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return (((q >> (4 * (BIT % 2))) & 15) | (((qh >> BIT) & 1) << 4)).to(tl.int8)


@triton.jit
def _dots(codes, x_ptrs, k, K: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr):
    """codes int8 [BN, 32] times x^T [32, MP] as float32; HALF 0 or 1 sets the other sixteen activations to zero."""
    if HALF < 0:
        dots = tl.dot(codes, tl.load(x_ptrs), out_dtype=tl.int32)
        if P == 2:
            dots = dots * 256 + tl.dot(codes, tl.load(x_ptrs + K), out_dtype=tl.int32)
    else:
        mask = (k // 16 == HALF)[:, None]
        dots = tl.dot(codes, tl.load(x_ptrs, mask=mask, other=0), out_dtype=tl.int32)
        if P == 2:
            dots = dots * 256 + tl.dot(codes, tl.load(x_ptrs + K, mask=mask, other=0), out_dtype=tl.int32)
    return dots.to(tl.float32)


@triton.jit
def _byte(word, AT: tl.constexpr):
    return (word >> (8 * AT)) & 255


@triton.jit
def _six_bit_pair(s0, s1, s2, G: tl.constexpr):
    """Scale and minimum of group G of a Q4_K block from its three words of scales."""
    if G < 4:
        return (_byte(s0, G) & 63).to(tl.float32), (_byte(s1, G) & 63).to(tl.float32)
    else:
        low = _byte(s2, G - 4)
        scale = (low & 15) | ((_byte(s0, G - 4) >> 6) << 4)
        minimum = (low >> 4) | ((_byte(s1, G - 4) >> 6) << 4)
        return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit(do_not_specialize=["N", "num_x_rows"])
def mma_kernel(
    w_ptr, xq_ptr, xd_ptr, xs_ptr, y_ptr, N, num_x_rows,
    K: tl.constexpr, TYPE: tl.constexpr, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, S3: tl.constexpr,
    P: tl.constexpr, MP: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    pid_n, pid_k = tl.program_id(0), tl.program_id(1)
    BLOCK: tl.constexpr = 32 if TYPE == "Q8_0" else 256
    STEPS: tl.constexpr = K // 256 // SPLIT
    row_blocks: tl.constexpr = K // BLOCK
    blocks = N.to(tl.int64) * row_blocks
    first = pid_n.to(tl.int64) * BN * row_blocks
    rows = tl.minimum(tl.arange(0, BN), N - 1 - pid_n * BN)
    m = tl.minimum(tl.arange(0, MP), num_x_rows - 1)
    k = tl.arange(0, 32)
    acc = tl.zeros([BN, MP], tl.float32)
    for step in range(STEPS):
        super_block = pid_k * STEPS + step
        block = rows * row_blocks + super_block * (256 // BLOCK)  # [BN]
        x_ptrs = xq_ptr + m[None, :] * (P * K) + (super_block * 256 + k[:, None])  # [32, MP]
        xd_ptrs = xd_ptr + m * (K // 32) + super_block * 8  # [MP]
        xs_ptrs = xs_ptr + m * (K // 16) + super_block * 16
        if TYPE == "TQ2_0":
            part = tl.zeros([BN, MP], tl.float32)
            sums = tl.zeros([MP], tl.float32)
            q_ptrs = plane(w_ptr, blocks, first, S0, 64, tl.uint8) + block[:, None] * 64 + k[None, :]
            for h in tl.static_range(2):
                q = tl.load(q_ptrs + 32 * h)
                for s in tl.static_range(4):
                    codes = _crumb(q, s)
                    dots = _dots(codes, x_ptrs + 32 * (4 * h + s), k, K, P, -1)
                    part += dots * tl.load(xd_ptrs + 4 * h + s)[None, :]
                    sums += tl.load(xs_ptrs + 8 * h + 2 * s) + tl.load(xs_ptrs + 8 * h + 2 * s + 1)
            acc += (part - sums[None, :]) * half(w_ptr, blocks, first, block, S1, 2)[:, None]
        elif TYPE == "Q2_K":
            q_ptrs = plane(w_ptr, blocks, first, S1, 64, tl.uint8) + block[:, None] * 64 + k[None, :]
            sc_ptrs = plane(w_ptr, blocks, first, S0, 16, tl.uint8) + block * 16
            d = half(w_ptr, blocks, first, block * 2, S2, 4)
            dmin = half(w_ptr, blocks, first, block * 2 + 1, S2, 4)
            for h in tl.static_range(2):
                q = tl.load(q_ptrs + 32 * h)
                for s in tl.static_range(4):
                    codes = _crumb(q, s)
                    xd = tl.load(xd_ptrs + 4 * h + s)
                    for i in tl.static_range(2):
                        pair = tl.load(sc_ptrs + 8 * h + 2 * s + i).to(tl.int32)
                        dots = _dots(codes, x_ptrs + 32 * (4 * h + s), k, K, P, i)
                        acc += dots * ((d * (pair & 15).to(tl.float32))[:, None] * xd[None, :])
                        sums = tl.load(xs_ptrs + 8 * h + 2 * s + i)
                        acc -= (dmin * (pair >> 4).to(tl.float32))[:, None] * sums[None, :]
        elif TYPE == "Q8_0":
            q_ptrs = plane(w_ptr, blocks, first, S1, 32, tl.int8) + block[:, None] * 32 + k[None, :]
            for g in tl.static_range(8):
                dots = _dots(tl.load(q_ptrs + 32 * g), x_ptrs + 32 * g, k, K, P, -1)
                d = half(w_ptr, blocks, first, block + g, S0, 2)
                acc += dots * (d[:, None] * tl.load(xd_ptrs + g)[None, :])
        else:
            QS: tl.constexpr = S2 if TYPE == "Q4_K" else S3
            q_ptrs = plane(w_ptr, blocks, first, QS, 128, tl.uint8) + block[:, None] * 128 + k[None, :]
            sc_ptrs = plane(w_ptr, blocks, first, S1, 12, tl.int32) + block * 3
            s0, s1, s2 = tl.load(sc_ptrs), tl.load(sc_ptrs + 1), tl.load(sc_ptrs + 2)
            d = half(w_ptr, blocks, first, block * 2, S0, 4)
            dmin = half(w_ptr, blocks, first, block * 2 + 1, S0, 4)
            if TYPE == "Q5_K":
                qh = tl.load(plane(w_ptr, blocks, first, S2, 32, tl.uint8) + block[:, None] * 32 + k[None, :])
            for c in tl.static_range(4):
                q = tl.load(q_ptrs + 32 * c)
                for s in tl.static_range(2):
                    codes = _nibble(q, s) if TYPE == "Q4_K" else _five_bits(q, qh, 2 * c + s)
                    scale, minimum = _six_bit_pair(s0, s1, s2, 2 * c + s)
                    dots = _dots(codes, x_ptrs + 32 * (2 * c + s), k, K, P, -1)
                    acc += dots * ((d * scale)[:, None] * tl.load(xd_ptrs + 2 * c + s)[None, :])
                    sums = tl.load(xs_ptrs + 4 * c + 2 * s) + tl.load(xs_ptrs + 4 * c + 2 * s + 1)
                    acc -= (dmin * minimum)[:, None] * sums[None, :]
    n = pid_n * BN + tl.arange(0, BN)
    m = tl.arange(0, MP)
    offsets = (pid_k * num_x_rows + m).to(tl.int64)[None, :] * N + n[:, None]
    mask = (n < N)[:, None] & (m < num_x_rows)[None, :]
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


def linear_of_checked(x: Tensor, weight: Tensor, type_name: str, act: str, config: MmaConfig) -> Tensor:
    """x [M, K] times planar weights uint8 [N, row_bytes], transposed, for a type in TYPES: [M, N]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    num_x_rows, num_outputs, split = x.shape[0], weight.shape[0], config.split
    xq, xd, xs = quantize_with_sums(x, act, pdl=config.pdl)
    y = torch.empty(num_x_rows, num_outputs, dtype=x.dtype, device=x.device)
    target = y if split == 1 else torch.empty(split, num_x_rows, num_outputs, dtype=torch.float32, device=x.device)
    constants = kernel_constants(type_name, xq.shape[1], x.shape[1], num_x_rows, config)
    grid = (triton.cdiv(num_outputs, config.bn), split)
    mma_kernel[grid](weight, xq, xd, xs, target, num_outputs, num_x_rows, **constants)
    if split > 1:
        add_splits(target, y, config.pdl)
    return y


def kernel_constants(
    type_name: str, num_planes: int, row_length: int, num_x_rows: int, config: MmaConfig
) -> dict[str, object]:
    """The constants and launch options of `mma_kernel`."""
    starts = plane_constants(type_name)
    return {
        "K": row_length, "TYPE": type_name, **{f"S{i}": starts[f"S{i}"] for i in range(4)}, "P": num_planes,
        "MP": max(8, triton.next_power_of_2(num_x_rows)), "BN": config.bn, "SPLIT": config.split, "PDL": config.pdl,
        "num_warps": config.warps, "num_stages": config.stages, "launch_pdl": config.pdl,
    }  # fmt: skip
