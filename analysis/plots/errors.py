"""Error by layer, one panel a role group: which layers must not be quantized.

A line joins the worst tensor of every layer in one type, dots are the tensors, and the black line is what the plan
ships. Tensors far above their role's other layers (`stand_outs`) are ringed and the worst of them named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.analysis.outliers.stand_outs import StandOut, measure_of, stand_outs
from dynquant.analysis.plots.groups import GROUPS, OUTSIDE, PROJECTOR, group_of, shown_types
from dynquant.analysis.plots.labels import place_labels
from dynquant.analysis.plots.style import (
    BLACK,
    LIGHT,
    TYPE_STYLES,
    header_legend,
    layer_axis,
    new_figure,
    percent_axis,
    plain,
)
from dynquant.recipes.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED_LAYERS, NAMED_TENSORS = 4, 3
"""Layers named in a panel, and tensors of each; the report lists all."""
_AXIS_NAMES = {
    "activation_error": "relative output error (%)",
    "relative_rms": "relative RMS weight error (%)",
}
_WORDS = {"activation_error": "Output error", "relative_rms": "Weight error"}


@dataclass(frozen=True)
class _Panel:
    """The rows of one group, and everything needed to draw them."""

    rows: list[ErrorRow]
    types: list[str]
    measure: str
    planned: dict[str, str]
    """Tensor name -> the plan's type."""

    def values(self, type_name: str) -> list[tuple[ErrorRow, float]]:
        found = ((row, measure_of(row, self.measure)) for row in self.rows if row.type == type_name)
        return [(row, value) for row, value in found if value is not None]

    def shipped(self) -> list[tuple[ErrorRow, float]]:
        found = ((row, measure_of(row, self.measure)) for row in self.rows if self.planned.get(row.name) == row.type)
        return [(row, value) for row, value in found if value is not None]


def draw_errors(table: ErrorTable, plan: Plan, measure: str) -> tuple["Figure", str] | None:
    """Figure and headline of `activation_error` or `relative_rms`; None when the table holds no such number."""
    types = shown_types(table, plan)
    planned = {entry.name: entry.type for entry in plan.entries}
    panels = {}
    for group in (*GROUPS, OUTSIDE):
        rows = [row for row in table.rows if group_of(row.role) == group and measure_of(row, measure) is not None]
        if rows:
            panels[group] = _Panel(rows, types, measure, planned)
    if not panels:
        return None
    found = stand_outs(table, measure, types)
    headline = _headline(found, measure)
    figure = _figure(len(panels), headline, _subtitle(table, plan, types))
    header_legend(figure, _legend(types, bool(found)), columns=len(types) + 2)
    layers = [row.layer for row in table.rows if row.layer is not None]
    limits = _common_range(list(panels.values()))
    columns = min(len(panels), 3)
    for index, (group, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, index + 1)
        axes.set_title(group)
        axes.set_yscale("log")
        axes.set_ylim(*limits)
        percent_axis(axes.yaxis)
        if index % columns == 0:
            axes.set_ylabel(_AXIS_NAMES[measure])
        if group in (OUTSIDE, PROJECTOR):
            _draw_outside(axes, panel)
        else:
            _draw_layers(axes, panel, layers)
    for axes, (group, panel) in zip(figure.axes, panels.items(), strict=True):
        _name_stand_outs(axes, panel, [item for item in found if group_of(item.row.role) == group])
    return figure, headline


def _headline(found: Sequence[StandOut], measure: str) -> str:
    word = _WORDS[measure]
    if not found:
        return f"{word} by layer: no tensor sticks out of its role"
    names = "tensor sticks" if len(found) == 1 else "tensors stick"
    return f"{word} by layer: {len(found)} {names} out of their role, worst {plain(found[0].row.name, 40)}"


def _subtitle(table: ErrorTable, plan: Plan, types: list[str]) -> str:
    left_out = len(set(table.types)) - len(types)
    note = f", {left_out} more types measured but not drawn" if left_out else ""
    return f"{plain(plan.model, 60)}, plan “{plain(plan.recipe, 40)}”, encoder {plain(table.encoder, 20)}{note}"


