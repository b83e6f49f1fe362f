"""Trained tensors of the closing pass: numbers of a quantized file that have no codes, so that they cost no byte.

These are scales of groups, or scales and minimums of super-blocks, and what is stored in floats: norms, biases, routers
and the corrections that decide which experts a router takes. Each tensor has a `parameter`, which is written into the
running model by `apply` and gets its gradient from it by `pull_gradient`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.exporters.tuning.interface import SCALES, QuantizedFile
from dynquant.running.expert_hooks import expert_layout, is_fused_experts
from dynquant.running.live_weights import LiveWeights

Routes = dict[int, Tensor]
"""Layer -> numbers of the experts that every token went to, [T, k]."""


class Tunable(Protocol):
    """A tensor of the file that is trained; `rate` is the step of its `parameter`."""

    parameter: Tensor
    rate: float

    def apply(self, *, as_stored: bool = False) -> None:
        """Write what `parameter` stands for into the model, rounded if it is to be `as_stored`."""

    def pull_gradient(self) -> None: ...

    def stored(self) -> dict[str, Tensor]:
        """Return what is written to the file, by the names that it has there."""


class Scales:
    """The scales of one tensor; `parameter` [blocks, count] are the factors on them."""

    def __init__(self, live: LiveWeights, file: QuantizedFile, name: str, original: Tensor) -> None:
        self._live, self._file, self._name = live, file, name
        self._scales, self._parts = file.scaled(name, original.device)
        self.parameter = torch.ones_like(self._scales)
        self.apply()
        self.relative_error = _relative_error(live.read(name), original)
        self.rate = 0.0

    def apply(self, *, as_stored: bool = False) -> None:
        factors = self.parameter
        if as_stored:
            is_zero = self._scales == 0
            factors = self._file.rounded(self._name, self._numbers()) / self._scales.masked_fill(is_zero, 1)
        self._live.write(self._name, (self._parts * factors.unsqueeze(-1)).sum(1))

    def pull_gradient(self) -> None:
        gradient = self._live.gradient(self._name).reshape(len(self._parts), 1, -1)
        self.parameter.grad = (gradient * self._parts).sum(-1)

    def stored(self) -> dict[str, Tensor]:
        return self._file.stored(self._name, self._numbers())

    def _numbers(self) -> Tensor:
        return self._scales * self.parameter


class Values:
    """The values of one tensor that is stored in floats: its `parameter`, which moves by `rate` of their size."""

    def __init__(self, live: LiveWeights, file: QuantizedFile, name: str, rate: float) -> None:
        self._live, self._file, self._name = live, file, name
        self.parameter = live.read(name).float()
        self.rate = rate * float(self.parameter.square().mean().sqrt())

    def apply(self, *, as_stored: bool = False) -> None:
        self._live.write(self._name, self._file.rounded(self._name, self.parameter) if as_stored else self.parameter)

    def pull_gradient(self) -> None:
        self.parameter.grad = self._live.gradient(self._name).float().view_as(self.parameter)

    def stored(self) -> dict[str, Tensor]:
        return self._file.stored(self._name, self.parameter)


class Correction(Values):
    """Values that are added to a router's scores only to choose experts, so that they have no gradient: the share of
    tokens that an expert got too many, against the original on the same text, stands for it, by the perceptron's rule.
    """

    def __init__(self, live: LiveWeights, file: QuantizedFile, name: str, rate: float, routes: Routes) -> None:
        super().__init__(live, file, name, rate)
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


def trained_kinds(live: LiveWeights, file: QuantizedFile, rates: Mapping[str, float]) -> dict[str, str]:
    """Return what of a file has a rate in `rates`, by name: scales, norms, biases or routers; nothing without quantized
    tensors, whose error is the measure of all rates."""
    names = _names_in(live, file)
    kinds = {name: file.kind(name) for name in names}
    kinds = {
        name: kind
        for name, kind in kinds.items()
        if rates.get(kind) and (name not in live.buffers or kind == "routers")
    }
    return kinds if any(map(file.is_quantized, names)) else {}


def install(live: LiveWeights, file: QuantizedFile, rates: Mapping[str, float], routes: Routes) -> dict[str, Tunable]:
    """Put the file's weights into the model; returns what can be trained. Parameters without a use stay frozen.

    Args:
        rates: of `scales`, `norms`, `biases` and `routers`, as shares of the relative error that quantization made;
            what has none stays as it is.
    """
    kinds, scales = trained_kinds(live, file, rates), dict[str, Scales]()
    errors: dict[str, tuple[float, int]] = {}
    for name in _names_in(live, file):
        original = live.read(name)
        if kinds.get(name) == SCALES:
            scales[name] = Scales(live, file, name, original)
            scales[name].rate = file.pace * rates[SCALES] * scales[name].relative_error
            errors[name] = (scales[name].relative_error, original.numel())
            continue
        values = file.load(name).to(original.device)
        if file.is_quantized(name):
            errors[name] = (_relative_error(values, original), original.numel())
        live.write(name, values)
    mean_error = sum(error * size for error, size in errors.values()) / max(1, sum(size for _, size in errors.values()))
    trained: dict[str, Tunable] = {}
    for name, kind in kinds.items():
        rate = rates[kind] * mean_error
        if kind == SCALES:
            trained[name] = scales[name]
        elif name not in live.buffers:
            trained[name] = Values(live, file, name, rate)
        elif layer_of(name) in routes:
            trained[name] = Correction(live, file, name, rate, routes)
    return trained


def _names_in(live: LiveWeights, file: QuantizedFile) -> list[str]:
    places = live.buffers.union(live.names())
    return [name for name in file.names() if name in places]


def _relative_error(values: Tensor, original: Tensor) -> float:
    return float((values.view_as(original) - original).norm() / original.norm().clamp_min(1e-12))  # zeros have none
