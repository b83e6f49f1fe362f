"""Encodes linear layers into the schemes that vLLM reads, and decodes them as compressed-tensors does.

Scales, codewords and error feedback are found by the search of the dynquant encoder: with a hessian e H eᵀ is made
small, with an importance its diagonal, without either the plain squared error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynquant.encoding.dynquant_encoder import Loss, loss_under
from dynquant.encoding.interface import check_finite
from dynquant.encoding.parts import as_slice, ranges
from dynquant.encoding.search.layouts import E2M1_MAX, E4M3_MAX, MXFP4_FIRST, scheme_layout
from dynquant.encoding.search.rows import Rows
from dynquant.errors import EncodeError
from dynquant.formats.vllm_schemes import E2M1, Scheme, scaled

_CPU_WEIGHTS = 1 << 21
_GPU_WEIGHTS = 1 << 25


@dataclass(frozen=True)
class EncodedLayer:
    """Weights [R, C] of one linear layer in a scheme.

    `codes` float32 [R, C] are integers, E4M3 or E2M1 numbers; `scales` [R, G] as they are stored; `zero_points` [R, G]
    as `codes`, for the schemes that have them.
    """

    scheme: Scheme
    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None = None
    global_scale: float | None = None

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weights as compressed-tensors decompresses them in a model of `dtype`."""
        if self.scheme.strategy == "none":
            return self.codes.to(dtype)
        global_scale = None if self.global_scale is None else torch.tensor([self.global_scale])
        return scaled(self.codes, self.scales, self.zero_points, global_scale).to(dtype)

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors to write, by suffix; see `vllm_schemes`."""
        scheme, codes = self.scheme, self.codes
        if scheme.strategy == "none":
            return {"weight": codes.to(torch.bfloat16)}
        if scheme.kind == "int":
            packed = _packed_integers(codes, scheme.num_bits)
            parts = {"weight_packed": packed, "weight_scale": self.scales, "weight_shape": torch.tensor(codes.shape)}
            if self.zero_points is not None:
                parts["weight_zero_point"] = _packed_integers(self.zero_points.T, scheme.num_bits).T.contiguous()
            return parts
        if scheme.num_bits == 8:
            return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale": self.scales}
        parts = {"weight_packed": _packed_e2m1(codes), "weight_scale": self.scales}
        if self.global_scale is not None:
            parts["weight_global_scale"] = torch.tensor([self.global_scale])
        return parts


def nvfp4_global_scale(peak: float) -> float:
    """Return what NVFP4's scales are multiplied with, for layers whose largest magnitude is `peak`; exact in float32.

    vLLM takes one for all layers that it fuses, so `peak` is that of all of them.
    """
    return float(torch.tensor(E4M3_MAX * E2M1_MAX / peak if peak > 0 else 1.0))


def encode_layers(
    scheme: Scheme,
    weights: Tensor,
    *,
    importance: Tensor | None = None,
    hessian: Tensor | None = None,
    global_scale: float | None = None,
    device: torch.device | None = None,
    name: str = "tensor",
) -> list[EncodedLayer]:
    """Encode a stack of linear layers, float32 [E, R, C]; a single layer is a stack of one.

    `importance` is E[x²] of the inputs, [E, C]; `hessian` E[x xᵀ], [E, C, C] or [1, C, C] for all, positive definite;
    `global_scale` that of `nvfp4_global_scale`, for NVFP4A16. The search runs on `device`, by default the CPU.

    Raises:
        EncodeError: NaN or Inf weights, or weights beyond the range of the scheme.
    """
    device = device or torch.device("cpu")
    loss = None if scheme.strategy == "none" else loss_under(weights.shape, importance, hessian, device)
    return encode_layers_under(loss, scheme, weights, global_scale=global_scale, device=device, name=name)


def encode_layers_under(
    loss: Loss | None,
    scheme: Scheme,
    weights: Tensor,
    *,
    global_scale: float | None = None,
    device: torch.device,
    name: str = "tensor",
) -> list[EncodedLayer]:
    """`encode_layers` under a loss of such weights on `device`, which serves many schemes; BF16 needs none."""
    peak = check_finite(weights, name=name)
    if scheme.strategy == "none":
        return [EncodedLayer(scheme, w.to(torch.bfloat16).to(torch.float32), w[:, :0]) for w in weights]
    assert loss is not None
    layout = scheme_layout(scheme, weights.shape[-1], global_scale)
    if peak > layout.largest_weight:
        raise EncodeError(
            f"`{name}` cannot be encoded as {scheme.name}: its largest weight is {peak:.3g}. Keep it as BF16."
        )
    codes, scales, zero_points = torch.empty_like(weights), [], []
    rows_at_once = max(1, (_CPU_WEIGHTS if device.type == "cpu" else _GPU_WEIGHTS) // weights[:, :1].numel())
    for part in map(as_slice, ranges(weights.shape[1], rows_at_once)):
        rows = Rows.of(layout, weights[:, part].to(device, torch.float32))
        fields, values = loss.blocks(rows)
        codes[:, part] = values.cpu()
        scales.append(_stored_scales(scheme, fields.d * rows.unit, fields.scales, global_scale).cpu())
        zero_points.append(fields.mins if fields.mins is None else fields.mins.cpu())
    if scheme.is_fp4:
        codes = codes / 2  # ggml's table holds E2M1 numbers doubled
    zeros = [None] * len(codes)
    if scheme.has_zero_points:
        half = 1 << (scheme.num_bits - 1)
        codes, zeros = codes - half, torch.cat(zero_points, dim=1).to(torch.float32) - half
    layers = zip(codes, torch.cat(scales, dim=1), zeros, strict=True)
    return [EncodedLayer(scheme, *layer, global_scale) for layer in layers]


def _stored_scales(scheme: Scheme, d: Tensor, exponents: Tensor, global_scale: float | None) -> Tensor:
    if scheme.strategy == "tensor_group":
        assert global_scale is not None
        return (2 * global_scale * d).to(torch.float8_e4m3fn)
    if scheme.is_fp4:
        return (exponents + MXFP4_FIRST).to(torch.uint8)
    return d.to(torch.bfloat16)


def _packed_integers(codes: Tensor, num_bits: int) -> Tensor:
    """Codes, offset to start at 0, one after the other from the low bits of each row's first int32 up."""
    unsigned = (codes + (1 << (num_bits - 1))).to(torch.uint8)
    eights = torch.nn.functional.pad(unsigned, (0, -codes.shape[-1] % 32)).unflatten(-1, (-1, 8))
    numbers = sum(eights[..., i].to(torch.int64) << (i * num_bits) for i in range(8))
    bytes_ = numbers.unsqueeze(-1).view(torch.uint8)[..., :num_bits].flatten(-2)
    return bytes_.contiguous().view(torch.int32)[:, : -(-codes.shape[-1] * num_bits // 32)].contiguous()


def _packed_e2m1(codes: Tensor) -> Tensor:
    """Bit 3 is the sign, bits 0 to 2 the place in E2M1; the first of two neighbours is in the low bits."""
    places = torch.bucketize(codes.abs(), torch.tensor(E2M1)).to(torch.uint8)
    nibbles = (places | ((codes < 0).to(torch.uint8) << 3)).unflatten(-1, (-1, 2))  # -0 becomes 0
    return nibbles[..., 0] | (nibbles[..., 1] << 4)
