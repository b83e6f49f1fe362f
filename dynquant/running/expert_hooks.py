"""Sees inside fused mixture-of-experts layers: one experts implementation registered with transformers.

Fused experts are 3D parameters, so that no linear layer exists to hook. transformers routes every class decorated with
`use_experts_implementation` through `ALL_EXPERTS_FUNCTIONS`; inside `record_experts` that is `_recording_forward`,
which does the arithmetic of the models' eager loop in the same order and shows each expert's tensors to an observer.
Llama 4's experts stand outside it: their forward pass gets all tokens for every expert, zero where they are not routed,
and is replaced by one that sees which. Other experts and expert parallelism are refused.
"""

import inspect
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


@dataclass(frozen=True)
class ExpertLayout:
    """The parameters of a fused experts module, [E, rows, columns], or [E, columns, rows] if `is_transposed`."""

    is_transposed: bool
    has_gate: bool
    has_bias: bool = False
    gets_all_tokens: bool = False
    """True for Llama 4's forward pass, which gets [E T, C] with zeros in place of tokens that are not routed."""

    @property
    def up_name(self) -> str:
        """Name of the parameter that multiplies the common input."""
        return "gate_up_proj" if self.has_gate else "up_proj"


def expert_layout(module: nn.Module) -> ExpertLayout:
    """Return the layout of a module among `expert_modules`."""
    layout = _layout(module)
    assert layout is not None
    return layout


def is_fused_experts(module: nn.Module) -> bool:
    """Return whether a module holds routed experts as stacks of which the layout is known."""
    return _layout(module) is not None


def _layout(module: nn.Module) -> ExpertLayout | None:
    if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
        return ExpertLayout(bool(module.is_transposed), bool(module.has_gate), bool(getattr(module, "has_bias", False)))
    shapes = [tuple(getattr(getattr(module, name, None), "shape", ())) for name in ("gate_up_proj", "down_proj")]
    if list(inspect.signature(type(module).forward).parameters) != ["self", "hidden_states"]:
        return None
    (experts, columns, rows), down = shapes[0] if len(shapes[0]) == 3 else (0, 0, 0), shapes[1]
    is_llama4 = experts and down == (experts, rows // 2, columns)
    return ExpertLayout(is_transposed=True, has_gate=True, gets_all_tokens=True) if is_llama4 else None


def expert_modules(hf_model: nn.Module) -> dict[str, nn.Module]:
    """Name -> fused experts module, or raise StatsError for experts that cannot be observed."""
    experts = {}
    for name, module in hf_model.named_modules():
        if is_fused_experts(module):
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

    modules = expert_modules(hf_model).values()
    dense = [module for module in modules if expert_layout(module).gets_all_tokens]
    configs: dict[int, Any] = {id(module.config): module.config for module in modules if module not in dense}
    before = {key: config._experts_implementation for key, config in configs.items()}
    forwards = [module.__dict__.get("forward") for module in dense]
    other_observer = ALL_EXPERTS_FUNCTIONS.get(IMPLEMENTATION)
    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = partial(_recording_forward, observer)
    try:
        for config in configs.values():
            config._experts_implementation = IMPLEMENTATION
        for module in dense:
            module.__dict__["forward"] = partial(_recording_all_tokens, observer, module)
        yield
    finally:
        for module, forward in zip(dense, forwards, strict=True):
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward
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
    result, layout = torch.zeros_like(hidden), expert_layout(module)
    activate = module._apply_gate if layout.has_gate else module.act_fn
    for expert, slot, tokens in _routed(expert_ids):
        out = _run_expert(observer, module, layout, activate, (expert, hidden[tokens], tokens))
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
        out = out * weights[tokens, slot, None]
        result.index_add_(0, tokens, out.to(result.dtype))
    return result


def _recording_all_tokens(observer: ExpertObserver, module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute [E T, C] from inputs [E T, C] that are zero for tokens which are not routed to an expert."""
    layout = expert_layout(module)
    by_expert = hidden_states.view(module.down_proj.shape[0], -1, hidden_states.shape[-1])

    def activate(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return up * module.act_fn(gate)

    results = []
    for expert, x in enumerate(by_expert):
        tokens = x.detach().any(-1).nonzero().squeeze(-1)
        result = torch.zeros_like(x)
        if len(tokens):
            out = _run_expert(observer, module, layout, activate, (expert, x[tokens], tokens))
            result = result.index_copy(0, tokens, out.to(result.dtype))
        results.append(result)
    return torch.cat(results)


def _run_expert(
    observer: ExpertObserver,
    module: Any,
    layout: ExpertLayout,
    activate: Callable[[torch.Tensor], torch.Tensor],
    routed: tuple[int, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return what an expert makes of its tokens; `routed` is its number, their inputs and their places."""
    expert, x, tokens = routed
    gate_up_output = _linear(module, layout, layout.up_name, x, expert)
    down_input = activate(gate_up_output)
    out = _linear(module, layout, "down_proj", down_input, expert)
    observer(ExpertCall(module, expert, x, gate_up_output, down_input, out, tokens))
    return out


def _routed(expert_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield each expert that is used, by number, with the slots and tokens of expert ids [T, k] that name it."""
    # Sorted once: to look for each expert apart would wait for the GPU as often.
    ordered, places = expert_ids.T.flatten().sort(stable=True)
    numbers, counts = ordered.unique_consecutive(return_counts=True)
    for expert, part in zip(numbers.tolist(), places.split(counts.tolist()), strict=True):
        yield expert, part // len(expert_ids), part % len(expert_ids)


def _linear(module: Any, layout: ExpertLayout, name: str, x: torch.Tensor, expert: int) -> torch.Tensor:
    stack = getattr(module, name)
    if isinstance(stack, StoredExperts):
        out = stack.product(x, expert, is_transposed=layout.is_transposed)
    else:
        out = x @ stack[expert] if layout.is_transposed else functional.linear(x, stack[expert])
    return out + getattr(module, f"{name}_bias")[expert] if layout.has_bias else out
