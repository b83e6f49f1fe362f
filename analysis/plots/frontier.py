"""Size/error frontier: this plan beside uniform types, fixed recipes and the planner at other budgets.

The error is the planner's prediction: `ErrorTable.cost` of each tensor in its type, summed.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.plots.groups import FrontierPoint
from dynquant.analysis.plots.labels import place_labels
from dynquant.analysis.plots.style import (
    BLUE,
    GREY,
    ORANGE,
    VERMILION,
    header_legend,
    new_figure,
    number_axis,
    plain,
    size_unit,
)
from dynquant.recipes.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THIS_PLAN = "this plan"
_LOOKS = {
    THIS_PLAN: (VERMILION, "*", 15.0, "none"),
    "planner, other budgets": (ORANGE, ".", 6.0, "-"),
    "one type for every matrix": (GREY, "o", 6.0, ":"),
    "fixed recipe": (BLUE, "s", 6.0, "none"),
}
_LABEL_OF_KIND = {"plan": "planner, other budgets", "uniform": "one type for every matrix"}
Point = tuple[float, float, str]
"""Size in the axis unit, error, label."""


def plan_error(plan: Plan, table: ErrorTable | None) -> float | None:
    """Predicted error of the plan itself; None when the table knows none of its types."""
    rows = [table.row(entry.name, entry.type) for entry in plan.entries] if table is not None else []
    priced = [table.cost(row) for row in rows if row is not None and table is not None]
    return math.fsum(priced) if priced else None


def draw_frontier(plan: Plan, table: ErrorTable | None, points: Sequence[FrontierPoint]) -> tuple["Figure", str] | None:
    """Figure and headline; None without a point of positive error."""
    error = plan_error(plan, table)
    points = [point for point in points if point.bytes > 0 and 0 < point.error < math.inf]
    points = [point for point in points if not _is_this_plan(point, plan, error)]
    if not points:
        return None
    divisor, unit = size_unit(plan.predicted_bytes)
    series = _series(points, divisor)
    if error:
        series[THIS_PLAN] = [(plan.predicted_bytes / divisor, error, f"this plan, {plain(plan.recipe, 28)}")]
    headline = _headline(plan, error, points)
    figure = new_figure(11, 5.4, headline, f"{plain(plan.model, 60)}, lower left is better", legend_rows=1)
    header_legend(figure, [_handle(name) for name in _LOOKS if name in series], columns=4)
    axes = figure.add_subplot()
    for name in reversed(_LOOKS):
        if name in series:
            _draw_series(axes, name, series[name])
    axes.set_ylabel(table.cost_name if table is not None else "predicted error")
    _dress(axes, unit, [size for group in series.values() for size, _, _ in group])
    named = [point for name in _LOOKS if "budgets" not in name for point in series.get(name, [])]
    lines = [
        [(size, height) for size, height, _ in group] for name, group in series.items() if _LOOKS[name][3] != "none"
    ]
    place_labels(axes, named, lines, fontsize=8, clearance=9)
    return figure, headline


def _is_this_plan(point: FrontierPoint, plan: Plan, error: float | None) -> bool:
    """Whether a priced recipe is the plan itself, which is drawn as the star."""
    same_size = math.isclose(point.bytes, plan.predicted_bytes, rel_tol=1e-3)
    return error is not None and same_size and math.isclose(point.error, error, rel_tol=1e-3)


def _series(points: Sequence[FrontierPoint], divisor: float) -> dict[str, list[Point]]:
    series: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.bytes):
        name = _LABEL_OF_KIND.get(point.kind, "fixed recipe")
        series.setdefault(name, []).append((point.bytes / divisor, point.error, plain(point.label, 28)))
    return series


def _headline(plan: Plan, error: float | None, points: Sequence[FrontierPoint]) -> str:
    fixed = [point for point in points if point.kind != "plan" and point.bytes <= plan.predicted_bytes]
    if not error or not fixed:
        return "Predicted error against file size"
    best = min(fixed, key=lambda point: point.error)
    name, ratio = plain(best.label, 28), best.error / error
    if ratio < 1:
        return f"Frontier: {name} is predicted better at no more bytes"
    if ratio < 1.005:
        return f"Frontier: predicted level with {name}, the best recipe at no more bytes"
    return f"Frontier: {100 - 100 / ratio:.0f}% less predicted error than {name}, the best recipe at no more bytes"


def _draw_series(axes: "Axes", name: str, points: list[Point]) -> None:
    color, marker, size, dash = _LOOKS[name]
    edge = {} if marker == "." else {"markeredgecolor": "black", "markeredgewidth": 0.7}
    sizes, errors = [point[0] for point in points], [point[1] for point in points]
    above = 5 if name == THIS_PLAN else 3
    axes.plot(
        sizes, errors, color=color, marker=marker, markersize=size, linestyle=dash, linewidth=1.2, zorder=above, **edge
    )


def _dress(axes: "Axes", unit: str, sizes: list[float]) -> None:
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.12)
    if max(sizes) > 4 * min(sizes):
        axes.set_xscale("log")
        number_axis(axes.xaxis)
    number_axis(axes.yaxis)
    axes.set_xlabel(f"file size ({unit})")


def _handle(name: str):
    from matplotlib.lines import Line2D

    color, marker, size, dash = _LOOKS[name]
    style = {"color": color, "marker": marker, "markersize": size, "linestyle": dash, "markeredgewidth": 0.7}
    return Line2D([], [], label=name, **style)