def _figure(num_panels: int, headline: str, subtitle: str) -> "Figure":
    columns = min(num_panels, 3)
    width = {1: 8.5, 2: 11.0, 3: 13.5}[columns]
    return new_figure(width, 3.3 * -(-num_panels // columns), headline, subtitle, legend_rows=1)


def _legend(types: list[str], has_stand_outs: bool) -> list:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker=marker, linestyle=dash, markersize=5, linewidth=1.3, label=name)
        for name, (color, marker, dash) in zip(types, TYPE_STYLES, strict=False)
    ]
    handles.append(Line2D([], [], color=BLACK, linewidth=2.2, label="the plan"))
    if has_stand_outs:
        ring = {
            "marker": "o",
            "markerfacecolor": "none",
            "markeredgecolor": BLACK,
            "markersize": 9,
            "linestyle": "none",
        }
        handles.append(Line2D([], [], label="sticks out (xN: N times the median of its role)", **ring))
    return handles


def _worst_per_layer(values: list[tuple[ErrorRow, float]]) -> list[tuple[int, float]]:
    worst: dict[int, float] = {}
    for row, value in values:
        worst[row.layer] = max(value, worst.get(row.layer, 0.0))
    return sorted(worst.items())


def _draw_layers(axes: "Axes", panel: _Panel, layers: list[int]) -> None:
    for name, (color, marker, dash) in zip(panel.types, TYPE_STYLES, strict=False):
        values = panel.values(name)
        if not values:
            continue
        axes.scatter(
            [r.layer for r, _ in values],
            [v for _, v in values],
            s=4,
            color=color,
            alpha=0.35,
            linewidths=0,
            rasterized=True,
        )
        line = _worst_per_layer(values)
        size = 4.5 if len(line) <= 30 else 2.8
        axes.plot(*zip(*line, strict=True), color=color, marker=marker, linestyle=dash, markersize=size, linewidth=1.2)
    shipped = _worst_per_layer(panel.shipped())
    if shipped:
        lone = {"marker": "_", "markersize": 12, "markeredgewidth": 2.2} if len(shipped) == 1 else {}
        axes.plot(*zip(*shipped, strict=True), color=BLACK, linewidth=2.2, zorder=2.5, alpha=0.85, **lone)
    layer_axis(axes, layers)
    axes.set_xlabel("layer")
    present = {row.layer for row in panel.rows}
    if len(present) < len(set(layers)):
        for layer in set(layers) - present:
            axes.axvspan(layer - 0.5, layer + 0.5, color=LIGHT, alpha=0.45, linewidth=0, zorder=0)


def _draw_outside(axes: "Axes", panel: _Panel) -> None:
    """Embedding, output and projector matrices: one column a tensor."""
    names = list(dict.fromkeys(row.name for row in panel.rows))
    for name, (color, marker, _) in zip(panel.types, TYPE_STYLES, strict=False):
        values = panel.values(name)
        axes.plot([names.index(r.name) for r, _ in values], [v for _, v in values], marker, color=color, markersize=6)
    shipped = panel.shipped()
    style = {"color": BLACK, "marker": "_", "markersize": 34, "markeredgewidth": 2.2, "linestyle": "none"}
    axes.plot([names.index(row.name) for row, _ in shipped], [value for _, value in shipped], **style)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_xticks(range(len(names)), [plain(name, 24) for name in names])
    axes.grid(axis="x", visible=False)


def _common_range(panels: Sequence[_Panel]) -> tuple[float, float]:
    """One error range for all panels, so that groups compare; room for names on top."""
    values = [value for panel in panels for name in panel.types for _, value in panel.values(name)]
    low, high = min(values), max(values)
    span = max(high / low, 3.0)
    return low / span**0.04, high * span**0.26


def _name_stand_outs(axes: "Axes", panel: _Panel, found: list[StandOut]) -> None:
    if not found:
        return
    points = [(item.row.layer, item.value) for item in found]
    axes.scatter(*zip(*points, strict=True), s=70, facecolors="none", edgecolors=BLACK, linewidths=1.1, zorder=5)
    lines = [line for name in panel.types if (line := _worst_per_layer(panel.values(name)))]
    by_layer: dict[int, list[StandOut]] = {}
    for item in found:
        by_layer.setdefault(item.row.layer, []).append(item)
    named = sorted(list(by_layer.items())[:NAMED_LAYERS])
    labels = [(layer, max(item.value for item in items), _names(items)) for layer, items in named]
    place_labels(axes, labels, lines, clearance=9)


def _names(items: list[StandOut]) -> str:
    """One line a tensor of a layer, with its error as a multiple of its role's median."""
    shown = items if len(items) <= NAMED_TENSORS else items[: NAMED_TENSORS - 1]
    lines = [f"{plain(item.row.name.removesuffix('.weight'), 34)} x{item.value / item.typical:.1f}" for item in shown]
    return "\n".join(lines + ([f"+{len(items) - len(shown)} more"] if len(items) > len(shown) else []))
