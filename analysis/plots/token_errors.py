"""Output error of image tokens and of text tokens by layer, a panel a role group; cross-attention layers are shaded."""

from typing import TYPE_CHECKING

from dynquant.analysis.outliers.token_errors import TokenError, TokenErrors
from dynquant.analysis.plots.groups import GROUPS, group_of
from dynquant.analysis.plots.style import (
    BLUE,
    GREY,
    VERMILION,
    header_legend,
    layer_axis,
    new_figure,
    percent_axis,
    plain,
)
from dynquant.checkpoints.tensor_roles import Role
from dynquant.recipes.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = (("image", BLUE, "o", "image tokens"), ("text", VERMILION, "s", "text tokens"))


def draw_token_errors(errors: TokenErrors, plan: Plan) -> tuple["Figure", str] | None:
    """Figure and headline; None when no matrix in a layer saw any token."""
    panels = {
        group: rows
        for group in GROUPS
        if (rows := [row for row in errors.rows if group_of(row.role) == group and row.layer is not None])
    }
    if not panels:
        return None
    headline = f"Output error in {errors.type}, image tokens and text tokens apart"
    subtitle = f"{plain(plan.model, 60)}: every dot is a matrix, a line joins the worst of each layer"
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = new_figure({1: 8.5, 2: 11.0, 3: 13.5}[columns], 3.3 * rows, headline, subtitle, legend_rows=1)
    crossing = sorted({row.layer for row in errors.rows if row.role is Role.CROSS_ATTN and row.layer is not None})
    header_legend(figure, _legend(has_crossing=bool(crossing)), columns=3)
    layers = [row.layer for row in errors.rows if row.layer is not None]
    for index, (group, of_group) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(group)
        axes.set_yscale("log")
        _draw(axes, of_group)
        if not group.startswith("vision"):
            for layer in crossing:
                axes.axvspan(layer - 0.5, layer + 0.5, color=GREY, alpha=0.15, linewidth=0)
        layer_axis(axes, layers)
        percent_axis(axes.yaxis)
        axes.set_xlabel("layer")
        if index % columns == 0:
            axes.set_ylabel("relative output error (%)")
    return figure, headline


def _draw(axes: "Axes", rows: list[TokenError]) -> None:
    for kind, color, marker, _ in _KINDS:
        points = [(row.layer, error) for row in rows if (error := getattr(row, kind))]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), marker, color=color, alpha=0.4, markersize=4, linestyle="none")
        worst: dict[int, float] = {}
        for layer, error in points:
            worst[layer] = max(error, worst.get(layer, 0.0))
        axes.plot(*zip(*sorted(worst.items()), strict=True), color=color, marker=marker, markersize=5, linewidth=1.3)


def _legend(*, has_crossing: bool) -> list:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    lines = [Line2D([], [], color=color, marker=marker, label=label) for _, color, marker, label in _KINDS]
    return [*lines, Patch(color=GREY, alpha=0.15, label="cross-attention layer")] if has_crossing else lines
