"""The kernel one would write first, for comparison: raw blocks, one weight at a time, float32 arithmetic.

One row of W a program row, byte loads, `(q >> s) & mask` -> float32 -> multiply -> add. Only for benchmarks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = ("Q4_K", "Q2_K", "TQ2_0")


@triton.jit
def _naive_kernel(w_ptr, x_ptr, y_ptr, N, K, TYPE: tl.constexpr, BYTES: tl.constexpr, BN: tl.constexpr):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros([BN, 256], tl.float32)
    k = tl.arange(0, 256)[None, :]
    for b in range(K // 256):
        block = w_ptr + (n[:, None].to(tl.int64) * (K // 256) + b) * BYTES
        x = tl.load(x_ptr + b * 256 + k).to(tl.float32)
        if TYPE == "Q4_K":
            d = tl.load(block.to(tl.pointer_type(tl.float16))).to(tl.float32)
            dmin = tl.load(block.to(tl.pointer_type(tl.float16)) + 1).to(tl.float32)
            g = k // 32
            late = g >= 4
            sc = tl.load(block + 4 + g % 4).to(tl.int32)
            mn = tl.load(block + 8 + g % 4).to(tl.int32)
            low = tl.load(block + 12 + g % 4).to(tl.int32)
            scale = tl.where(late, (low & 15) | ((sc >> 2) & 48), sc & 63).to(tl.float32)
            minimum = tl.where(late, (low >> 4) | ((mn >> 2) & 48), mn & 63).to(tl.float32)
            q = (tl.load(block + 16 + k // 64 * 32 + k % 32).to(tl.int32) >> (g % 2 * 4)) & 15
            w = d * scale * q.to(tl.float32) - dmin * minimum
        elif TYPE == "Q2_K":
            d = tl.load((block + 80).to(tl.pointer_type(tl.float16))).to(tl.float32)
            dmin = tl.load((block + 82).to(tl.pointer_type(tl.float16))).to(tl.float32)
            sc = tl.load(block + k // 16).to(tl.int32)
            q = (tl.load(block + 16 + k // 128 * 32 + k % 32).to(tl.int32) >> (k // 32 % 4 * 2)) & 3
            w = d * (sc & 15).to(tl.float32) * q.to(tl.float32) - dmin * (sc >> 4).to(tl.float32)
        else:
            d = tl.load((block + 64).to(tl.pointer_type(tl.float16))).to(tl.float32)
            q = (tl.load(block + k // 128 * 32 + k % 32).to(tl.int32) >> (k // 32 % 4 * 2)) & 3
            w = d * (q - 1).to(tl.float32)
        acc += w * x
    tl.store(y_ptr + n, tl.sum(acc, axis=1).to(y_ptr.dtype.element_ty), mask=n < N)


def linear(x: Tensor, blocks: Tensor, type_name: str) -> Tensor:
    """x [1, K] times raw blocks uint8 [N, row_bytes] of a type in TYPES, N a multiple of 4 -> [1, N]."""
    num_outputs, row_bytes = blocks.shape
    row_length = x.shape[1]
    y = torch.empty(1, num_outputs, dtype=x.dtype, device=x.device)
    _naive_kernel[(num_outputs // 4,)](
        blocks, x, y, num_outputs, row_length, type_name, row_bytes * 256 // row_length, 4, num_warps=4
    )
    return y
