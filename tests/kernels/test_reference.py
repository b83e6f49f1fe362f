"""The reference operations against float64 products with decoded weights."""

import pytest
import torch

from dynquant.errors import PlanError
from dynquant.formats import decode
from dynquant.kernels import reference
from dynquant.kernels.planes import PLANES, block_rows, pack_planes
from tests.helpers.packed_weights import experts_truth, normal, packed_weights, relative_error

TYPES = sorted(PLANES)
ROUNDING = 1e-6
"""Of float32 sums; 1e-14 is that of float64."""


@pytest.mark.parametrize("name", TYPES)
def test_products_equal_float64(name):
    weight = packed_weights(name, 63, 512)
    dense = decode(name, weight).double()
    x, dy = normal(5, 512), normal(5, 63)
    assert relative_error(reference.linear(x, weight, name), x.double() @ dense.T) < ROUNDING
    assert relative_error(reference.input_grad(dy, weight, name), dy.double() @ dense) < ROUNDING
    assert relative_error(reference.linear(x.double(), weight, name), x.double() @ dense.T) < 1e-14
    planar = pack_planes(name, weight)
    assert torch.equal(reference.linear(x, planar, name, layout="planes"), reference.linear(x, weight, name))
    assert torch.equal(reference.dequantize(planar, name, layout="planes"), decode(name, weight))


@pytest.mark.parametrize("name", TYPES)
def test_rows_of_planes_are_the_rows_of_blocks(name):
    weight = packed_weights(name, 2, 5, 512)
    planar, flat = pack_planes(name, weight), weight.reshape(10, -1)
    assert torch.equal(block_rows(name, planar, slice(3, 9)), flat[3:9])
    ids = torch.tensor([[9, 0], [4, 4]])
    assert torch.equal(block_rows(name, planar, ids.flatten()), flat[ids.flatten()])
    table, planar_table = flat, pack_planes(name, flat)
    rows = reference.embedding(ids, planar_table, name, dtype=torch.bfloat16, layout="planes")
    assert torch.equal(rows, decode(name, table)[ids].bfloat16())
    assert torch.equal(rows, reference.embedding(ids, table, name, dtype=torch.bfloat16))


@pytest.mark.parametrize("rows", [1, 2, 5, 17, 65, 257])
@pytest.mark.parametrize("num_outputs", [1, 63, 130])
def test_shapes(rows, num_outputs):
    weight = packed_weights("Q3_K", num_outputs, 768)
    dense = decode("Q3_K", weight).double()
    x = normal(768, rows).T  # columns of x are not neighbours in memory
    assert relative_error(reference.linear(x, weight, "Q3_K"), x.double() @ dense.T) < ROUNDING
    dy = normal(rows, 2 * num_outputs)[:, ::2]
    assert relative_error(reference.input_grad(dy, weight, "Q3_K"), dy.double() @ dense) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_have_the_dtype_and_the_leading_dimensions_of_the_activations(dtype):
    weight = packed_weights("IQ4_XS", 6, 256)
    x = normal(2, 3, 256, dtype=dtype)
    y = reference.linear(x, weight, "IQ4_XS")
    assert y.shape == (2, 3, 6) and y.dtype == dtype
    expected = x.double() @ decode("IQ4_XS", weight).double().T
    torch.testing.assert_close(y, expected.to(dtype))
    assert reference.linear(x[:0], weight, "IQ4_XS").shape == (0, 3, 6)
    assert reference.linear(x[0, 0], weight, "IQ4_XS").shape == (6,)


