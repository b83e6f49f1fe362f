"""The fp16 numbers of a block: super-block scales and minimums, read and replaced without touching anything else.

Decoded weights are linear in them, w = d * (...) - dmin * (...), so they are what can be tuned once the codes are
fixed. MXFP4 and NVFP4 have none: their scales are 8-bit floats that belong to the codes.
"""

import torch
from torch import Tensor

from dynquant.formats.bits import field

_FP16_MAX = 65504.0

_OFFSETS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "Q2_0", "Q1_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
"""Byte of each fp16 number. IQ1_M scatters its one over the top nibbles of its scale words."""


def num_scales(type_name: str) -> int:
    """Return the number of fp16 numbers in a block of the type: the scale, and the minimum where there is one."""
    return 1 if type_name == "IQ1_M" else len(_OFFSETS.get(type_name, ()))


def read_scales(type_name: str, blocks: Tensor) -> Tensor:
    """float32 [n, num_scales] of blocks uint8 [n, block_bytes]."""
    if type_name == "IQ1_M":
        quarters = field(blocks, 48, 8, torch.int16).to(torch.int32) >> 12 & 15  # [n, 4], lowest first
        bits = (quarters << torch.tensor((0, 4, 8, 12), device=blocks.device)).sum(1, keepdim=True)
        return bits.to(torch.int16).view(torch.float16).to(torch.float32)
    halves = [field(blocks, offset, 2, torch.float16) for offset in _OFFSETS[type_name]]
    return torch.cat(halves, dim=1).to(torch.float32)


def rounded_scales(scales: Tensor) -> Tensor:
    """float32 scales as `read_scales` gives them after `with_scales`."""
    return _halves(scales).to(torch.float32)


def _halves(scales: Tensor) -> Tensor:
    return scales.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16)  # beyond, rounding gives Inf


def with_scales(type_name: str, blocks: Tensor, scales: Tensor) -> Tensor:
    """A copy of the blocks with other fp16 numbers, rounded to nearest and kept finite."""
    halves = _halves(scales)
    blocks = blocks.clone()
    if type_name == "IQ1_M":
        bits = halves.view(torch.int16).to(torch.int32) & 0xFFFF  # int16 has a sign, which widening would copy
        quarters = (bits >> torch.tensor((0, 4, 8, 12), device=blocks.device)) & 15
        words = field(blocks, 48, 8, torch.int16).to(torch.int32) & 0x0FFF
        blocks[:, 48:56] = (words | (quarters << 12)).to(torch.int16).view(torch.uint8)
        return blocks
    for column, offset in enumerate(_OFFSETS[type_name]):
        blocks[:, offset : offset + 2] = halves[:, column : column + 1].contiguous().view(torch.uint8)
    return blocks
