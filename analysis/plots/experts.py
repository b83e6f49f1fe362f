"""Expert heat map: tokens that calibration routed to every expert, beside the error of what the plan ships."""

from collections.abc import Callable, Collection

import numpy as np

from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.plots import style
from dynquant.calibration.importance import expert_coverage
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.recipes.plan import Plan, PlanEntry

STACKED_FROM = 48  # from this many experts the two maps stand above each other, each over the full width


def expert_tokens(plan: Plan, stats: CalibrationStats) -> dict[int, np.ndarray]:
    """Layer -> tokens routed to each expert, int64 [E]; layers without routed experts or counts are left out."""
    tokens: dict[int, np.ndarray] = {}
    for entry in _routed(plan):
        inputs = stats.input_of(entry.name)
        if inputs is not None and len(inputs.counts) == entry.shape[0]:
            tokens.setdefault(layer_of(entry.name), inputs.counts.numpy())
    return dict(sorted(tokens.items()))


def starved_experts(stats: CalibrationStats | None) -> list[tuple[int, int, int]]:
    """(layer, expert, tokens) of the experts whose statistics lean on their layer's mean."""
    rows = expert_coverage(stats) if stats is not None else []
    return [(row.layer, expert, row.tokens[expert]) for row in rows for expert in row.starved]


def expert_errors(plan: Plan, table: ErrorTable) -> tuple[dict[int, np.ndarray], str]:
    """Layer -> relative error of each expert in the plan's types, worst projection, NaN without samples; its name.

    Output error where any was measured, else the square root of the importance-weighted error.
    """
    rows = table.tensors()
    shipped = [row for entry in _routed(plan) if (row := rows.get(entry.name, {}).get(entry.type)) is not None]
    measured = any(value is not None for row in shipped for value in row.per_expert_activation_error)
    worst: dict[int, np.ndarray] = {}
    for row in shipped:
        if measured:
            values = np.array([np.nan if v is None else v for v in row.per_expert_activation_error])
        else:
            values = np.sqrt([np.nan if v is None else v for v in row.per_expert_weighted_error])
        others = worst.get(row.layer)
        if len(values) and (others is None or len(others) == len(values)):
            worst[row.layer] = values if others is None else np.fmax(others, values)
    name = "relative output error" if measured else "importance-weighted relative error"
    return dict(sorted(worst.items())), name


def draw_experts(plan: Plan, table: ErrorTable | None, stats: CalibrationStats) -> style.Drawn:
    """Figure and headline, or None for a model without counted experts."""
    tokens = expert_tokens(plan, stats)
    if not tokens:
        return None
    starved = [(layer, expert) for layer, expert, _ in starved_experts(stats)]
    errors, error_name = expert_errors(plan, table) if table is not None else ({}, "")
    num_experts = max(len(counts) for counts in tokens.values())
    is_stacked = num_experts >= STACKED_FROM
    headline = _headline(tokens, starved)
    size = _size(len(tokens), is_stacked, bool(errors))
    figure = style.new_figure(*size, headline, style.plan_title(plan), legend_rows=1)
    maps = [(tokens, "tokens routed to each expert", "tokens", "viridis", style.short_number)]
    if errors:
        title = f"{error_name} in the plan's types, worst projection"
        maps.append((errors, title, "error (%)", "magma_r", lambda v: f"{100 * v:.3g}%"))
    grid = (len(maps), 1) if is_stacked else (1, len(maps))
    for index, (values, title, unit, colours, label) in enumerate(maps):
        axes = figure.add_subplot(*grid, index + 1, title=title)
        _heat(axes, _matrix(values, list(tokens), num_experts), unit, colours, label)
        _name_axes(axes, list(tokens))
        _mark(axes, [(expert, list(tokens).index(layer)) for layer, expert in starved if layer in tokens], is_stacked)
    style.header_legend(figure, _legend(bool(starved), bool(errors)), columns=3)
    return figure, headline


def _routed(plan: Plan) -> list[PlanEntry]:
    stacks = [entry for entry in plan.entries if entry.role.is_routed_expert and len(entry.shape) == 3]
    return [entry for entry in stacks if layer_of(entry.name) is not None]


def _headline(tokens: dict[int, np.ndarray], starved: Collection) -> str:
    total = sum(len(counts) for counts in tokens.values())
    if not starved:
        fewest = min(int(counts.min()) for counts in tokens.values())
        return f"Experts: all {total:,} were seen, the rarest by {fewest:,} tokens"
    return f"Experts: {len(set(starved)):,} of {total:,} saw too few calibration tokens to be trusted"


def _size(num_layers: int, is_stacked: bool, has_errors: bool) -> tuple[float, float]:
    """Return width and height in inches."""
    if is_stacked:
        height = min(max(1.1 + 0.075 * num_layers, 2.4), 8.0)
        return 13.5, height * (2 if has_errors else 1)
    return 13.5 if has_errors else 8.5, min(max(1.2 + 0.22 * num_layers, 2.6), 9.0)


def _matrix(values: dict[int, np.ndarray], layers: list[int], num_experts: int) -> np.ndarray:
    matrix = np.full((len(layers), num_experts), np.nan)
    for index, layer in enumerate(layers):
        if layer in values:
            matrix[index, : len(values[layer])] = values[layer]
    return matrix


def _heat(axes: style.Axes, matrix: np.ndarray, unit: str, colours: str, label: Callable[[float], str]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = matrix[np.isfinite(matrix) & (matrix > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 1.0)
    low, high = (low / 1.1, high * 1.1) if high / low < 1.2 else (low, high)  # equal cells need a range too
    palette = colormaps[colours].with_extremes(bad=style.LIGHT)
    shown = np.ma.masked_where(~(matrix > 0), matrix)  # no tokens: no logarithm
    image = axes.imshow(shown, cmap=palette, norm=LogNorm(low, high), aspect="auto", interpolation="none")
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.04)
    bar.set_label(unit)
    subs = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    bar.ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _name_axes(axes: style.Axes, layers: list[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(visible=False)
    axes.set(xlabel="expert", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=17, integer=True, steps=[1, 2, 4, 5, 10]))
    step = 1 if len(layers) <= 20 else 5 if len(layers) <= 100 else 10
    rows = [index for index, layer in enumerate(layers) if layer % step == 0]
    axes.set_yticks(rows, [str(layers[index]) for index in rows])


def _mark(axes: style.Axes, points: list[tuple[int, int]], is_small: bool) -> None:
    """Draw a cross at every (column, row) of a starved expert."""
    if not points:
        return
    size, rim, line = (13, 2.0, 0.9) if is_small else (34, 3.0, 1.4)
    # The white rim makes the cross legible on any colour.
    axes.scatter(*zip(*points, strict=True), marker="x", s=size, color="white", linewidths=rim)
    axes.scatter(*zip(*points, strict=True), marker="x", s=size, color=style.BLACK, linewidths=line)


def _legend(has_starved: bool, has_errors: bool) -> list:
    from matplotlib.patches import Patch

    missing = "no tokens, no held-back sample, or not drawn" if has_errors else "no tokens"
    handles = [Patch(facecolor=style.LIGHT, edgecolor="#9ca3af", label=missing)]
    if has_starved:
        look = {"color": style.BLACK, "marker": "x", "linestyle": "none"}
        handles.insert(0, style.legend_line("starved: too few tokens", **look))
    return handles
