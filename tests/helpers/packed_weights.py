"""Random packed weights whose scales are finite and of a usual size, and the error measure of kernel tests."""

import torch

from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.formats.scale_fields import num_scales, with_scales


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
    """Every pair times the decoded weights of its expert, float64 [T, k, columns]; zeros where it has none."""
    rows = x.double() if x.dim() == 3 else x.double()[:, None].expand(-1, expert_ids.shape[1], -1)
    dense = decode(name, weight).double()
    product = rows.new_zeros(*expert_ids.shape, dense.shape[2 if transposed else 1])
    for expert, matrix in enumerate(dense):
        chosen = expert_ids == expert
        product[chosen] = rows[chosen] @ (matrix if transposed else matrix.T)
    return product
