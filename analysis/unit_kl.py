"""Unit KL at the operating point: what one step of one group of tensors is worth, measured end to end.

Closed forms are blind to routing flips and to how errors add up at 1-2 bits. Here the model has the weights of a plan
near the budget, and one group at a time (a layer's attention, its shared expert, its routed gate and up projections,
its routed down projections) moves to the next more precise type and to the next smaller one; the change of the mean KL
on held-in text is that step's worth. Only layers from the group's own on run again. Measuring at the operating point
rather than from the original is exllamav3's idea; the groups are PrismaQuant's.

`prices_from` turns steps into a price for every tensor and type. With c the cost by which the plan was made and T its
type,

    price(t) = price(T) + r (c(t) - c(T)),   r = measured change / change of c in the group's step

with one r for types above T and one for those below; each leans on the mean r of its direction in the measure of its
noise. price(T) shares the plan's measured KL out in proportion to c(T), so that prices sum to that KL at the plan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from dynquant.allocate import Option, lower_hull
from dynquant.analysis.error_table import ErrorTable, Price
from dynquant.architecture import layer_of, role_of
from dynquant.eval_statistics import block_sums
from dynquant.rendered_model import RenderedModel

Progress = Callable[[str, int, int], None]

_SPREAD = 0.5
"""How far a group's r is expected to lie from the mean one, as a share of it."""
_LEAST = 0.1
"""No step is taken for worth less than this share of the mean r: noise must not make bytes free."""


class UnitStep(BaseModel):
    """One group moved one step from a plan. `kl_change` is in nats per token, with the standard error of 64-token
    blocks; `predicted_change` is that of the table's costs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    group: str
    direction: Literal["up", "down"]
    types: dict[str, tuple[str, str]]
    """Tensor -> type in the plan, type in this step."""
    kl_change: float
    kl_change_se: float
    predicted_change: float


@dataclass(frozen=True)
class OperatingPoint:
    """A plan's types, its KL in nats per token on the measured text, and the steps around it."""

    types: Mapping[str, str]
    kl: float
    steps: tuple[UnitStep, ...]


def group_of(name: str) -> str:
    """The tensors of a layer that are moved together; tensors outside the layers stand alone."""
    layer, role = layer_of(name), role_of(name)
    if layer is None:
        return name
    if role.is_routed_expert:
        return f"blk.{layer}.experts_{'down' if role.is_down_projection else 'gate_up'}"
    part = "attention" if role.is_attention else "shared_expert" if role.is_shared_expert else "ffn"
    return f"blk.{layer}.{part}"


def measure_steps(
    rendered: RenderedModel, table: ErrorTable, types: Mapping[str, str], *, progress: Progress | None = None
) -> OperatingPoint:
    """Install a plan (stored type of every tensor in the table) and measure every group's step up and down."""
    rendered.install(types)
    plain, _ = rendered.score()
    wanted = [(group, direction, changes) for group, by in _steps(table, types).items() for direction, changes in by]
    steps = []
    for index, (group, direction, changes) in enumerate(wanted):
        moved = rendered.divergences_with({name: to for name, (_, to) in changes.items()})
        change, error = _paired(moved.numpy() - plain.numpy(), rendered.window_lengths)
        steps.append(
            UnitStep(
                group=group, direction=direction, types=changes, kl_change=change, kl_change_se=error,
                predicted_change=sum(_cost(table, name, to) - _cost(table, name, old)
                                     for name, (old, to) in changes.items()),
            )
        )  # fmt: skip
        if progress:
            progress("measuring unit KL", index + 1, len(wanted))
    return OperatingPoint(dict(types), float(plain.mean()), tuple(steps))


def prices_from(table: ErrorTable, point: OperatingPoint) -> dict[str, dict[str, Price]]:
    """Price of every tensor in every type, in nats per token, from the steps around a plan."""
    ratios = {direction: _ratios([s for s in point.steps if s.direction == direction]) for direction in ("up", "down")}
    total = sum(_cost(table, name, point.types[name]) for name in table.tensors()) or 1.0
    prices: dict[str, dict[str, Price]] = {}
    for name, rows in table.tensors().items():
        here = _cost(table, name, point.types[name])
        prices[name] = {}
        for row in rows.values():
            difference = table.cost(row) - here
            by_group, mean = ratios["down" if difference > 0 else "up"]
            ratio, error = by_group.get(group_of(name), (mean, mean * _SPREAD))
            prices[name][row.type] = Price(kl=point.kl * here / total + ratio * difference, se=error * abs(difference))
    return prices


def _steps(table: ErrorTable, types: Mapping[str, str]) -> dict[str, list[tuple[str, dict[str, tuple[str, str]]]]]:
    """Group -> its steps: each direction with the tensors that can move, and from and to which type."""
    ups: dict[str, dict[str, tuple[str, str]]] = {}
    downs: dict[str, dict[str, tuple[str, str]]] = {}
    for name, rows in table.tensors().items():
        hull = lower_hull([Option(row.bytes, table.cost(row), row.type) for row in rows.values()])
        here = rows[types[name]].bytes
        larger = [option.type for option in hull if option.bytes > here]
        smaller = [option.type for option in hull if option.bytes < here]
        if larger:
            ups.setdefault(group_of(name), {})[name] = (types[name], larger[0])
        if smaller:
            downs.setdefault(group_of(name), {})[name] = (types[name], smaller[-1])
    groups = dict.fromkeys(group_of(name) for name in table.tensors())
    return {
        group: [(direction, found[group]) for direction, found in (("up", ups), ("down", downs)) if group in found]
        for group in groups
    }


def _cost(table: ErrorTable, name: str, type_name: str) -> float:
    return table.cost(table.tensors()[name][type_name])


def _paired(differences: np.ndarray, window_lengths: list[int]) -> tuple[float, float]:
    """Mean of per-token differences and its standard error over blocks."""
    sums, sizes = block_sums(differences, window_lengths)
    means = sums / sizes
    error = float(means.std(ddof=1)) / sqrt(len(means)) if len(means) > 1 else 0.0
    return float(sums.sum() / sizes.sum()), error


def _ratios(steps: Sequence[UnitStep]) -> tuple[dict[str, tuple[float, float]], float]:
    """Group -> r and its standard error, leaning on the mean r of these steps; and that mean."""
    usable = [step for step in steps if step.predicted_change]
    predicted = sum(step.predicted_change for step in usable)
    mean = sum(step.kl_change for step in usable) / predicted if predicted else 1.0
    mean = max(mean, _LEAST * fmean([abs(s.kl_change / s.predicted_change) for s in usable] or [1.0]))
    spread = mean * _SPREAD
    found = {}
    for step in usable:
        error = step.kl_change_se / abs(step.predicted_change)
        weight = spread**2 / (spread**2 + error**2)
        ratio = weight * step.kl_change / step.predicted_change + (1 - weight) * mean
        found[step.group] = (max(ratio, _LEAST * mean), sqrt(weight) * error)
    return found, mean
