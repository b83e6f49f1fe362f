"""The encoder's view of the schemes that vLLM serves: the same search and error feedback as for ggml's blocks.

    weight = a * codeword       one scale `a` for `group` weights of a row

Integers and E4M3 codewords have scales in bfloat16 (compressed-tensors multiplies in the model's own type), NVFP4 has
scales in E4M3 over one number for the tensor, MXFP4 powers of two. What `Fields.d` holds is the scale itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynquant.encoding.search.codebooks import Integers, Values
from dynquant.encoding.search.layouts import LAYOUTS, BlockLayout, Fields
from dynquant.formats.vllm_schemes import Scheme

E4M3_MAX = 448.0
E2M1_MAX = 6.0
_E4M3_TINY = 2.0**-9
_BF16_MAX = torch.finfo(torch.bfloat16).max


@dataclass(frozen=True)
class Float8:
    """E4M3 numbers, one weight at a time."""

    group: int = 1
    peak: float = E4M3_MAX

    def nearest(self, y: Tensor, metric: Tensor) -> Tensor:
        return y.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)

    scan = nearest


@dataclass(frozen=True)
class ServedLayout(BlockLayout):
    """Groups of one scale. `global_scale` is what NVFP4's scales are multiplied with before they are stored."""

    group_size: int = 0
    tries_negative_scales: bool = False
    global_scale: float | None = None

    @property
    def super_block(self) -> int:
        return self.group_size

    @property
    def has_signed_scales(self) -> bool:
        return self.tries_negative_scales

    @property
    def largest_weight(self) -> float:
        return _BF16_MAX

    def round_scale(self, d: Tensor) -> Tensor:
        if self.global_scale is None:
            return d.to(torch.bfloat16).to(torch.float32)
        # The codewords are ggml's doubled E2M1 numbers.
        stored = (2 * self.global_scale * d).clamp(_E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
        return stored.to(torch.float32) / (2 * self.global_scale)


def served_layout(scheme: Scheme, columns: int, group: int, global_scale: float | None = None) -> BlockLayout:
    """The layout of rows of `columns` weights; `group` 0 is one scale for the row."""
    if scheme.strategy == "tensor_group":
        assert global_scale is not None
        return _layout(scheme, Values("MXFP4"), group, (0.6, 1.1), global_scale=global_scale)
    if scheme.kind == "int":
        half = 1 << (scheme.num_bits - 1)
        fractions = (0.6, 1.1) if scheme.num_bits == 4 else (0.9, 1.02)
        return _layout(scheme, Integers(-half, half - 1), group, fractions, tries_negative_scales=True)
    if scheme.num_bits == 8:
        return _layout(scheme, Float8(), columns, (1.0, 1.9))
    return LAYOUTS["MXFP4"]


def _layout(
    scheme: Scheme,
    codebook: Integers | Values | Float8,
    group: int,
    fractions: tuple[float, float],
    *,
    tries_negative_scales: bool = False,
    global_scale: float | None = None,
) -> ServedLayout:
    return ServedLayout(
        scheme.name, codebook, group, (1.0,), _no_blocks, fractions=fractions, group_size=group,
        tries_negative_scales=tries_negative_scales, global_scale=global_scale,
    )  # fmt: skip


def _no_blocks(_fields: Fields, _values: Tensor) -> Tensor:
    raise NotImplementedError("compressed-tensors stores codewords and scales apart")
