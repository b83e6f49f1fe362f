"""Packed modules against dense ones with the decoded weights; their bytes in state_dict, in memory and in planes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from dynquant.errors import PlanError
from dynquant.formats import decode
from dynquant.kernels.planes import pack_planes
from dynquant.packed.layers import (
    PackedEmbedding,
    PackedExperts,
    PackedLatentProjection,
    PackedLinear,
    PackedModule,
    choose_layout,
    set_layout,
)
from dynquant.packed.places import FLOAT_DTYPES
from tests.helpers.packed_weights import packed_weights


def packed(type_name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Blocks of random weights, uint8 [..., row_bytes]; floats in a float type."""
    if type_name not in FLOAT_DTYPES:
        return packed_weights(type_name, *shape, seed=seed)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1).to(FLOAT_DTYPES[type_name])


def fill(module: PackedModule, **weights: torch.Tensor) -> PackedModule:
    module.load_state_dict(weights, strict=True)
    return module


@pytest.mark.parametrize("type_name", ["Q4_K", "IQ1_S", "Q8_0", "TQ2_0"])
def test_linear_multiplies_by_the_decoded_weight(type_name):
    blocks, bias = packed(type_name, 48, 512), torch.randn(48)
    layer = fill(PackedLinear(512, 48, type_name, bias=True), weight=blocks, bias=bias)
    x = torch.randn(2, 3, 512)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, decode(type_name, blocks), bias), atol=1e-4, rtol=1e-4)
    assert isinstance(layer, nn.Linear) and not layer.weight.requires_grad
    assert (layer.in_features, layer.out_features) == (512, 48)


def test_linear_gives_gradients_to_its_input_only():
    layer = fill(PackedLinear(256, 32, "Q2_K"), weight=packed("Q2_K", 32, 256))
    x = torch.randn(4, 256, requires_grad=True)
    layer(x).square().sum().backward()
    dense = decode("Q2_K", layer.weight)
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ dense.T) @ dense, atol=1e-4, rtol=1e-4)
    assert layer.weight.grad is None


def test_embedding_decodes_the_rows_it_is_asked_for():
    blocks = packed("IQ4_NL", 100, 64)
    layer = fill(PackedEmbedding(100, 64, "IQ4_NL", scale=8.0), weight=blocks)
    ids = torch.tensor([[3, 99, 3], [0, 50, 7]])
    assert torch.equal(layer(ids), 8 * decode("IQ4_NL", blocks)[ids])
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half(ids).dtype == torch.bfloat16 and half.weight.dtype == torch.uint8


@pytest.mark.parametrize(
    "types", [("Q2_K", "IQ3_XXS", "Q4_K"), ("Q8_0", "F16", "Q4_0"), ("F32", "F32", "BF16")], ids="-".join
)
def test_experts_equal_a_loop_over_dense_experts(types):
    names, (experts, hidden, width) = ("gate_proj", "up_proj", "down_proj"), (4, 256, 256)
    blocks = {name: packed(t, experts, 256, 256, seed=i) for i, (name, t) in enumerate(zip(names, types, strict=True))}
    module = fill(PackedExperts((experts, hidden, width), dict(zip(names, types, strict=True)), silu), **blocks)
    dense = {name: module.dense(name, torch.float32) for name in names}
    x, weights = torch.randn(7, hidden), torch.rand(7, 2)
    ids = torch.tensor([[0, 1], [1, 0], [0, 3], [3, 1], [1, 3], [0, 1], [3, 0]])  # expert 2 gets nothing
    expected = torch.zeros_like(x)
    for token in range(7):
        for slot in range(2):
            gate, up, down = (dense[name][ids[token, slot]] for name in names)
            expected[token] += weights[token, slot] * ((silu(x[token] @ gate.T) * (x[token] @ up.T)) @ down.T)
    torch.testing.assert_close(module(x, ids, weights), expected, atol=1e-4, rtol=1e-4)


def test_experts_use_the_models_own_gate():
    module = PackedExperts(
        (2, 32, 32), dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "F32"), silu,
        apply_gate=lambda self, gate_up: gate_up.chunk(2, dim=-1)[1],
    )  # fmt: skip
    eye = torch.eye(32).expand(2, 32, 32).clone()
    fill(module, gate_proj=eye, up_proj=eye, down_proj=eye)
    x = torch.randn(3, 32)
    torch.testing.assert_close(module(x, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)), x)


@pytest.mark.parametrize("types", [("Q4_0", "Q8_0"), ("F16", "Q5_1")], ids="-".join)
def test_latent_projection_equals_the_whole_matrix(types):
    heads, rank, nope, value = 3, 64, 32, 48
    blocks = {"k_b": packed(types[0], heads, rank, nope), "v_b": packed(types[1], heads, value, rank)}
    module = PackedLatentProjection(rank, heads, nope, value, dict(zip(("k_b", "v_b"), types, strict=True)))
    fill(module, **blocks)
    k_b, v_b = module.dense("k_b", torch.float32), module.dense("v_b", torch.float32)
    whole = torch.cat([k_b.transpose(1, 2), v_b], dim=1).reshape(-1, rank)
    x = torch.randn(2, 5, rank)
    torch.testing.assert_close(module(x), x @ whole.T, atol=1e-5, rtol=1e-4)
    assert isinstance(module, nn.Linear) and module.out_features == heads * (nope + value)


def test_planes_compute_the_same_and_leave_state_dict_as_it_was():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = PackedEmbedding(64, 256, "Q4_K"), PackedLinear(256, 64, "Q4_K")
            self.head.weight = self.embedding.weight

    model, blocks = Tied(), packed("Q4_K", 64, 256)
    model.load_state_dict({"embedding.weight": blocks, "head.weight": blocks})
    x, ids = torch.randn(3, 256), torch.tensor([1, 63])
    before = model.head(x), model.embedding(ids)
    set_layout(model, "planes")
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, pack_planes("Q4_K", blocks)) and not torch.equal(model.head.weight, blocks)
    torch.testing.assert_close(model.head(x), before[0])
    assert all(torch.equal(tensor, blocks) for tensor in model.state_dict().values())
    other = packed("Q4_K", 64, 256, seed=1)
    model.load_state_dict({"embedding.weight": other, "head.weight": other})
    assert torch.equal(model.head.weight, pack_planes("Q4_K", other))
    choose_layout(model)
    assert torch.equal(model.head.weight, other) and model.head.layout == "blocks"


def test_casting_a_module_leaves_its_bytes():
    layer = fill(PackedLinear(256, 8, "Q6_K", bias=True), weight=packed("Q6_K", 8, 256), bias=torch.zeros(8))
    before = layer.weight.clone()
    layer.to(torch.bfloat16).half()
    assert torch.equal(layer.weight, before) and layer.bias.dtype == torch.float16


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="250 is not a multiple of the block size 256 of Q4_K"):
        PackedLinear(250, 8, "Q4_K")
    with pytest.raises(PlanError, match="Q9_X"):
        PackedLinear(256, 8, "Q9_X")
    with pytest.raises(ValueError, match="layout"):
        set_layout(nn.Module(), "rows")
