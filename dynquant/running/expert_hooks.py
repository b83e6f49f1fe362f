"""Sees inside fused mixture-of-experts layers: one experts implementation registered with transformers.

Fused experts are 3D parameters, so that no linear layer exists to hook. transformers routes every class decorated with
`use_experts_implementation` through `ALL_EXPERTS_FUNCTIONS`; inside `record_experts` that is `_recording_forward`,
which does the arithmetic of the models' eager loop in the same order and shows each expert's tensors to an observer.
Left out: experts outside that interface (Llama 4, DBRX, JetMoe) and expert parallelism; both are refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dynquant.errors import StatsError
from dynquant.running.stored_experts import StoredExperts

IMPLEMENTATION = "dynquant_recording"


@dataclass(frozen=True)
class ExpertCall:
    """Inputs and outputs of one expert of a layer for the T tokens that were routed to it; F is its width."""

    module: nn.Module
    expert: int
    x: torch.Tensor  # [T, C]
    gate_up_output: torch.Tensor  # [T, 2 F], or [T, F] without a gate
    down_input: torch.Tensor  # [T, F]
    down_output: torch.Tensor  # [T, C]
    tokens: torch.Tensor  # [T] indices into the batch


ExpertObserver = Callable[[ExpertCall], None]


def expert_modules(hf_model: nn.Module) -> dict[str, nn.Module]:
    """Name -> fused experts module, or raise StatsError for experts beside transformers' experts interface."""
    experts = {}
    for name, module in hf_model.named_modules():
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            experts[name] = module
            continue
        holds_stack = any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
        is_expert_list = isinstance(module, nn.ModuleList) and name.endswith("experts") and len(module) > 0
        if is_expert_list or (holds_stack and "expert" in f"{name} {type(module).__name__}".lower()):
            raise StatsError(
                f"{name} is a {type(module).__name__}, which transformers does not run through its experts interface, "
                "so the inputs of single experts cannot be seen. Measure an importance matrix with llama-imatrix and "
                "import it with `dynquant calibrate MODEL --imatrix FILE`."
            )
    return experts


@contextmanager
def record_experts(hf_model: nn.Module, observer: ExpertObserver) -> Iterator[None]:
    """Run all fused experts eagerly and call `observer` for every expert that gets tokens.

    Logits are bit-equal to those of `experts_implementation="eager"`. The former implementation is restored at exit; it
    may be that of another observer, who sees nothing meanwhile.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    configs: dict[int, Any] = {id(module.config): module.config for module in expert_modules(hf_model).values()}
    before = {key: config._experts_implementation for key, config in configs.items()}
    other_observer = ALL_EXPERTS_FUNCTIONS.get(IMPLEMENTATION)
    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = partial(_recording_forward, observer)
    try:
        for config in configs.values():
            config._experts_implementation = IMPLEMENTATION
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        if other_observer is None:
            del ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION]
        else:
            ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = other_observer


def _recording_forward(observer: ExpertObserver, module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Compute the sum over the k experts of every token from hidden [T, C], expert ids [T, k] and weights [T, k]."""
    # Argument names differ between model classes, their order does not.
    hidden, expert_ids, weights = (*args, *kwargs.values())
    if getattr(module, "_is_expert_parallel", False):
        raise StatsError("Calibration cannot see experts under expert parallelism; load the model without it.")
    result = torch.zeros_like(hidden)
    for expert, slot, tokens in _routed(expert_ids):
        x = hidden[tokens]
        gate_up_output = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", x, expert)
        activate = module._apply_gate if module.has_gate else module.act_fn
        down_input = activate(gate_up_output)
        out = _linear(module, "down_proj", down_input, expert)
        observer(ExpertCall(module, expert, x, gate_up_output, down_input, out, tokens))
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
        out = out * weights[tokens, slot, None]
        result.index_add_(0, tokens, out.to(result.dtype))
    return result


def _routed(expert_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield each expert that is used, by number, with the slots and tokens of expert ids [T, k] that name it."""
    # Sorted once: to look for each expert apart would wait for the GPU as often.
    ordered, places = expert_ids.T.flatten().sort(stable=True)
    numbers, counts = ordered.unique_consecutive(return_counts=True)
    for expert, part in zip(numbers.tolist(), places.split(counts.tolist()), strict=True):
        yield expert, part // len(expert_ids), part % len(expert_ids)


def _linear(module: Any, name: str, x: torch.Tensor, expert: int) -> torch.Tensor:
    stack = getattr(module, name)
    if isinstance(stack, StoredExperts):
        out = stack.product(x, expert)
    else:
        out = x @ stack[expert] if module.is_transposed else functional.linear(x, stack[expert])
    return out + getattr(module, f"{name}_bias")[expert] if module.has_bias else out
