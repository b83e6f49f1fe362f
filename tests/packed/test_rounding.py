"""Activations rounded as ggml rounds them, against gguf-py's Q8_0 and against the definition of Q8_K."""

import gguf
import pytest
import torch

from dynquant.packed.layers import PackedLinear
from dynquant.packed.rounding import round_activations, rounded


def activations(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 512, generator=torch.Generator().manual_seed(2)) * 3


@pytest.mark.parametrize("type_name", ["Q4_0", "IQ4_NL", "MXFP4", "NVFP4", "Q8_0"])
def test_small_blocks_take_q8_0(type_name):
    x = activations()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
    assert torch.equal(rounded(x, type_name), torch.from_numpy(expected))


@pytest.mark.parametrize("type_name", ["Q4_K", "IQ1_S", "TQ2_0"])
def test_super_blocks_take_q8_k(type_name):
    x = activations()
    x[0, :256] = 0
    found = rounded(x, type_name).unflatten(-1, (-1, 256))
    blocks = x.unflatten(-1, (-1, 256))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    assert ((found - blocks).abs() <= step * 0.501).all()
    assert torch.equal(found[0, 0], torch.zeros(256))
    whole = found[1:] / step[1:]
    torch.testing.assert_close(whole, whole.round(), atol=1e-3, rtol=0)


def test_floats_take_their_own_type():
    x = activations()
    assert torch.equal(rounded(x, "F32"), x)
    assert torch.equal(rounded(x, "BF16"), x.bfloat16().float())


def test_layers_round_only_while_told_to():
    layer = PackedLinear(256, 32, "Q4_K")
    layer.weight.data.random_(0, 60)
    model, x = torch.nn.Sequential(layer), torch.randn(3, 256)
    plain, expected = model(x), model(rounded(x, "Q4_K"))
    round_activations(model)
    assert torch.equal(model(x), expected) and not torch.equal(expected, plain)
    round_activations(model, enabled=False)
    assert torch.equal(model(x), plain)
