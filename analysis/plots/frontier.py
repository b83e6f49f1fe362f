"""A plan beside uniform types, fixed recipes and other budgets: predicted, measured, and one against the other.

The predicted error is the planner's: `ErrorTable.cost` of each tensor in its type, summed. What a selection measured is
the KL and the top-1 agreement of rendered plans.
"""

import math
from collections.abc import Sequence

from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.plots import style
from dynquant.analysis.plots.labels import place_labels
from dynquant.evaluation.statistics import Estimate
from dynquant.planning.frontier import FrontierPoint
from dynquant.planning.selecting.selection import Candidate, Selection
from dynquant.recipes.plan import Plan

THIS_PLAN = "this plan"
UNIFORM = "one type for every matrix"
PLANNER = "planner"
_LOOKS = {
    THIS_PLAN: style.Look(style.VERMILION, "*", "none"),
    "planner, other budgets": style.Look(style.ORANGE, ".", "-"),
    UNIFORM: style.Look(style.GREY, "o", ":"),
    "fixed recipe": style.Look(style.BLUE, "s", "none"),
}
"""Looks of the series of the predicted frontier."""
_LABEL_OF_KIND = {"plan": "planner, other budgets", "uniform": UNIFORM}
_MEASURED_LOOKS = {
    PLANNER: style.Look(style.VERMILION, "o", "-"),
    UNIFORM: style.Look(style.GREY, "s", ":"),
    "llama.cpp mixture": style.Look(style.BLUE, "^", "--"),
    "R1 recipe": style.Look(style.GREEN, "D", "none"),
    "published recipe": style.Look(style.ORANGE, "X", "none"),
}
"""Looks of the series of the measured frontier."""
Point = tuple[float, float, str]  # size in the axis unit, error, label


def plan_error(plan: Plan, table: ErrorTable | None) -> float | None:
    """Return the predicted error of the plan itself; None when the table knows none of its types."""
    rows = [table.row(entry.name, entry.type) for entry in plan.entries] if table is not None else []
    priced = [table.cost(row) for row in rows if row is not None and table is not None]
    return math.fsum(priced) if priced else None


def draw_frontier(plan: Plan, table: ErrorTable | None, points: Sequence[FrontierPoint]) -> style.Drawn:
    """Figure and headline; None without a point of positive error."""
    error = plan_error(plan, table)
    points = [point for point in points if point.bytes > 0 and 0 < point.error < math.inf]
    points = [point for point in points if not _is_this_plan(point, plan, error)]
    if not points:
        return None
    divisor, unit = style.size_unit(plan.predicted_bytes)
    series: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.bytes):
        name = _LABEL_OF_KIND.get(point.kind, "fixed recipe")
        series.setdefault(name, []).append((point.bytes / divisor, point.error, style.plain(point.label, 28)))
    if error:
        series[THIS_PLAN] = [(plan.predicted_bytes / divisor, error, f"this plan, {style.plain(plan.recipe, 28)}")]
    headline = _headline(plan, error, points)
    figure = style.new_figure(11, 5.4, headline, f"{style.plain(plan.model, 60)}, lower left is better", legend_rows=1)
    handles = [style.legend_line(name, **_look(name)) for name in _LOOKS if name in series]
    style.header_legend(figure, handles, columns=4)
    axes = figure.add_subplot()
    for name in reversed(_LOOKS):  # the plan last, on top of all
        if name in series:
            edge = {"markeredgewidth": None} if _LOOKS[name].marker == "." else {"markeredgecolor": "black"}
            above = 5 if name == THIS_PLAN else 3
            sizes, errors, _ = zip(*series[name], strict=True)
            axes.plot(sizes, errors, linewidth=1.2, zorder=above, **_look(name) | edge)
    cost_name = table.cost_name if table is not None else "predicted error"
    axes.set(yscale="log", ylabel=cost_name, xlabel=f"file size ({unit})")
    axes.margins(x=0.12, y=0.12)
    sizes = [size for group in series.values() for size, _, _ in group]
    if max(sizes) > 4 * min(sizes):  # a shorter range reads better linearly
        axes.set_xscale("log")
        style.number_axis(axes.xaxis)
    style.number_axis(axes.yaxis)
    named = [point for name in _LOOKS if "budgets" not in name for point in series.get(name, [])]
    joined = [group for name, group in series.items() if _LOOKS[name].dash != "none"]
    lines = [[(size, height) for size, height, _ in group] for group in joined]
    place_labels(axes, named, lines, fontsize=8, clearance=9)
    return figure, headline


def _is_this_plan(point: FrontierPoint, plan: Plan, error: float | None) -> bool:
    """Return whether a priced recipe is the plan itself, which is drawn as the star."""
    same_size = math.isclose(point.bytes, plan.predicted_bytes, rel_tol=1e-3)
    return error is not None and same_size and math.isclose(point.error, error, rel_tol=1e-3)


def _headline(plan: Plan, error: float | None, points: Sequence[FrontierPoint]) -> str:
    fixed = [point for point in points if point.kind != "plan" and point.bytes <= plan.predicted_bytes]
    if not error or not fixed:
        return "Predicted error against file size"
    best = min(fixed, key=lambda point: point.error)
    name, ratio = style.plain(best.label, 28), best.error / error
    if ratio < 1:
        return f"Frontier: {name} is predicted better at no more bytes"
    if ratio < 1.005:
        return f"Frontier: predicted level with {name}, the best recipe at no more bytes"
    return f"Frontier: {100 - 100 / ratio:.0f}% less predicted error than {name}, the best recipe at no more bytes"


