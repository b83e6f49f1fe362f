"""Sees inside fused mixture-of-experts layers: one experts implementation registered with transformers.

Fused experts are 3D parameters, so that no linear layer exists to hook. transformers routes every class decorated with
`use_experts_implementation` through `ALL_EXPERTS_FUNCTIONS`; inside `record_experts` that is `_recording_forward`,
which does the arithmetic of the models' eager loop in the same order and shows each expert's tensors to an observer.
Classes outside it have their forward pass replaced: those that are called alike (Step 3.7, DBRX), and Llama 4's, which
gets all tokens for every expert, zero where they are not routed. Other experts and expert parallelism are refused.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
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
    """The parameters of a fused experts module: `inner` multiply the common input, `down` what becomes of it.

    Each is a stack [E, rows, columns], or [E, columns, rows] if it is among `transposed`.
    """

    inner: tuple[str, ...]
    down: str = "down_proj"
    transposed: tuple[str, ...] = ()
    has_bias: bool = False
    gets_all_tokens: bool = False
    """True for Llama 4's forward pass, which gets [E T, C] with zeros in place of tokens that are not routed."""


def expert_layout(module: nn.Module) -> ExpertLayout:
    """Return the layout of a module among `expert_modules`."""
    layout = _layout(module)
    assert layout is not None
    return layout


def is_fused_experts(module: nn.Module) -> bool:
    """Return whether a module holds routed experts as stacks of which the layout is known."""
    return _layout(module) is not None


def expert_stack(module: Any, name: str) -> torch.Tensor:
    """Return a parameter of the layout as [E, ...], which DBRX stores as the rows of all experts."""
    stack = attrgetter(name)(module)
    return stack if len(stack.shape) == 3 else stack.unflatten(0, (module.num_experts, -1))


def _layout(module: Any) -> ExpertLayout | None:
    if _is_dispatched(module):
        inner = "gate_up_proj" if module.has_gate else "up_proj"
        transposed = (inner, "down_proj") if module.is_transposed else ()
        return ExpertLayout((inner,), transposed=transposed, has_bias=bool(getattr(module, "has_bias", False)))
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if arguments not in (["hidden_states"], ["hidden_states", "top_k_index", "top_k_weights"]):
        return None
    parameters = [name for name, _ in module.named_parameters()]
    if parameters == ["mlp.w1", "mlp.v1", "mlp.w2"]:  # DBRX
        return ExpertLayout(("mlp.w1", "mlp.v1"), "mlp.w2", transposed=("mlp.w2",))
    if parameters != ["gate_up_proj", "down_proj"] or len(module.gate_up_proj.shape) != 3:
        return None
    layout = ExpertLayout(("gate_up_proj",), gets_all_tokens=len(arguments) == 1)
    experts, rows, columns = module.gate_up_proj.shape
    if tuple(module.down_proj.shape) == (experts, columns // 2, rows):
        return replace(layout, transposed=("gate_up_proj", "down_proj"))
    return layout if tuple(module.down_proj.shape) == (experts, columns, rows // 2) else None


def _is_dispatched(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


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
    others = [module for module in modules if not _is_dispatched(module)]
    configs: dict[int, Any] = {id(module.config): module.config for module in modules if module not in others}
    before = {key: config._experts_implementation for key, config in configs.items()}
    forwards = [module.__dict__.get("forward") for module in others]
    other_observer = ALL_EXPERTS_FUNCTIONS.get(IMPLEMENTATION)
    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = partial(_recording_forward, observer)
    try:
        for config in configs.values():
            config._experts_implementation = IMPLEMENTATION
        for module in others:
            replacement = _recording_all_tokens if expert_layout(module).gets_all_tokens else _recording_forward
            module.__dict__["forward"] = partial(replacement, observer, module)
        yield
    finally:
        for module, forward in zip(others, forwards, strict=True):
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
    result = torch.zeros_like(hidden).flatten(0, -2)
    rows = hidden.flatten(0, -2)  # DBRX's come as [B, T, C]
    for expert, slot, tokens in _routed(expert_ids):
        call = call_expert(module, expert, rows[tokens], tokens)
        observer(call)
        out = call.down_output
        if getattr(module, "has_post_expert_norm", False):
            out = module.post_expert_norm(out)
        out = out * weights[tokens, slot, None]
        result.index_add_(0, tokens, out.to(result.dtype))
    return result.view_as(hidden)


def _recording_all_tokens(observer: ExpertObserver, module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute [E T, C] from inputs [E T, C] that are zero for tokens which are not routed to an expert."""
    by_expert = hidden_states.view(module.down_proj.shape[0], -1, hidden_states.shape[-1])
    results = []
    for expert, x in enumerate(by_expert):
        tokens = x.detach().any(-1).nonzero().squeeze(-1)
        result = torch.zeros_like(x)
        if len(tokens):
            call = call_expert(module, expert, x[tokens], tokens)
            observer(call)
            result = result.index_copy(0, tokens, call.down_output.to(result.dtype))
        results.append(result)
    return torch.cat(results)


def call_expert(module: Any, expert: int, x: torch.Tensor, tokens: torch.Tensor) -> ExpertCall:
    """Run one expert on `x` [T, C], wherever a router would send it."""
    layout = expert_layout(module)
    products = [_linear(module, layout, name, x, expert) for name in layout.inner]
    gate_up_output = products[0] if len(products) == 1 else torch.cat(products, -1)
    down_input = _activated(module, gate_up_output)
    out = _linear(module, layout, layout.down, down_input, expert)
    return ExpertCall(module, expert, x, gate_up_output, down_input, out, tokens)


def _activated(module: Any, gate_up: torch.Tensor) -> torch.Tensor:
    if not getattr(module, "has_gate", True):
        return module.act_fn(gate_up)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return (module.act_fn if hasattr(module, "act_fn") else module.mlp.activation_fn)(gate) * up


def _routed(expert_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield each expert that is used, by number, with the slots and tokens of expert ids [T, k] that name it."""
    # Sorted once: to look for each expert apart would wait for the GPU as often.
    ordered, places = expert_ids.T.flatten().sort(stable=True)
    numbers, counts = ordered.unique_consecutive(return_counts=True)
    for expert, part in zip(numbers.tolist(), places.split(counts.tolist()), strict=True):
        yield expert, part // len(expert_ids), part % len(expert_ids)


def _linear(module: Any, layout: ExpertLayout, name: str, x: torch.Tensor, expert: int) -> torch.Tensor:
    stack, is_transposed = expert_stack(module, name), name in layout.transposed
    if isinstance(stack, StoredExperts):
        out = stack.product(x, expert, is_transposed=is_transposed)
    else:
        out = x @ stack[expert] if is_transposed else functional.linear(x, stack[expert])
    return out + getattr(module, f"{name}_bias")[expert] if layout.has_bias else out
