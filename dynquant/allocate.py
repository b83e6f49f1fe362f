"""Spends a byte budget: one type per tensor, lowest total cost that fits.

Objective: minimise sum_i cost[i, type_i] subject to sum_i bytes[i, type_i] <= budget, exactly one type per tensor.
Each tensor's options are reduced to their lower convex hull in (bytes, cost); starting from every tensor's smallest
option, the hull step with the largest cost saved per byte that still fits is taken until none fits. This is optimal
up to the last step (the slack is at most one tensor's step). Costs must be additive; who supplies them decides what
is minimised.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Option:
    """One type of one tensor, `bytes` padded as the file stores it."""

    bytes: int
    cost: float
    type: str


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """Options on the lower convex hull of cost over bytes, by rising bytes and falling cost."""
    hull: list[Option] = []
    for option in sorted(options):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        if hull and option.bytes == hull[-1].bytes:
            hull.pop()
        hull.append(option)
    return hull


def _slope(smaller: Option, larger: Option) -> float:
    return (smaller.cost - larger.cost) / (larger.bytes - smaller.bytes)


def smallest_total(options: Mapping[str, Sequence[Option]]) -> int:
    """Bytes when every tensor takes its smallest option."""
    return sum(min(choices).bytes for choices in options.values())


def largest_total(options: Mapping[str, Sequence[Option]]) -> int:
    """Bytes when every tensor takes its largest option."""
    return sum(max(choices).bytes for choices in options.values())


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """Choose one option per tensor within `budget` bytes.

    Raises:
        ValueError: even the smallest options exceed the budget.
    """
    smallest = smallest_total(options)
    if smallest > budget:
        raise ValueError(f"`budget` {budget} is below the smallest total {smallest}")
    hulls = {name: lower_hull(choices) for name, choices in options.items()}
    position = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].bytes for hull in hulls.values())
    heap: list[tuple[float, str]] = []

    def push(name: str) -> None:
        step, hull = position[name], hulls[name]
        if step + 1 < len(hull):
            heapq.heappush(heap, (-_slope(hull[step], hull[step + 1]), name))

    for name in hulls:
        push(name)
    while heap:
        _, name = heapq.heappop(heap)
        step, hull = position[name], hulls[name]
        extra = hull[step + 1].bytes - hull[step].bytes
        if extra <= left:
            left -= extra
            position[name] += 1
            push(name)
    chosen = {name: hulls[name][step] for name, step in position.items()}
    return _spend_slack(options, chosen, left)


def _spend_slack(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int) -> dict[str, Option]:
    """Use what the hull steps left over: off-hull options that lower the cost and still fit, best saving first."""
    while True:
        best: tuple[float, str, Option] | None = None
        for name, current in chosen.items():
            for option in options[name]:
                saved = current.cost - option.cost
                if option.bytes - current.bytes <= left and saved > 0 and (best is None or saved > best[0]):
                    best = (saved, name, option)
        if best is None:
            return chosen
        _, name, option = best
        left -= option.bytes - chosen[name].bytes
        chosen[name] = option
