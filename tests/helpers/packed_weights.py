"""Random packed weights whose scales are finite and of a usual size, and the error measure of kernel tests."""

import torch

from dynquant.codecs import decode
from dynquant.codecs.scale_fields import num_scales, with_scales
from dynquant.quant_types import QUANT_TYPES


def packed_weights(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """uint8 [..., row_bytes] that decodes to weights of about 1/10; `shape` is that of the weights [..., K]."""
    layout = QUANT_TYPES[name]
    generator = torch.Generator().manual_seed(seed)
    row_bytes = layout.row_bytes(shape[-1])
    blocks = torch.randint(0, 256, (*shape[:-1], row_bytes), dtype=torch.uint8, generator=generator)
    blocks = blocks.reshape(-1, layout.block_bytes)
    if name == "MXFP4":
        blocks[:, 0] = 122 + blocks[:, 0] % 4
    elif name == "NVFP4":
        blocks[:, :4] = 16 + blocks[:, :4] % 16
    else:
        blocks = with_scales(name, blocks, torch.full((len(blocks), num_scales(name)), 1e-4))
        decoded = decode(name, blocks).square().mean().sqrt()
        scales = (1 + torch.rand(len(blocks), num_scales(name), generator=generator)) * (0.07e-4 / decoded.item())
        blocks = with_scales(name, blocks, scales)
    return blocks.reshape(*shape[:-1], row_bytes)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64; NaN where one is NaN."""
    expected = expected.double()
    return ((actual.double().to(expected.device) - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def experts_truth(
    x: torch.Tensor, weight: torch.Tensor, expert_ids: torch.Tensor, name: str, *, transposed: bool = False
) -> torch.Tensor:
    """One product after the other, float64 [T, k, columns]."""
    dense = decode(name, weight).double()
    num_tokens, num_slots = expert_ids.shape
    product = torch.zeros(num_tokens, num_slots, dense.shape[2 if transposed else 1], dtype=torch.float64)
    for token in range(num_tokens):
        for slot in range(num_slots):
            expert = expert_ids[token, slot].item()
            row = (x[token] if x.dim() == 2 else x[token, slot]).double()
            if 0 <= expert < len(dense):
                product[token, slot] = row @ dense[expert] if transposed else dense[expert] @ row
    return product
