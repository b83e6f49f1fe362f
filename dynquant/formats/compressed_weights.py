"""Layers of compressed-tensors checkpoints (`vllm_schemes`) as the weights that the library makes of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def scaled(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None = None, global_scale: Tensor | None = None
) -> Tensor:
    """Return weights [R, C] of codes [R, C], stored scales and zero points [R, G], in float32 unless they are FP4's.

    The library unpacks E2M1 numbers in bfloat16, whatever the model's type is.
    """
    is_fp4 = scales.dtype == torch.uint8 or global_scale is not None
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.to(torch.float32) - 127)
    scales, group = scales.to(torch.float32), codes.shape[-1] // scales.shape[-1]
    if global_scale is not None:
        scales = scales / global_scale
    if zero_points is not None:
        codes = codes - zero_points.repeat_interleave(group, dim=-1)
    weights = codes * scales.repeat_interleave(group, dim=-1)
    return weights.to(torch.bfloat16) if is_fp4 else weights


def weights_of(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the weights [R, C] of a layer, from its tensors by suffix."""
    scales, global_scale = parts["weight_scale"], parts.get("weight_global_scale")
    return scaled(codes_of(parts), scales, zero_points_of(parts), global_scale)


def codes_of(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the codes [R, C] of a layer as float32: integers, E4M3 or E2M1 numbers."""
    if "weight" in parts:
        return parts["weight"].to(torch.float32)
    packed = parts["weight_packed"]
    if packed.dtype == torch.uint8:
        nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int64)
        magnitudes = torch.tensor(_E2M1)[nibbles & 7]
        return torch.where(nibbles >= 8, -magnitudes, magnitudes)
    columns = int(parts["weight_shape"][1])
    return _unpacked(packed, packed.shape[-1] * 32 // columns, columns)


def zero_points_of(parts: Mapping[str, Tensor]) -> Tensor | None:
    """Return the zero points [R, G] of a layer in the scale of its codes, or None."""
    packed = parts.get("weight_zero_point")
    if packed is None:
        return None
    rows, columns = parts["weight_shape"].tolist()
    return _unpacked(packed.T, parts["weight_packed"].shape[-1] * 32 // columns, rows).T


def _unpacked(packed: Tensor, num_bits: int, count: int) -> Tensor:
    """Return `count` signed integers of each row of int32, packed from the low bits up without gaps."""
    first = torch.arange(count) * num_bits
    bytes_ = torch.nn.functional.pad(packed.contiguous().view(torch.uint8), (0, 1)).to(torch.int32)
    pairs = bytes_[:, first // 8] | (bytes_[:, first // 8 + 1] << 8)
    return ((pairs >> (first % 8)) & ((1 << num_bits) - 1)).to(torch.float32) - (1 << (num_bits - 1))
