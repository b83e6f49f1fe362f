"""Blocks and planes hold the same bytes, and planes are aligned."""

import pytest
import torch

from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.kernels.planes import PLANES, pack_planes, plane_starts, unpack_planes


def random_blocks(name: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    row_bytes = shape[-1] * QUANT_TYPES[name].block_bytes
    return torch.randint(0, 256, (*shape[:-1], row_bytes), dtype=torch.uint8, generator=generator)


def test_every_type_but_the_plain_floats_has_planes():
    assert set(PLANES) == set(QUANT_TYPES) - {"F32", "F16", "BF16"}


@pytest.mark.parametrize("name", PLANES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2, 3, 7)], ids=str)
def test_unpacking_gives_the_same_bytes(name, shape):
    blocks = random_blocks(name, *shape)
    planar = pack_planes(name, blocks)
    assert planar.shape == blocks.shape
    assert torch.equal(unpack_planes(name, planar), blocks)


@pytest.mark.parametrize("name", PLANES)
def test_planes_hold_their_fields_aligned(name):
    blocks = random_blocks(name, 3, 5)
    flat = blocks.reshape(15, -1)
    planar = pack_planes(name, blocks).reshape(-1)
    starts = plane_starts(name, 15)
    for field in PLANES[name]:
        start = starts[field.name]
        assert start % min(field.num_bytes & -field.num_bytes, 16) == 0
        found = planar[start : start + 15 * field.num_bytes].reshape(15, -1)
        assert torch.equal(found, flat[:, field.offset : field.offset + field.num_bytes])


def test_strided_blocks_are_packed():
    blocks = random_blocks("Q4_K", 6, 2)
    assert torch.equal(pack_planes("Q4_K", blocks[::2]), pack_planes("Q4_K", blocks[::2].contiguous()))


def test_what_is_no_packed_type_is_refused():
    with pytest.raises(ValueError, match="BF16 is not a packed type"):
        pack_planes("BF16", torch.zeros(1, 2, dtype=torch.uint8))
    with pytest.raises(PlanError, match="Q9_K"):
        pack_planes("Q9_K", torch.zeros(1, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="whole blocks of 144 bytes"):
        pack_planes("Q4_K", torch.zeros(1, 145, dtype=torch.uint8))
