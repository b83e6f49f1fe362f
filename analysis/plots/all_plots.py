"""All plots of one plan: `write_plots` makes each that its data allow, as PNG and SVG.

error_by_layer          what quantization does to each tensor's output
weight_error_by_layer   what it does to the weights themselves
token_errors            what it does to image tokens and to text tokens, apart
expert_heatmap          tokens and error of every routed expert
super_weights           largest input and output of every down projection
size_breakdown          bytes by role
frontier                file size against predicted error
selection               predicted against measured KL of candidate plans
measured_frontier       file size against measured KL and top-1 agreement
plan_map                type of every tensor
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.outliers.token_errors import TokenErrors
from dynquant.analysis.plots.errors import draw_errors
from dynquant.analysis.plots.experts import draw_experts, starved_experts
from dynquant.analysis.plots.frontier import draw_frontier
from dynquant.analysis.plots.groups import FrontierPoint, SuperWeight, check_same_checkpoint
from dynquant.analysis.plots.measured import draw_measured_frontier
from dynquant.analysis.plots.plan_map import draw_plan_map
from dynquant.analysis.plots.selection import draw_selection
from dynquant.analysis.plots.sizes import draw_size_breakdown
from dynquant.analysis.plots.style import PlotFiles, plot_settings, save_figure
from dynquant.analysis.plots.super_weights import draw_super_weights
from dynquant.analysis.plots.token_errors import draw_token_errors
from dynquant.calibration.statistics import CalibrationStats
from dynquant.planning.selection import Selection
from dynquant.recipes.plan import Plan
from dynquant.session import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawing = Callable[[], tuple["Figure", str] | None]


def write_plots(
    directory: Path,
    *,
    table: ErrorTable | None,
    plan: Plan,
    stats: CalibrationStats | None,
    super_weights: Sequence[SuperWeight] = (),
    frontier: Sequence[FrontierPoint] | None = None,
    selection: Selection | None = None,
    token_errors: TokenErrors | None = None,
    progress: Progress | None = None,
) -> dict[str, PlotFiles]:
    """Write NAME.png and NAME.svg of every plot that the data allow; absent names had nothing to show.

    Raises:
        PlanError, StatsError: table or statistics belong to another checkpoint than the plan.
        ExportError: matplotlib is missing, or the directory cannot be written.
    """
    check_same_checkpoint(plan, table, stats)
    drawings = _drawings(table, plan, stats, super_weights, frontier, selection, token_errors)
    written: dict[str, PlotFiles] = {}
    for done, (name, draw) in enumerate(drawings.items()):
        if progress:
            progress("drawing plots", done, len(drawings), unit="plots")
        with plot_settings():
            drawn = draw()
            if drawn is not None:
                written[name] = save_figure(drawn[0], directory, name, drawn[1])
    if progress:
        progress("drawing plots", len(drawings), len(drawings), unit="plots")
    return written


def _drawings(
    table: ErrorTable | None,
    plan: Plan,
    stats: CalibrationStats | None,
    super_weights: Sequence[SuperWeight],
    frontier: Sequence[FrontierPoint] | None,
    selection: Selection | None,
    token_errors: TokenErrors | None,
) -> dict[str, Drawing]:
    """Plot name -> how to draw it, in the order of the report; only plots whose inputs were given."""
    drawings: dict[str, Drawing] = {
        "plan_map": lambda: draw_plan_map(plan),
        "size_breakdown": lambda: draw_size_breakdown(plan),
    }
    if table is not None:
        drawings["error_by_layer"] = lambda: draw_errors(table, plan, "activation_error")
        drawings["weight_error_by_layer"] = lambda: draw_errors(table, plan, "relative_rms")
    if token_errors is not None:
        drawings["token_errors"] = lambda: draw_token_errors(token_errors, plan)
    if stats is not None:
        drawings["super_weights"] = lambda: draw_super_weights(plan, stats, super_weights)
        starved = [(layer, expert) for layer, expert, _ in starved_experts(stats)]
        drawings["expert_heatmap"] = lambda: draw_experts(plan, table, stats, starved)
    if frontier:
        drawings["frontier"] = lambda: draw_frontier(plan, table, frontier)
    if selection is not None:
        drawings["selection"] = lambda: draw_selection(selection)
        drawings["measured_frontier"] = lambda: draw_measured_frontier(selection)
    return drawings
