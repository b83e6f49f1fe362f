"""The size/error curve: what the planner would reach at many budgets, beside uniform types and fixed recipes.

Every point is priced with the same error table: the sum over tensors of `ErrorTable.cost`. It is a prediction, drawn in
every report; what `plan --frontier` measures is made in `selecting`, and `dynquant eval` and `compare` measure files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dynquant.analysis.errors.table import ErrorTable
from dynquant.checkpoints.gguf_layout import padded
from dynquant.checkpoints.model import Model
from dynquant.errors import PlanError
from dynquant.planning.planner import Rules, rough_types, size_range
from dynquant.recipes.presets import preset_types

FRONTIER_PRESETS = (
    "uniform-iq1_s", "uniform-iq2_xxs", "uniform-q2_k", "uniform-iq3_xxs", "uniform-iq4_xs", "uniform-q6_k",
    "r1-iq1_s", "r1-iq2_xxs", "llama-iq1_s", "llama-iq2_xxs", "llama-iq3_xxs",
)  # fmt: skip
"""Shown beside the planner's curve where the error table prices all their types."""


@dataclass(frozen=True)
class FrontierPoint:
    """One plan: its file size and predicted error. `kind` is `plan`, `uniform` or `preset`."""

    label: str
    bytes: int
    error: float
    kind: str


def price(table: ErrorTable, types: Mapping[str, str], fixed_bytes: int) -> tuple[int, float] | None:
    """File bytes and predicted error of an assignment, or None when a type of it was not measured."""
    rows = [table.row(name, types[name]) for name in table.tensors()]
    if any(row is None for row in rows):
        return None
    return fixed_bytes + sum(padded(r.bytes) for r in rows if r), sum(table.cost(r) for r in rows if r)


def frontier(
    table: ErrorTable, rules: Rules, presets: Mapping[str, Mapping[str, str]], num_points: int = 24
) -> list[FrontierPoint]:
    """The planner at `num_points` budgets over its whole range of sizes, and every preset that can be priced."""
    low, high = size_range(table, rules)
    steps = [step / (num_points - 1) for step in range(num_points)]
    budgets = [min(max(int(low * (high / low) ** step), low), high) for step in steps]  # even steps in logarithm
    assignments = [
        (f"{budget}", "plan", types) for budget, types in zip(budgets, rough_types(table, budgets, rules), strict=True)
    ]
    for label, types in presets.items():
        assignments.append((label, "uniform" if label.startswith("uniform") else "preset", types))
    priced = [(label, kind, price(table, types, rules.fixed_bytes)) for label, kind, types in assignments]
    return [FrontierPoint(label, *point, kind=kind) for label, kind, point in priced if point]


def fixed_recipes(model: Model) -> dict[str, dict[str, str]]:
    """Wanted types of the recipes to show beside the planner's curve; those that do not apply are left out."""
    recipes = {}
    for name in FRONTIER_PRESETS:
        try:
            recipes[name] = {tensor: type_name for tensor, (type_name, _) in preset_types(name, model).items()}
        except PlanError:
            continue
    return recipes
