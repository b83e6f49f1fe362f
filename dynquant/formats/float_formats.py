"""Decoders of the floating-point types: F32, F16, BF16, and the four-bit floats MXFP4 and NVFP4.

The four-bit values are E2M1 numbers stored doubled (0, 1, 2, 3, 4, 6, 8, 12 and their negatives); the block scales
are halved to make up for it. A tensor-wide scale, which NVFP4 checkpoints may carry beside the blocks, is not
applied here.

Each docstring is the byte map of one block, with the number of bytes of a field in parentheses.
"""

import torch
from torch import Tensor

from dynquant.formats import tables
from dynquant.formats.bits import field, nibbles


def decode_f32(blocks: Tensor) -> Tensor:
    """| f32 (4) |"""
    return field(blocks, 0, 4, torch.float32)


def decode_f16(blocks: Tensor) -> Tensor:
    """| f16 (2) |"""
    return field(blocks, 0, 2, torch.float16).float()


def decode_bf16(blocks: Tensor) -> Tensor:
    """| bf16 (2) |"""
    return field(blocks, 0, 2, torch.bfloat16).float()


def decode_mxfp4(blocks: Tensor) -> Tensor:
    """| e E8M0 (1) | qs nibbles (16) |"""
    scales = tables.lookup_value(tables.e8m0_halves(blocks.device), blocks[:, :1])
    q = tables.lookup_value(tables.values("MXFP4", blocks.device), nibbles(blocks[:, 1:], dim=1))
    return scales * q.flatten(1)


def decode_nvfp4(blocks: Tensor) -> Tensor:
    """| d unsigned E4M3 (4), one for 16 weights | qs nibbles (32): 8 bytes for 16 weights |"""
    scales = tables.lookup_value(tables.ue4m3_halves(blocks.device), blocks[:, :4])
    q = tables.lookup_value(tables.values("NVFP4", blocks.device), nibbles(blocks[:, 4:].reshape(-1, 4, 8), dim=2))
    return (scales.unsqueeze(-1) * q.flatten(2)).flatten(1)
