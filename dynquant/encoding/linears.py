"""Linear layers of a checkpoint encoded in pieces, as exports and plans that are tried both have them.

A piece is a matrix, or as many experts of a stack as are encoded together.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple

import torch

from dynquant.encoding.parts import WeightChecks, as_slice, ranges
from dynquant.encoding.stream import Guidance
from dynquant.encoding.vllm import EncodedLayer, encode_layers, nvfp4_global_scale
from dynquant.families.linear_layers import LinearLayer
from dynquant.formats.vllm_schemes import Scheme

_CPU_WEIGHTS, _GPU_WEIGHTS = 1 << 23, 1 << 27
"""Float32 weights of a stack of experts that are encoded together, at least one expert."""


class LinearPiece(NamedTuple):
    """Some experts of a layer (of a matrix: the range 0 to 1) in a scheme."""

    linear: LinearLayer
    scheme: Scheme
    experts: range

    @property
    def modules(self) -> tuple[str, ...]:
        return self.linear.modules[self.experts.start : self.experts.stop]

    @property
    def num_weights(self) -> int:
        return len(self.experts) * prod(self.linear.shape[-2:])

    @property
    def needed_bytes(self) -> int:
        """Memory that encoding takes at most: what the search needs for each weight, and hessians with factors."""
        return 80 * self.num_weights + 32 * len(self.experts) * self.linear.shape[-1] ** 2


def pieces_of(linear: LinearLayer, scheme: Scheme, device: torch.device) -> list[LinearPiece]:
    """Return a layer as what is encoded together on a device."""
    at_once = (_CPU_WEIGHTS if device.type == "cpu" else _GPU_WEIGHTS) // prod(linear.shape[-2:])
    return [LinearPiece(linear, scheme, experts) for experts in ranges(linear.num_experts, max(1, at_once))]


def encode_piece(
    piece: LinearPiece,
    guidance: Guidance,
    *,
    global_scales: Mapping[str, float],
    device: torch.device | None = None,
    checks: WeightChecks | None = None,
) -> list[EncodedLayer]:
    """Return the experts of a piece as they are stored; `global_scales` are those of layers by name, for NVFP4.

    Raises:
        EncodeError: NaN or Inf weights; the layer is named.
    """
    linear, part = piece.linear, as_slice(piece.experts)
    weights = torch.stack([linear.load(expert) for expert in piece.experts])
    if checks is not None:
        checks.add(linear.name, linear.shape, piece.experts, weights)
    importance = guidance.importance and guidance.importance(linear.name, linear.shape)
    return encode_layers(
        piece.scheme,
        weights,
        importance=None if importance is None else importance[part],
        hessian=guidance.hessian and guidance.hessian(linear.name, linear.shape, part),
        global_scale=global_scales[linear.name] if piece.scheme.strategy == "tensor_group" else None,
        device=device,
        name=piece.modules[0],
    )


def fused_scales(linears: Iterable[LinearLayer]) -> dict[str, float]:
    """Return NVFP4's global scale of layers by name; those that vLLM fuses have the same."""
    linears, peaks = list(linears), dict[str, float]()
    for linear in linears:
        peak = max(float(linear.load(expert).abs().max()) for expert in range(linear.num_experts))
        peaks[linear.fusion] = max(peak, peaks.get(linear.fusion, 0.0))
    return {linear.name: nvfp4_global_scale(peaks[linear.fusion]) for linear in linears}
