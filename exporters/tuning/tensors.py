"""Trained tensors of the closing pass: numbers of a quantized file that have no codes, so that they cost no byte.

These are the fp16 scales and minimums of super-blocks, and what is stored in F32: norms, biases, routers and the
corrections that decide which experts a router takes. Each tensor has a `parameter`, which is written into the running
model by `apply` and gets its gradient from it by `pull_gradient`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.tensor_roles import Role, layer_of, role_of
from dynquant.formats import decode
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.formats.scale_fields import num_scales, read_scales, with_scales
from dynquant.running.expert_hooks import expert_layout, is_fused_experts
from dynquant.running.live_weights import LiveWeights

Routes = dict[int, Tensor]
"""Layer -> numbers of the experts that every token went to, [T, k]."""


class Tunable(Protocol):
    """A tensor of the file that is trained; `rate` is the step of its `parameter`."""

    parameter: Tensor
    rate: float

    def apply(self) -> None: ...

    def pull_gradient(self) -> None: ...

    def packed(self) -> Tensor: ...


class Scales:
    """The fp16 numbers of one tensor; `parameter` [blocks, count] are the factors on them."""

    def __init__(self, live: LiveWeights, name: str, type_name: str, packed: Tensor, rate: float) -> None:
        self._live, self._name, self._type, self._shape = live, name, type_name, packed.shape
        original = live.read(name)
        self._blocks = packed.reshape(-1, QUANT_TYPES[type_name].block_bytes)
        blocks = self._blocks.to(original.device)
        stored = read_scales(type_name, blocks)  # [blocks, count]
        alone = [stored * keep for keep in torch.eye(stored.shape[1], device=blocks.device)]
        parts = [decode(type_name, with_scales(type_name, blocks, scales)) for scales in alone]
        self._parts = torch.stack(parts, dim=1)  # [blocks, count, block_size]
        self.parameter = torch.ones(stored.shape, device=original.device)
        decoded = self._parts.sum(1).view_as(original)
        self.relative_error = float((decoded - original).norm() / original.norm().clamp_min(1e-12))  # zeros have none
        self.num_weights = original.numel()
        self.rate = rate * self.relative_error

    def apply(self) -> None:
        self._live.write(self._name, (self._parts * self.parameter.unsqueeze(-1)).sum(1))

    def pull_gradient(self) -> None:
        gradient = self._live.gradient(self._name).reshape(len(self._parts), 1, -1)
        self.parameter.grad = (gradient * self._parts).sum(-1)

    def packed(self) -> Tensor:
        scales = read_scales(self._type, self._blocks) * self.parameter.cpu()
        return with_scales(self._type, self._blocks, scales).reshape(self._shape)


class Values:
    """The values of one tensor that is stored in F32, which are its `parameter`; they move by `rate` of their size."""

    def __init__(self, live: LiveWeights, name: str, rate: float) -> None:
        self._live, self._name = live, name
        self.parameter = live.read(name).float()
        self.rate = rate * float(self.parameter.square().mean().sqrt())

    def apply(self) -> None:
        self._live.write(self._name, self.parameter)

    def pull_gradient(self) -> None:
        self.parameter.grad = self._live.gradient(self._name).float().view_as(self.parameter)

    def packed(self) -> Tensor:
        return self.parameter.cpu().view(torch.uint8)


class Correction(Values):
    """Values that are added to a router's scores only to choose experts, so that they have no gradient: the share of
    tokens that an expert got too many, against the original on the same text, stands for it, by the perceptron's rule.
    """

    def __init__(self, live: LiveWeights, name: str, rate: float, routes: Routes) -> None:
        super().__init__(live, name, rate)
        self._routes = routes
        self.expected: Routes = {}

    def pull_gradient(self) -> None:
        layer = layer_of(self._name)
        assert layer is not None
        ours, theirs = (
            torch.bincount(ids.long().flatten(), minlength=self.parameter.numel())
            for ids in (self._routes[layer], self.expected[layer].to(self._routes[layer].device))
        )
        self.parameter.grad = ((ours - theirs) / ours.sum()).float().view_as(self.parameter)


@contextmanager
def recorded_routes(hf_model: nn.Module) -> Iterator[Routes]:
    """Context manager: yields where routers sent the tokens of the latest forward pass, for fused experts."""
    routes: Routes = {}

    def record(layer: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routes[layer] = (*args, *kwargs.values())[1].detach()

    with ExitStack() as hooks:
        for name, module in hf_model.named_modules():
            number = re.search(r"\.(\d+)\.", name)
            if number and is_fused_experts(module) and not expert_layout(module).gets_all_tokens:
                hook = lambda *call, layer=int(number[1]): record(layer, *call)  # noqa: E731
                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield routes


def share_changed(before: Routes, after: Routes) -> float:
    """Return the share of tokens, over all layers, that went to other experts."""
    changed = [(before[layer].sort(-1).values != after[layer].sort(-1).values).any(-1) for layer in before]
    return float(torch.cat(changed).double().mean()) if changed else 0.0


def trained_kinds(live: LiveWeights, file: GGUFSource, rates: Mapping[str, float]) -> dict[str, str]:
    """Return what of a file has a rate in `rates`, by name: scales, norms, biases or routers; nothing without scales,
    whose error is the measure of all rates."""
    kinds, places = {}, live.buffers.union(live.names())
    stored = {name: file.info(name).dtype for name in file.names() if name in places}
    for name, type_name in stored.items():
        kind = {Role.NORM: "norms", Role.ROUTER: "routers"}.get(role_of(name), "biases" * name.endswith(".bias"))
        kind = "scales" if num_scales(type_name) else kind if type_name == "F32" else ""
        if rates.get(kind) and (name not in live.buffers or kind == "routers"):
            kinds[name] = kind
    return kinds if any(map(num_scales, stored.values())) else {}


def install(live: LiveWeights, file: GGUFSource, rates: Mapping[str, float], routes: Routes) -> dict[str, Tunable]:
    """Put the file's weights into the model; returns what can be trained. Parameters without a use stay frozen.

    Args:
        rates: of `scales`, `norms`, `biases` and `routers`, as shares of the relative error that quantization made;
            what has none stays as it is.
    """
    scales: dict[str, Scales] = {}
    places = live.buffers.union(live.names())
    for name in (name for name in file.names() if name in places):
        stored = file.info(name).dtype
        if num_scales(stored):
            scales[name] = Scales(live, name, stored, file.load_packed(name), rates.get("scales", 0.0))
            scales[name].apply()
        else:
            live.write(name, file.load(name))
    weights = sum(tensor.num_weights for tensor in scales.values())
    mean_error = sum(tensor.relative_error * tensor.num_weights for tensor in scales.values()) / max(1, weights)
    trained: dict[str, Tunable] = {}
    for name, kind in trained_kinds(live, file, rates).items():
        rate = rates[kind] * mean_error
        if kind == "scales":
            trained[name] = scales[name]
        elif name not in live.buffers:
            trained[name] = Values(live, name, rate)
        elif layer_of(name) in routes:
            trained[name] = Correction(live, name, rate, routes)
    return trained
