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
noise. price(T) shares the plan's measured KL out in proportion to c(T), so that prices sum to that KL at the plan. The
prices hold near the plan: taken at their word far away they overshoot (on textbook-moe-16m a plan made so was worse
than the one it started from), so `refine` moves every tensor by at most one step, measures again, and stops when the
KL of the text no longer falls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np

from dynquant.analysis.errors.table import ErrorTable, Option, Price, lower_hull
from dynquant.checkpoints.tensor_roles import layer_of, role_of
from dynquant.evaluation.rendered_model import ScoredInputs
from dynquant.evaluation.statistics import block_sums
from dynquant.session import Progress, ignore_progress

METHOD = "unit-kl"
Choose = Callable[[ErrorTable], dict[str, str]]  # a priced table -> the stored type of every tensor
_SPREAD = 0.5  # expected distance of a group's r from the mean one, as a share of it
_LEAST = 0.1  # no step is taken for worth less than this share of the mean r: noise must not make bytes free


class UnitStep(NamedTuple):
    """One group moved one step from a plan. `kl_change` is in nats per token, with the standard error of 64-token
    blocks; `predicted_change` is that of the table's costs."""

    group: str
    direction: Literal["up", "down"]
    types: dict[str, tuple[str, str]]  # tensor -> type in the plan, type in this step
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
    """Return the name of the tensors of a layer that are moved together; tensors outside the layers stand alone."""
    layer, role = layer_of(name), role_of(name)
    if layer is None:
        return name
    if role.is_routed_expert:
        return f"blk.{layer}.experts_{'down' if role.is_down_projection else 'gate_up'}"
    mixes = role.is_attention or role.is_recurrent
    part = "attention" if mixes else "shared_expert" if role.is_shared_expert else "ffn"
    return f"blk.{layer}.{part}"


def refine(
    text: ScoredInputs, table: ErrorTable, choose: Choose, *, rounds: int, progress: Progress = ignore_progress
) -> list[OperatingPoint]:
    """Make plans by unit KL, from the one that `choose` makes of the table's own costs; each is better on the text.

    `choose` must accept tables with few types a tensor. The last point has no steps when the rounds ran out before the
    KL stopped falling.
    """
    points: list[OperatingPoint] = []
    types = choose(table)
    for _ in range(rounds):
        point = measure_steps(text, table, types, progress=progress)
        if points and point.kl >= points[-1].kl:  # the last prices were taken too far
            return points
        points.append(point)
        # Only the rows that every tensor can reach in one step.
        near = {name: {here, *_neighbours(table, name, here).values()} for name, here in types.items()}
        nearby = table.with_rows(row for row in table.rows if row.type in near[row.name])
        types = choose(nearby.with_prices(METHOD, prices_from(nearby, point)))
    text.rendered.install(types)
    divergences, _ = text.score()
    if float(divergences.mean()) < points[-1].kl:
        points.append(OperatingPoint(types, float(divergences.mean()), ()))
    return points


def measure_steps(
    text: ScoredInputs, table: ErrorTable, types: Mapping[str, str], *, progress: Progress = ignore_progress
) -> OperatingPoint:
    """Install a plan (stored type of every tensor in the table) and measure every group's step up and down."""
    text.rendered.install(types)
    plain, _ = text.score()
    moves = [(group, direction, changes) for group, by in _steps(table, types).items() for direction, changes in by]
    steps = []
    progress("measuring unit KL", 0, len(moves), unit="steps")
    for index, (group, direction, changes) in enumerate(moves):
        moved = text.divergences_with({name: to for name, (_, to) in changes.items()})
        change, error = _paired(moved.numpy() - plain.numpy(), text.lengths)
        predicted = sum(_cost(table, name, to) - _cost(table, name, old) for name, (old, to) in changes.items())
        steps.append(UnitStep(group, direction, changes, change, error, predicted))
        progress("measuring unit KL", index + 1, len(moves), unit="steps")
    return OperatingPoint(dict(types), float(plain.mean()), tuple(steps))


def prices_from(table: ErrorTable, point: OperatingPoint) -> dict[str, dict[str, Price]]:
    """Return the price of every tensor in every type, in nats per token, from the steps around a plan."""
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
    """Return the steps of every group: each direction with the tensors that can move, and from and to which type."""
    steps: dict[str, dict[str, dict[str, tuple[str, str]]]] = {}
    for name, type_name in types.items():
        for direction, to in _neighbours(table, name, type_name).items():
            steps.setdefault(group_of(name), {}).setdefault(direction, {})[name] = (type_name, to)
    return {group: sorted(by_direction.items(), reverse=True) for group, by_direction in steps.items()}


def _neighbours(table: ErrorTable, name: str, type_name: str) -> dict[str, str]:
    """Return the next more precise type (`up`) and the next smaller one (`down`) on the hull of a tensor's costs."""
    rows = table.tensors()[name]
    hull = lower_hull([Option(row.bytes, table.cost(row), row.type) for row in rows.values()])
    here = rows[type_name].bytes
    larger = [option.type for option in hull if option.bytes > here]
    smaller = [option.type for option in hull if option.bytes < here]
    return ({"up": larger[0]} if larger else {}) | ({"down": smaller[-1]} if smaller else {})


def _cost(table: ErrorTable, name: str, type_name: str) -> float:
    return table.cost(table.tensors()[name][type_name])


def _paired(differences: np.ndarray, window_lengths: list[int]) -> tuple[float, float]:
    """Return the mean of per-token differences and its standard error over blocks."""
    sums, sizes = block_sums(differences, window_lengths)
    means = sums / sizes
    error = float(means.std(ddof=1)) / sqrt(len(means)) if len(means) > 1 else 0.0
    return float(sums.sum() / sizes.sum()), error


def _ratios(steps: Sequence[UnitStep]) -> tuple[dict[str, tuple[float, float]], float]:
    """Return r of every group and its standard error, leaning on the mean r of these steps; and that mean."""
    usable = [step for step in steps if step.predicted_change]
    predicted = sum(step.predicted_change for step in usable)
    mean = sum(step.kl_change for step in usable) / predicted if predicted else 1.0
    mean = max(mean, _LEAST * fmean([abs(s.kl_change / s.predicted_change) for s in usable] or [1.0]))
    spread = mean * _SPREAD
    ratios = {}
    for step in usable:
        error = step.kl_change_se / abs(step.predicted_change)
        weight = spread**2 / (spread**2 + error**2)  # shrinks noisy steps towards the mean
        ratio = weight * step.kl_change / step.predicted_change + (1 - weight) * mean
        ratios[step.group] = (max(ratio, _LEAST * mean), sqrt(weight) * error)
    return ratios, mean
