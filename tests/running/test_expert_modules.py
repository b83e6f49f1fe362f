"""Every fused experts module of transformers that llama.cpp's converter knows as well is seen expert by expert."""

import copy
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dynquant.errors import StatsError
from dynquant.running.expert_hooks import ExpertCall, expert_layout, expert_modules, expert_stack, record_experts

NEEDS_SETTINGS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
    "hunyuan_v1_moe": {"head_dim": 64, "num_experts": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 0},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
}  # fmt: skip
"""What a model needs beside the defaults of its configuration, of which some have no experts."""


def registered(tree: Path) -> set[str]:
    """Names of architectures that llama.cpp's converter knows, in small letters."""
    calls = (re.findall(r"\.register\(([^)]*)\)", file.read_text()) for file in (tree / "conversion").glob("*.py"))
    return {name.lower() for call in calls for arguments in call for name in re.findall(r'"([^"]+)"', arguments)}


def models_with_experts(architectures: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield models of those architectures with experts, on the meta device in their default sizes, by model type."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = {
        **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    }  # fmt: skip
    for model_type, name in names.items():
        # A picture model's configuration has no sizes of its own for the text model alone, which has its own type.
        is_listed_apart = str(names.get(f"{model_type}_text")).lower() in architectures
        if not isinstance(name, str) or name.lower() not in architectures or is_listed_apart:
            continue
        model_class = getattr(transformers, name)
        if re.search(r"^class \w+Experts\b", Path(inspect.getfile(model_class)).read_text(), re.MULTILINE):
            with torch.device("meta"):
                model = model_class(CONFIG_MAPPING[model_type](**NEEDS_SETTINGS.get(model_type, {})))
            yield model_type, model


def smaller(module: Any) -> nn.Module:
    """Return experts of the same class with random weights."""
    config = copy.deepcopy(module.config)
    config._experts_implementation = "eager"
    for key, value in config.to_dict().items():
        if isinstance(value, int) and value > 32:
            setattr(config, key, 64 if key.startswith("hidden") else 32)
    made = type(module)(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


def check_recording(experts: nn.Module, shape: tuple[int, ...] = (24,)) -> None:
    """Experts compute what they do by themselves, and each shows its own inputs and outputs."""
    layout = expert_layout(experts)
    stacks = {name: expert_stack(experts, name) for name in (*layout.inner, layout.down)}
    stacks = {name: stack.transpose(1, 2) if name in layout.transposed else stack for name, stack in stacks.items()}
    count, hidden_size, width = stacks[layout.down].shape
    hidden = torch.randn(*shape, hidden_size)
    ids = torch.rand(24, count).topk(2).indices
    weights, calls = torch.rand(24, 2), []
    plain = experts(hidden, ids, weights)
    with record_experts(experts, calls.append):
        recorded = experts(hidden, ids, weights)
    torch.testing.assert_close(recorded.flatten(), plain.flatten(), atol=1e-5, rtol=1e-5)
    assert [call.expert for call in calls] == ids.unique().tolist()
    for call in calls:
        check_call(call, hidden.flatten(0, -2)[call.tokens], stacks, ids)
        assert call.down_input.shape[1] == width


def check_call(call: ExpertCall, x: torch.Tensor, stacks: dict[str, torch.Tensor], ids: torch.Tensor) -> None:
    """An expert's tokens are those that are routed to it, and its products those of its own matrices."""
    *inner, down = ((name, stack[call.expert]) for name, stack in stacks.items())
    assert torch.equal(call.x, x) and bool((ids[call.tokens] == call.expert).any(1).all())
    bias = getattr(call.module, "has_bias", False)
    outputs = [
        x @ matrix.T + (getattr(call.module, f"{name}_bias")[call.expert] if bias else 0) for name, matrix in inner
    ]
    torch.testing.assert_close(call.gate_up_output, torch.cat(outputs, -1), atol=1e-5, rtol=1e-5)
    expected = call.down_input @ down[1].T + (call.module.down_proj_bias[call.expert] if bias else 0)
    torch.testing.assert_close(call.down_output, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_experts_outside_transformers_interface_are_seen() -> None:
    from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
    from transformers.models.dbrx.modeling_dbrx import DbrxExperts
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts, Step3p7TextConfig

    dbrx = DbrxExperts(DbrxFFNConfig(hidden_size=64, ffn_hidden_size=32, moe_num_experts=4))
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4}
    step = Step3p7Experts(Step3p7TextConfig(**sizes), swiglu_limit=0.05)
    for experts, shape in ((dbrx, (2, 12)), (step, (24,))):
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.1)
        check_recording(experts, shape)


@pytest.mark.nightly
@torch.no_grad()
def test_every_module_that_the_converter_knows_is_seen(llama_cpp_tree: Path) -> None:
    faults, seen = {}, set()
    for model_type, model in models_with_experts(registered(llama_cpp_tree)):
        try:
            experts = next(iter(expert_modules(model).values()))
            if type(experts) not in seen and hasattr(experts, "config"):
                check_recording(smaller(experts))
            seen.add(type(experts))
        except (StatsError, StopIteration, AssertionError) as error:
            faults[model_type] = f"{type(error).__name__}: {error}"
    assert not faults
    assert len(seen) > 30
