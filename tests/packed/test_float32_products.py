"""Products by float16 parts: as exact as float32 where sums are rounded, for packed weights too."""

import pytest
import torch
from torch import nn

from dynquant.packed import float32_products
from dynquant.packed.float32_products import linear, multiply_by_parts
from dynquant.packed.layers import PackedLinear
from dynquant.running.load import tf32_products


@pytest.mark.parametrize("is_short", [True, False])
@pytest.mark.parametrize("spread", [0, 2])
def test_parts_are_as_exact_as_float32(is_short: bool, spread: int, monkeypatch) -> None:
    monkeypatch.setattr(float32_products, "_SLICE_ELEMENTS", 100 * 768)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 768, generator=generator), 0.02 * torch.randn(260, 768, generator=generator)
    x *= torch.logspace(-spread, spread, 768) * torch.logspace(-20, 20, 100)[:, None]  # channels and tokens differ
    if is_short:
        weight = weight.bfloat16().float()
    exact = x.double() @ weight.double().T
    scale = exact.std(1, keepdim=True)
    found = linear(x[None], weight, is_short=is_short)[0]
    assert ((found - exact) / scale).std() < 1.5 * ((x @ weight.T - exact) / scale).std()


def test_zeros_and_what_is_not_finite_stay() -> None:
    x = torch.zeros(3, 64)
    x[1, 5], x[2, 5] = float("inf"), float("nan")
    found = linear(x, torch.randn(7, 64))
    assert torch.equal(found[0], torch.zeros(7))
    assert not found[1:].isfinite().any()


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_tensor_cores_lose_little_to_cut_off_sums_and_far_less_than_tf32() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 1536, generator=generator), 0.02 * torch.randn(520, 1536, generator=generator)
    exact = (x.double() @ weight.double().T).cuda()
    x, weight = x.cuda(), weight.cuda()
    error = (linear(x, weight) - exact).std()
    assert error < 4e-6 * exact.std()  # 2.6e-7 in float32
    with tf32_products("cuda"):
        assert error < (x @ weight.T - exact).std() / 50
    layer = nn.Linear(1536, 520, bias=False).cuda()
    layer.weight.data = weight
    float32_products.use_tensor_cores(layer)
    with torch.inference_mode():
        assert torch.equal(layer(x), linear(x, weight))
