"""Packed fields decode to the weights that the encoder thinks they make: ours, gguf-py's and ggml's own check agree."""

import gguf
import numpy as np
import pytest
import torch

from dynquant.encoding import ggml as ggml_encoder
from dynquant.encoding.search.layouts import LAYOUTS, BlockLayout, Fields
from dynquant.encoding.search.rows import Rows
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.formats.scale_fields import num_scales, read_scales, with_scales

EXPERTS, ROWS, BLOCKS = 2, 7, 3


def random_fields(layout: BlockLayout, generator: torch.Generator) -> Fields:
    columns = BLOCKS * layout.super_block

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    sub_blocks = columns // layout.sub_block
    half = torch.randn(EXPERTS, ROWS, BLOCKS, generator=generator).half().float()
    d = torch.ones_like(half) if layout.has_power_of_two_scale else half
    scales = integers(len(layout.multipliers), EXPERTS, ROWS, sub_blocks)
    if layout.has_power_of_two_scale:
        scales = 100 + scales % 60
    shifts = None
    if layout.shift_width:
        shifts = 2.0 * integers(2, EXPERTS, ROWS, columns // layout.shift_width) - 1
    if not layout.num_mins:
        return Fields(d, scales, shifts)
    mins = integers(layout.num_mins, EXPERTS, ROWS, sub_blocks)
    return Fields(d, scales, shifts, half.abs(), torch.ones_like(mins) if layout.has_plain_minimum else mins)


def random_values(layout: BlockLayout, generator: torch.Generator) -> torch.Tensor:
    """Storable codewords: the nearest ones to noise."""
    columns, group = BLOCKS * layout.super_block, layout.codebook.group
    noise = torch.randn(1, EXPERTS * ROWS * columns // group, group, generator=generator) * layout.codebook.peak / 2
    return layout.codebook.nearest(noise, torch.ones(1, group)).reshape(EXPERTS, ROWS, columns)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_packed_blocks_decode_to_the_intended_weights(layout):
    generator = torch.Generator().manual_seed(1)
    rows = Rows(layout, torch.zeros(EXPERTS, ROWS, BLOCKS * layout.super_block), torch.ones(EXPERTS, ROWS, 1))
    fields, values = random_fields(layout, generator), random_values(layout, generator)
    packed = rows.packed(fields, values)
    assert packed.shape == (EXPERTS, ROWS, layout.quant_type.row_bytes(BLOCKS * layout.super_block))
    intended = rows.decoded(fields, values)
    assert torch.equal(decode(layout.name, packed), intended) or torch.allclose(
        decode(layout.name, packed), intended, rtol=2e-6, atol=1e-6 * float(intended.abs().max())
    )
    if layout.name not in ("Q2_0", "Q1_0"):  # gguf-py 0.19 does not decode these
        theirs = gguf.quants.dequantize(
            packed.reshape(-1, packed.shape[-1]).numpy(), gguf.GGMLQuantizationType[layout.name]
        )
        assert np.array_equal(theirs, decode(layout.name, packed).reshape(theirs.shape).numpy())
    assert ggml_encoder._library().validate_row_data(layout.quant_type.ggml_id, packed.data_ptr(), packed.numel())


SCALED = [name for name in QUANT_TYPES if num_scales(name)]


@pytest.mark.parametrize("name", SCALED)
def test_scales_can_be_replaced_alone(name):
    """Weights are linear in the fp16 numbers, and putting the same ones back changes no byte."""
    layout = QUANT_TYPES[name]
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (50, layout.block_bytes), dtype=torch.uint8, generator=generator)
    halves = (torch.rand(50, num_scales(name), generator=generator) + 0.5).half().float()
    blocks = with_scales(name, blocks, halves)
    assert torch.equal(read_scales(name, blocks), halves)
    assert torch.equal(with_scales(name, blocks, halves), blocks)
    doubled = decode(name, with_scales(name, blocks, 2 * halves))
    assert torch.equal(doubled, 2 * decode(name, blocks))


def test_every_super_block_type_has_scales_but_the_fp4_ones():
    without = {name for name in QUANT_TYPES if not num_scales(name)}
    assert without == {"F32", "F16", "BF16", "MXFP4", "NVFP4"}
