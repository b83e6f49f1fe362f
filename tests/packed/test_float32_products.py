"""Products by bfloat16 parts: as exact as float32, for packed weights too."""

import pytest
import torch
from torch import nn

from dynquant.packed import float32_products
from dynquant.packed.float32_products import linear, multiply_by_parts
from dynquant.packed.layers import PackedLinear


@pytest.mark.parametrize("is_bfloat16", [True, False])
def test_parts_are_as_exact_as_float32(is_bfloat16: bool, monkeypatch) -> None:
    monkeypatch.setattr(float32_products, "_SLICE_ELEMENTS", 100 * 768)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 768, generator=generator) * torch.logspace(-6, 3, 768) for n in (100, 260))
    if is_bfloat16:
        weight = weight.bfloat16().float()
    exact = x.double() @ weight.double().T
    found = linear(x[None], weight, is_bfloat16=is_bfloat16)[0]
    assert (found - exact).std() < 1.5 * (x @ weight.T - exact).std()


def test_layers_multiply_by_parts_without_gradients() -> None:
    x = torch.randn(2, 80, 256, generator=torch.Generator().manual_seed(0))
    packed = PackedLinear(256, 96, "Q8_0")
    packed.weight.data = torch.randint(0, 60, packed.weight.shape, dtype=torch.uint8)
    for layer in (nn.Linear(256, 96), packed):
        expected = layer(x).detach()
        multiply_by_parts(layer)
        assert torch.equal(layer(x), expected)  # gradients are asked for
        with torch.inference_mode():
            found = layer(x)
            few = layer(x[0, :3])
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        torch.testing.assert_close(few, expected[0, :3], rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