def _look(name: str) -> dict:
    return {**_LOOKS[name].line, "markersize": 15.0 if name == THIS_PLAN else 6.0, "markeredgewidth": 0.7}


def draw_selection(selection: Selection) -> style.Drawn:
    """Draw measured over predicted KL of the candidates, and of the plans drawn around the chosen one."""
    others = [plan for i, plan in enumerate(selection.candidates) if plan.kl and i != selection.chosen]
    winner = [selection.winner] if selection.winner.kl else []
    drawn = [plan for plan in selection.checked if plan.kl]
    if not winner and not drawn:
        return None
    headline = _selection_headline(selection)
    subtitle = f"KL on {selection.num_tokens:,} tokens of {style.plain(selection.text, 60)}; bars are 95 % intervals"
    figure = style.new_figure(8.5, 5.6, headline, subtitle, legend_rows=1)
    axes = figure.add_subplot(xscale="log", yscale="log")
    handles = []
    for name, plans, color, marker, size in (
        ("plans drawn around it", drawn, style.GREY, "o", 4),
        ("other candidates", others, style.BLUE, "s", 6),
        ("chosen plan", winner, style.VERMILION, "*", 15),
    ):
        if plans:
            look = {"color": color, "marker": marker, "markersize": size, "linestyle": "none", "elinewidth": 0.8}
            edge = {"markeredgecolor": style.BLACK, "markeredgewidth": 0.4, "label": name}
            predicted = [plan.predicted_kl for plan in plans]
            handles.append(_draw_estimates(axes, predicted, [plan.kl for plan in plans], 1, **look, **edge))
    if selection.fit is not None:
        x = sorted(plan.predicted_kl for plan in drawn)
        fitted = [selection.fit.predicted(kl)[0] for kl in x]
        handles += axes.plot(x, fitted, color=style.ORANGE, linewidth=1.2, label="fit")
    for plan in [*others, *winner]:
        point = plan.predicted_kl, plan.kl.value
        axes.annotate(plan.label, point, xytext=(7, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="predicted KL: prices added up (nats per token)", ylabel="measured KL (nats per token)")
    style.number_axis(axes.xaxis)
    style.number_axis(axes.yaxis)
    axes.margins(x=0.15, y=0.12)
    style.header_legend(figure, handles, columns=4)
    return figure, headline


def _selection_headline(selection: Selection) -> str:
    if selection.rank_correlation is not None:
        rho = selection.rank_correlation
        return f"Selection: predictions rank {len(selection.checked)} plans with Spearman {rho.value:.2f}"
    measured = sum(plan.kl is not None for plan in selection.candidates)
    if measured < 2:
        return "Selection: one plan"
    return f"Selection: {selection.winner.label} has the lowest KL of {measured} plans"


def draw_measured_frontier(selection: Selection) -> style.Drawn:
    """Figure and headline of KL and top-1 agreement over file size; None when no frontier was measured."""
    points = sorted((point for point in selection.frontier if point.kl and point.top1), key=lambda point: point.bytes)
    if not points:
        return None
    divisor, unit = style.size_unit(points[-1].bytes)
    series = {name: [point for point in points if _kind_of(point.label) == name] for name in _MEASURED_LOOKS}
    headline = _measured_headline(series)
    subtitle = f"on {selection.num_tokens:,} tokens of {style.plain(selection.text, 60)}; bars are 95 % intervals"
    figure = style.new_figure(11, 5.2, headline, subtitle, legend_rows=1)
    left, right = figure.subplots(1, 2)
    handles = []
    for name, members in series.items():
        if members:
            sizes = [point.bytes / divisor for point in members]
            look = {**_MEASURED_LOOKS[name].line, "markersize": 5, "linewidth": 1.2, "elinewidth": 0.8, "label": name}
            handles.append(_draw_estimates(left, sizes, [point.kl for point in members], 1, **look))
            _draw_estimates(right, sizes, [point.top1 for point in members], 100, **look)
    left.set(yscale="log", ylabel="KL to the original (nats per token)", xlabel=f"file size ({unit})")
    style.number_axis(left.yaxis)
    right.set(ylabel="same top token (%)", xlabel=f"file size ({unit})")
    style.header_legend(figure, handles, columns=4)
    return figure, headline


def _kind_of(label: str) -> str:
    kinds = {"uniform": UNIFORM, "llama": "llama.cpp mixture", "r1": "R1 recipe", "like": "published recipe"}
    return next((kind for start, kind in kinds.items() if label.startswith(start)), PLANNER)


def _measured_headline(series: dict[str, list[Candidate]]) -> str:
    fixed = [point for name, points in series.items() if name != PLANNER for point in points]
    planned = series[PLANNER]
    if len(planned) == 1 and not fixed:
        return f"KL to the original: {planned[0].kl.value:.2g} nats"
    if not fixed:
        most, least = planned[0].kl.value, planned[-1].kl.value
        return f"KL to the original falls from {most:.2g} to {least:.2g} nats over {len(planned)} sizes"
    beaten = sum(any(p.bytes <= point.bytes and p.kl.value < point.kl.value for p in planned) for point in fixed)
    return f"Measured frontier: planned files are no larger and better than {beaten} of {len(fixed)} fixed recipes"


def _draw_estimates(axes: style.Axes, x: list[float], estimates: list[Estimate], scale: float, **look):
    """Draw estimates, times `scale`, with their intervals; return the handle for a legend."""
    bars = [[scale * (mean.value - mean.low), scale * (mean.high - mean.value)] for mean in estimates]
    return axes.errorbar(x, [scale * mean.value for mean in estimates], yerr=list(zip(*bars, strict=True)), **look)