def test_rows_are_decoded_in_chunks(monkeypatch):
    weight, x, dy = packed_weights("Q4_K", 37, 512), normal(3, 512), normal(3, 37)
    whole = reference.linear(x, weight, "Q4_K"), reference.input_grad(dy, weight, "Q4_K")
    sizes = []
    monkeypatch.setattr(reference, "_CHUNK_BYTES", 10 * 512 * 4)
    monkeypatch.setattr(reference, "decode", lambda name, blocks: sizes.append(len(blocks)) or decode(name, blocks))
    assert relative_error(reference.linear(x, weight, "Q4_K"), whole[0]) < ROUNDING
    assert relative_error(reference.input_grad(dy, weight, "Q4_K"), whole[1]) < ROUNDING
    assert sizes == [10, 10, 10, 7] * 2
    assert torch.equal(reference.dequantize(weight, "Q4_K"), decode("Q4_K", weight))


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XXS", "Q8_0"])
@pytest.mark.parametrize("layout", ["blocks", "planes"])
def test_experts(name, layout):
    blocks = packed_weights(name, 4, 7, 256)
    weight = pack_planes(name, blocks) if layout == "planes" else blocks
    ids = torch.tensor([[0, 3], [3, 4], [-1, 0], [3, 0], [99, 3]])  # no token has expert 1 or 2
    x, rows, dy = normal(5, 256), normal(5, 2, 256), normal(5, 2, 7)
    for inputs in (x, rows):
        y = reference.experts_linear(inputs, weight, ids, name, layout=layout)
        assert relative_error(y, experts_truth(inputs, blocks, ids, name)) < ROUNDING
        assert not y[ids >= 4].any() and not y[ids < 0].any()
    dx = reference.experts_input_grad(dy, weight, ids, name, layout=layout)
    assert relative_error(dx, experts_truth(dy, blocks, ids, name, transposed=True)) < ROUNDING
    one = torch.full((5, 2), 2, dtype=torch.int32)
    y = reference.experts_linear(x, weight, one, name, layout=layout)
    assert relative_error(y, experts_truth(x, blocks, one, name)) < ROUNDING


def test_what_does_not_fit_is_refused_by_name():
    weight, x = packed_weights("Q4_K", 4, 512), torch.zeros(2, 512)
    stack, ids = packed_weights("Q4_K", 3, 4, 512), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(PlanError, match="Q9_K"):
        reference.linear(x, weight, "Q9_K")
    with pytest.raises(ValueError, match="BF16 is not a packed type"):
        reference.linear(x, weight, "BF16")
    with pytest.raises(ValueError, match=r"`layout` must be .* got 'rows'"):
        reference.linear(x, weight, "Q4_K", layout="rows")
    with pytest.raises(ValueError, match=r"`weight` must be whole Q4_K blocks of 144 bytes, got rows of 287"):
        reference.linear(x, weight[:, 1:], "Q4_K")
    with pytest.raises(ValueError, match=r"`weight` of Q4_K must be uint8 \[rows, row_bytes\], got torch.int8"):
        reference.linear(x, weight.view(torch.int8), "Q4_K")
    with pytest.raises(ValueError, match=r"\[rows, row_bytes\], got .* \[3, 4, 288\]"):
        reference.linear(x, stack, "Q4_K")
    with pytest.raises(ValueError, match=r"last dimension of `x` must be 512 to fit the Q4_K weight, got .*\[2, 511\]"):
        reference.linear(x[:, 1:], weight, "Q4_K")
    with pytest.raises(ValueError, match=r"`x` must be floating, got torch.int64"):
        reference.linear(x.long(), weight, "Q4_K")
    with pytest.raises(ValueError, match=r"last dimension of `dy` must be 4"):
        reference.input_grad(x, weight, "Q4_K")
    with pytest.raises(ValueError, match=r"\[experts, rows, row_bytes\], got .* \[4, 288\]"):
        reference.experts_linear(x, weight, ids, "Q4_K")
    with pytest.raises(ValueError, match=r"`expert_ids` must be int32 or int64 \[tokens, slots\], got .* \[2\]"):
        reference.experts_linear(x, stack, ids[:, 0], "Q4_K")
    with pytest.raises(ValueError, match=r"`x` must be \[2, columns\] or \[2, 2, columns\].* got shape \[3, 512\]"):
        reference.experts_linear(torch.zeros(3, 512), stack, ids, "Q4_K")
    with pytest.raises(ValueError, match=r"`ids` must be int32 or int64, got torch.float32"):
        reference.embedding(torch.zeros(2), weight, "Q4_K", dtype=torch.float32)
    with pytest.raises(IndexError):
        reference.embedding(torch.tensor([4]), weight, "Q4_K", dtype=torch.float32)
