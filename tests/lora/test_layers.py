"""The layers of adapters: routed products without decoded experts, and their dimensions."""

import copy

import pytest
import torch

from dynquant.packed.layers import PackedExperts
from tests.helpers.adapters import TOKENS, trainable

pytest.importorskip("peft", reason="peft is not installed")
from dynquant.lora import add_adapter, load_adapter
from dynquant.lora.layers import PackedLoraExperts, grouped_low_rank


def test_no_weight_of_the_experts_is_ever_made(model, saved):
    """PEFT's own way adds B A to the stack in every pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple | list) else [made]:
                if isinstance(one, torch.Tensor) and one.is_floating_point():
                    self.numel = max(self.numel, one.numel())
            return made

    adapted = load_adapter(copy.deepcopy(model), saved, is_trainable=True)
    experts = next(module for module in adapted.modules() if isinstance(module, PackedExperts))
    decoder = adapted.get_base_model().model  # logits are larger than a stack of this small model
    with Largest() as seen:
        decoder(TOKENS[:1, :16]).last_hidden_state.sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(decoder).values())
    stack = experts.num_experts * experts.hidden_dim * experts.intermediate_dim
    assert 0 < seen.numel < stack


@pytest.mark.parametrize("per_slot", [False, True], ids=["token", "slot"])
def test_grouped_products_equal_a_loop(per_slot):
    """Experts without slots, and ids of experts that other ranks hold."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, 16, generator=generator), torch.randn(5, 8, 3, generator=generator)
    ids = torch.tensor([[0, 4], [5, 0], [4, 2], [-1, 4], [2, 0], [0, 2], [4, 5]])
    x = torch.randn(7, 2, 16, generator=generator) if per_slot else torch.randn(7, 16, generator=generator)
    expected = torch.zeros(7, 2, 8)
    for token in range(7):
        for slot in range(2):
            expert = int(ids[token, slot])
            if 0 <= expert < 5:
                expected[token, slot] = b[expert] @ a[expert] @ (x[token, slot] if per_slot else x[token])
    torch.testing.assert_close(grouped_low_rank(x, ids, a, b), expected, atol=1e-5, rtol=1e-5)


def test_the_wrapper_of_an_experts_module_knows_its_dimensions(model):
    adapted = add_adapter(copy.deepcopy(model), rank=3, targets=())
    wrappers = [module for module in adapted.modules() if isinstance(module, PackedLoraExperts)]
    experts = wrappers[0].experts
    outer, inner = wrappers[:2]
    assert (outer.parameter_name, inner.parameter_name) == ("down_proj", "gate_up_proj")
    count, hidden, width = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    assert inner.lora_A["default"].weight.shape == (3 * count, hidden)
    assert inner.lora_B["default"].weight.shape == (2 * width, 3 * count)
    assert outer.lora_A["default"].weight.shape == (3 * count, width)
    assert outer.lora_B["default"].weight.shape == (hidden, 3 * count)
