"""Largest input and output of every down projection: a super weight shows as a lone spike in both.

Method of Yu et al. 2024 (arXiv 2411.07191): the row is the channel of the output spike, the column that of the input.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynquant.analysis.plots.labels import place_labels
from dynquant.analysis.plots.style import (
    BLUE,
    GREEN,
    ORANGE,
    VERMILION,
    header_legend,
    layer_axis,
    new_figure,
    number_axis,
    plain,
)
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.tensor_roles import Role, layer_of
from dynquant.recipes.folder import SuperWeight
from dynquant.recipes.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 6
_SERIES = {
    Role.FFN_DOWN: ("dense FFN", ORANGE, "s", "--"),
    Role.SHARED_DOWN: ("shared expert", GREEN, "^", "-."),
    Role.EXPERT_DOWN: ("routed experts (largest of all)", BLUE, "o", "-"),
}


def down_projection_extremes(plan: Plan, stats: CalibrationStats, part: str) -> dict[Role, list[tuple[int, float]]]:
    """Role -> (layer, largest magnitude) of `max_in` or `max_out`, over all experts of a stacked tensor."""
    extremes: dict[Role, list[tuple[int, float]]] = {}
    for entry in plan.entries:
        inputs = stats.input_of(entry.name) if entry.role in _SERIES else None
        values = getattr(inputs, part, None)
        layer = layer_of(entry.name)
        if values is None or layer is None:
            continue
        largest = float(values.abs().max())
        if 0 < largest < float("inf"):
            extremes.setdefault(entry.role, []).append((layer, largest))
    return {role: sorted(points) for role, points in extremes.items()}


def draw_super_weights(
    plan: Plan, stats: CalibrationStats, super_weights: Sequence[SuperWeight]
) -> tuple["Figure", str] | None:
    """Figure and headline, or None when calibration kept no extremes."""
    sides = {part: down_projection_extremes(plan, stats, part) for part in ("max_in", "max_out")}
    if not any(sides.values()):
        return None
    headline = "Super weights: none detected" if not super_weights else _headline(super_weights)
    figure = new_figure(13.5, 3.9, headline, f"{plain(plan.model, 60)}, down projections of every layer", legend_rows=1)
    header_legend(figure, _legend(sides, bool(super_weights)), columns=4)
    layers = [layer for side in sides.values() for points in side.values() for layer, _ in points]
    for index, (part, side) in enumerate(sides.items()):
        axes = figure.add_subplot(1, 2, index + 1)
        word = "input" if part == "max_in" else "output"
        axes.set_title(f"largest |{word}| of the down projection")
        axes.set_xlabel("layer")
        axes.set_ylabel(f"max |{word}| (activation units)")
        _draw_side(axes, side, layers, [(layer_of(item.name), abs(getattr(item, part))) for item in super_weights])
    for axes, (part, side) in zip(figure.axes, sides.items(), strict=True):
        place_labels(axes, _labels(super_weights, part), list(side.values()), color="#7c2d00", clearance=13)
    return figure, headline


def _headline(super_weights: Sequence[SuperWeight]) -> str:
    first = super_weights[0]
    expert = "" if first.expert is None else f" expert {first.expert}"
    place = f"{plain(first.name.removesuffix('.weight'), 34)}{expert} [{first.row}, {first.col}]"
    more = "" if len(super_weights) == 1 else f" and {len(super_weights) - 1} more"
    return f"Super weights: {place}{more}: keep these tensors precise"


def _draw_side(axes: "Axes", side: dict, layers: list[int], spikes: list[tuple[int, float]]) -> None:
    for role, points in side.items():
        _, color, marker, dash = _SERIES[role]
        style = {"color": color, "marker": marker, "linestyle": dash, "linewidth": 1.3}
        axes.plot(*zip(*points, strict=True), markersize=5 if len(points) <= 30 else 3, **style)
    if spikes:
        style = {"marker": "*", "s": 170, "color": VERMILION, "edgecolors": "black", "linewidths": 0.8, "zorder": 5}
        axes.scatter(*zip(*spikes, strict=True), **style)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    span = max(high / low, 2.0)
    axes.set_ylim(low / span**0.02, max(high, 2 * low) * span**0.2)
    number_axis(axes.yaxis)
    layer_axis(axes, layers)


def _labels(super_weights: Sequence[SuperWeight], part: str) -> list[tuple[int, float, str]]:
    """Layer, height and coordinates; super weights of one tensor and expert share one label."""
    heights: dict[tuple[str, int | None], list[SuperWeight]] = {}
    for item in super_weights:
        heights.setdefault((item.name, item.expert), []).append(item)
    labels = []
    for (name, expert), items in list(heights.items())[:NAMED]:
        places = [f"[{item.row}, {item.col}]" for item in items[:2]]
        places += [f"+{len(items) - 2} more"] if len(items) > 2 else []
        title = f"layer {layer_of(name)}" if expert is None else f"layer {layer_of(name)}, expert {expert}"
        height = max(abs(getattr(item, part)) for item in items)
        labels.append((layer_of(name), height, "\n".join([title, *places])))
    return labels


def _legend(sides: dict, has_super_weights: bool) -> list:
    from matplotlib.lines import Line2D

    roles = [role for role in _SERIES if any(role in side for side in sides.values())]
    handles = []
    for role in roles:
        label, color, marker, dash = _SERIES[role]
        handles.append(Line2D([], [], color=color, marker=marker, linestyle=dash, label=label))
    if has_super_weights:
        star = {"marker": "*", "markersize": 12, "color": VERMILION, "markeredgecolor": "black", "linestyle": "none"}
        handles.append(Line2D([], [], label="super weight [row, column]", **star))
    return handles
