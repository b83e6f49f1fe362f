"""Largest input and output of every down projection: a super weight shows as a lone spike in both.

Method of Yu et al. 2024 (arXiv 2411.07191): the row is the channel of the output spike, the column that of the input.
"""

from collections.abc import Sequence

from dynquant.analysis.plots import style
from dynquant.analysis.plots.labels import place_labels
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.tensor_roles import Role, layer_of
from dynquant.recipes.folder import SuperWeight
from dynquant.recipes.plan import Plan

NAMED = 6
_SERIES = {
    Role.FFN_DOWN: ("dense FFN", style.Look(style.ORANGE, "s", "--")),
    Role.SHARED_DOWN: ("shared expert", style.Look(style.GREEN, "^", "-.")),
    Role.EXPERT_DOWN: ("routed experts (largest of all)", style.Look(style.BLUE, "o", "-")),
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


def draw_super_weights(plan: Plan, stats: CalibrationStats, super_weights: Sequence[SuperWeight]) -> style.Drawn:
    """Figure and headline, or None when calibration kept no extremes."""
    sides = {part: down_projection_extremes(plan, stats, part) for part in ("max_in", "max_out")}
    if not any(sides.values()):
        return None
    headline = "Super weights: none detected" if not super_weights else _headline(super_weights)
    subtitle = f"{style.plain(plan.model, 60)}, down projections of every layer"
    figure = style.new_figure(13.5, 3.9, headline, subtitle, legend_rows=1)
    style.header_legend(figure, _legend(sides, bool(super_weights)), columns=4)
    layers = [layer for side in sides.values() for points in side.values() for layer, _ in points]
    for index, (part, side) in enumerate(sides.items()):
        axes = figure.add_subplot(1, 2, index + 1)
        word = "input" if part == "max_in" else "output"
        title = f"largest |{word}| of the down projection"
        axes.set(title=title, xlabel="layer", ylabel=f"max |{word}| (activation units)")
        _draw_side(axes, side, layers, [(layer_of(item.name), abs(getattr(item, part))) for item in super_weights])
    for axes, (part, side) in zip(figure.axes, sides.items(), strict=True):
        place_labels(axes, _labels(super_weights, part), list(side.values()), color="#7c2d00", clearance=13)
    return figure, headline


def _headline(super_weights: Sequence[SuperWeight]) -> str:
    first = super_weights[0]
    expert = "" if first.expert is None else f" expert {first.expert}"
    place = f"{style.plain(first.name.removesuffix('.weight'), 34)}{expert} [{first.row}, {first.col}]"
    more = "" if len(super_weights) == 1 else f" and {len(super_weights) - 1} more"
    return f"Super weights: {place}{more}: keep these tensors precise"


def _draw_side(axes: style.Axes, side: dict, layers: list[int], spikes: list[tuple[int, float]]) -> None:
    for role, points in side.items():
        size = 5 if len(points) <= 30 else 3
        axes.plot(*zip(*points, strict=True), **_SERIES[role][1].line, markersize=size, linewidth=1.3)
    if spikes:
        star = {"marker": "*", "s": 170, "color": style.VERMILION, "edgecolors": "black", "linewidths": 0.8}
        axes.scatter(*zip(*spikes, strict=True), **star, zorder=5)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    span = max(high / low, 2.0)
    axes.set_ylim(low / span**0.02, max(high, 2 * low) * span**0.2)  # room for labels on top
    style.number_axis(axes.yaxis)
    style.layer_axis(axes, layers)


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
    shown = [series for role, series in _SERIES.items() if any(role in side for side in sides.values())]
    handles = [style.legend_line(label, **look.line) for label, look in shown]
    if has_super_weights:
        star = {**style.Look(style.VERMILION, "*", "none").line, "markersize": 12, "markeredgecolor": "black"}
        handles.append(style.legend_line("super weight [row, column]", **star))
    return handles
