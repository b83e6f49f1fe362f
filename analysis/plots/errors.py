"""Error by layer, one panel a role group: which layers must not be quantized, and what image and text tokens lose.

A line joins the worst tensor of every layer in one type (or for one kind of token), dots are the tensors, and the black
line is what the plan ships. Tensors far above their role's other layers (`stand_outs`) are ringed and the worst of them
named.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.analysis.outliers.stand_outs import StandOut, measure_of, stand_outs
from dynquant.analysis.outliers.token_errors import TokenError, TokenErrors
from dynquant.analysis.plots import style
from dynquant.analysis.plots.groups import GROUPS, OUTSIDE, PROJECTOR, group_of, shown_types
from dynquant.analysis.plots.labels import place_labels
from dynquant.checkpoints.tensor_roles import Role
from dynquant.recipes.plan import Plan

NAMED_LAYERS, NAMED_TENSORS = 4, 3  # layers named in a panel, and tensors of each; the report lists all
_NAMES = {"activation_error": ("Output error", "output error"), "relative_rms": ("Weight error", "RMS weight error")}
"""Measure -> its name in headlines and on axes."""
_TOKEN_KINDS = (("image", style.BLUE, "o", "image tokens"), ("text", style.VERMILION, "s", "text tokens"))
_WIDTHS = {1: 8.5, 2: 11.0, 3: 13.5}  # inches of a figure with so many columns
_SHIPPED_MARK = {"color": style.BLACK, "marker": "_", "markersize": 34, "markeredgewidth": 2.2, "linestyle": "none"}


@dataclass(frozen=True)
class _Panel:
    """The rows of one group, and everything needed to draw them."""

    rows: list[ErrorRow]
    types: list[str]
    measure: str
    planned: dict[str, str]  # tensor name -> the plan's type

    def values(self, type_name: str) -> list[tuple[ErrorRow, float]]:
        return self._measured(row for row in self.rows if row.type == type_name)

    def shipped(self) -> list[tuple[ErrorRow, float]]:
        return self._measured(row for row in self.rows if self.planned.get(row.name) == row.type)

    def _measured(self, rows: Iterable[ErrorRow]) -> list[tuple[ErrorRow, float]]:
        return [(row, value) for row in rows if (value := measure_of(row, self.measure)) is not None]


def draw_errors(table: ErrorTable, plan: Plan, measure: str) -> style.Drawn:
    """Figure and headline of `activation_error` or `relative_rms`; None when the table holds no such number."""
    types = shown_types(table, plan)
    planned = {entry.name: entry.type for entry in plan.entries}
    measured = [row for row in table.rows if measure_of(row, measure) is not None]
    by_group = {group: [row for row in measured if group_of(row.role) == group] for group in (*GROUPS, OUTSIDE)}
    panels = {group: _Panel(rows, types, measure, planned) for group, rows in by_group.items() if rows}
    if not panels:
        return None
    word, axis_word = _NAMES[measure]
    outliers = stand_outs(table, measure, types)
    headline = f"{word} by layer: {_outliers_sentence(outliers)}"
    left_out = len(set(table.types)) - len(types)
    note = f", {left_out} more types measured but not drawn" if left_out else ""
    subtitle = f"{style.plan_title(plan)}, encoder {style.plain(table.encoder, 20)}{note}"
    figure, grid = _panel_grid(panels, headline, subtitle, f"relative {axis_word} (%)")
    style.header_legend(figure, _legend(types, bool(outliers)), columns=len(types) + 2)
    layers = [row.layer for row in table.rows if row.layer is not None]
    limits = _common_range(panels.values())
    for group, axes in grid.items():
        axes.set_ylim(*limits)
        style.number_axis(axes.yaxis, percent=True)
        if group in (OUTSIDE, PROJECTOR):
            _draw_outside(axes, panels[group])
        else:
            _draw_layers(axes, panels[group], layers)
    for group, axes in grid.items():
        _name_stand_outs(axes, panels[group], [item for item in outliers if group_of(item.row.role) == group])
    return figure, headline


def draw_token_errors(errors: TokenErrors, plan: Plan) -> style.Drawn:
    """Figure and headline; None when no matrix in a layer saw any token. Cross-attention layers are shaded."""
    from matplotlib.patches import Patch

    rows = [row for row in errors.rows if row.layer is not None]
    panels = {group: of_group for group in GROUPS if (of_group := [row for row in rows if group_of(row.role) == group])}
    if not panels:
        return None
    headline = f"Output error in {errors.type}, image tokens and text tokens apart"
    subtitle = f"{style.plain(plan.model, 60)}: every dot is a matrix, a line joins the worst of each layer"
    figure, grid = _panel_grid(panels, headline, subtitle, "relative output error (%)")
    crossing = sorted({row.layer for row in rows if row.role is Role.CROSS_ATTN})
    handles = [style.legend_line(label, color=color, marker=marker) for _, color, marker, label in _TOKEN_KINDS]
    if crossing:
        handles.append(Patch(color=style.GREY, alpha=0.15, label="cross-attention layer"))
    style.header_legend(figure, handles, columns=3)
    for group, axes in grid.items():
        _draw_tokens(axes, panels[group])
        for layer in [] if group.startswith("vision") else crossing:
            axes.axvspan(layer - 0.5, layer + 0.5, color=style.GREY, alpha=0.15, linewidth=0)
        style.layer_axis(axes, [row.layer for row in rows])
        style.number_axis(axes.yaxis, percent=True)
        axes.set_xlabel("layer")
    return figure, headline


def _panel_grid(
    groups: Iterable[str], headline: str, subtitle: str, axis_name: str
) -> tuple[style.Figure, dict[str, style.Axes]]:
    """Return a figure with one panel a group, at most three in a row, and its axes by group."""
    groups = list(groups)
    columns = min(len(groups), 3)
    rows = -(-len(groups) // columns)
    figure = style.new_figure(_WIDTHS[columns], 3.3 * rows, headline, subtitle, legend_rows=1)
    grid = {}
    for index, group in enumerate(groups):
        y_label = "" if index % columns else axis_name
        grid[group] = figure.add_subplot(rows, columns, index + 1, title=group, yscale="log", ylabel=y_label)
    return figure, grid


def _outliers_sentence(outliers: Sequence[StandOut]) -> str:
    if not outliers:
        return "no tensor sticks out of its role"
    names = "tensor sticks" if len(outliers) == 1 else "tensors stick"
    return f"{len(outliers)} {names} out of their role, worst {style.plain(outliers[0].row.name, 40)}"


def _legend(types: list[str], has_stand_outs: bool) -> list:
    looks = zip(types, style.TYPE_LOOKS, strict=False)
    handles = [style.legend_line(name, **look.line, markersize=5, linewidth=1.3) for name, look in looks]
    handles.append(style.legend_line("the plan", color=style.BLACK, linewidth=2.2))
    if has_stand_outs:
        ring = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": style.BLACK, "linestyle": "none"}
        handles.append(style.legend_line("sticks out (xN: N times the median of its role)", **ring, markersize=9))
    return handles


def _worst_per_layer(values: Iterable[tuple[ErrorRow | TokenError, float]]) -> list[tuple[int, float]]:
    worst: dict[int, float] = {}
    for row, value in values:
        worst[row.layer] = max(value, worst.get(row.layer, 0.0))
    return sorted(worst.items())


def _draw_layers(axes: style.Axes, panel: _Panel, layers: list[int]) -> None:
    dots = {"s": 4, "alpha": 0.35, "linewidths": 0, "rasterized": True}  # thousands of vector dots make a huge SVG
    for name, look in zip(panel.types, style.TYPE_LOOKS, strict=False):
        values = panel.values(name)
        if not values:
            continue
        axes.scatter([row.layer for row, _ in values], [value for _, value in values], color=look.color, **dots)
        line = _worst_per_layer(values)
        axes.plot(*zip(*line, strict=True), **look.line, markersize=4.5 if len(line) <= 30 else 2.8, linewidth=1.2)
    shipped = _worst_per_layer(panel.shipped())
    if shipped:
        # A line through one point is invisible, so a lone layer gets a bar.
        lone = {"marker": "_", "markersize": 12, "markeredgewidth": 2.2} if len(shipped) == 1 else {}
        axes.plot(*zip(*shipped, strict=True), color=style.BLACK, linewidth=2.2, zorder=2.5, alpha=0.85, **lone)
    style.layer_axis(axes, layers)
    axes.set_xlabel("layer")
    for layer in set(layers) - {row.layer for row in panel.rows}:
        axes.axvspan(layer - 0.5, layer + 0.5, color=style.LIGHT, alpha=0.45, linewidth=0, zorder=0)


def _draw_outside(axes: style.Axes, panel: _Panel) -> None:
    """Draw embedding, output and projector matrices: one column a tensor."""
    names = list(dict.fromkeys(row.name for row in panel.rows))
    for name, (color, marker, _) in zip(panel.types, style.TYPE_LOOKS, strict=False):
        values = panel.values(name)
        axes.plot([names.index(r.name) for r, _ in values], [v for _, v in values], marker, color=color, markersize=6)
    shipped = panel.shipped()
    axes.plot([names.index(row.name) for row, _ in shipped], [value for _, value in shipped], **_SHIPPED_MARK)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_xticks(range(len(names)), [style.plain(name, 24) for name in names])
    axes.grid(axis="x", visible=False)


def _draw_tokens(axes: style.Axes, rows: list[TokenError]) -> None:
    for kind, color, marker, _ in _TOKEN_KINDS:
        values = [(row, error) for row in rows if (error := getattr(row, kind))]
        if not values:
            continue
        dots = {"alpha": 0.4, "markersize": 4, "linestyle": "none"}
        axes.plot([row.layer for row, _ in values], [error for _, error in values], marker, color=color, **dots)
        line = _worst_per_layer(values)
        axes.plot(*zip(*line, strict=True), color=color, marker=marker, markersize=5, linewidth=1.3)


def _common_range(panels: Iterable[_Panel]) -> tuple[float, float]:
    """Return one error range for all panels, so that groups compare, with room for names on top."""
    values = [value for panel in panels for name in panel.types for _, value in panel.values(name)]
    low, high = min(values), max(values)
    span = max(high / low, 3.0)  # a flat plot would be all noise
    return low / span**0.04, high * span**0.26


def _name_stand_outs(axes: style.Axes, panel: _Panel, outliers: list[StandOut]) -> None:
    if not outliers:
        return
    points = [(item.row.layer, item.value) for item in outliers]
    axes.scatter(*zip(*points, strict=True), s=70, facecolors="none", edgecolors=style.BLACK, linewidths=1.1, zorder=5)
    lines = [line for name in panel.types if (line := _worst_per_layer(panel.values(name)))]
    by_layer: dict[int, list[StandOut]] = {}
    for item in outliers:
        by_layer.setdefault(item.row.layer, []).append(item)
    named = sorted(list(by_layer.items())[:NAMED_LAYERS])
    labels = [(layer, max(item.value for item in items), _names(items)) for layer, items in named]
    place_labels(axes, labels, lines, clearance=9)


def _names(items: list[StandOut]) -> str:
    """Return one line a tensor of a layer, with its error as a multiple of its role's median."""
    shown = items if len(items) <= NAMED_TENSORS else items[: NAMED_TENSORS - 1]
    names = (style.plain(item.row.name.removesuffix(".weight"), 34) for item in shown)
    lines = [f"{name} x{item.value / item.typical:.1f}" for name, item in zip(names, shown, strict=True)]
    return "\n".join(lines + ([f"+{len(items) - len(shown)} more"] if len(items) > len(shown) else []))
