"""All plots of one plan: `write_plots` makes each that its data allow, as PNG and SVG.

What each shows is in `report.texts`, by the same names.
"""

from collections.abc import Callable
from pathlib import Path

from dynquant.analysis.plots.errors import draw_errors, draw_token_errors
from dynquant.analysis.plots.experts import draw_experts
from dynquant.analysis.plots.frontier import draw_frontier, draw_measured_frontier, draw_selection
from dynquant.analysis.plots.groups import PlanResults
from dynquant.analysis.plots.plan_map import draw_plan_map
from dynquant.analysis.plots.sizes import draw_size_breakdown
from dynquant.analysis.plots.style import Drawn, PlotFiles, plot_settings, save_figure
from dynquant.analysis.plots.super_weights import draw_super_weights
from dynquant.session import Progress, ignore_progress


def write_plots(directory: Path, results: PlanResults, progress: Progress = ignore_progress) -> dict[str, PlotFiles]:
    """Write NAME.png and NAME.svg of every plot that the data allow; absent names had nothing to show.

    Raises:
        PlanError, StatsError: table or statistics belong to another checkpoint than the plan.
        ExportError: matplotlib is missing, or the directory cannot be written.
    """
    results.check_same_checkpoint()
    drawings = _drawings(results)
    written: dict[str, PlotFiles] = {}
    for done, (name, draw) in enumerate(drawings.items()):
        progress("drawing plots", done, len(drawings), unit="plots")
        with plot_settings():
            drawn = draw()
            if drawn is not None:
                written[name] = save_figure(drawn[0], directory, name, drawn[1])
    progress("drawing plots", len(drawings), len(drawings), unit="plots")
    return written


def _drawings(results: PlanResults) -> dict[str, Callable[[], Drawn]]:
    """Plot name -> how to draw it, in the order of the report; only plots whose inputs are there."""
    plan, table, stats, selection = results.plan, results.table, results.stats, results.selection
    drawings: dict[str, tuple[object, Callable[[], Drawn]]] = {
        "plan_map": (plan, lambda: draw_plan_map(plan)),
        "size_breakdown": (plan, lambda: draw_size_breakdown(plan)),
        "error_by_layer": (table, lambda: draw_errors(table, plan, "activation_error")),
        "weight_error_by_layer": (table, lambda: draw_errors(table, plan, "relative_rms")),
        "token_errors": (results.token_errors, lambda: draw_token_errors(results.token_errors, plan)),
        "super_weights": (stats, lambda: draw_super_weights(plan, stats, results.super_weights)),
        "expert_heatmap": (stats, lambda: draw_experts(plan, table, stats)),
        "frontier": (results.frontier, lambda: draw_frontier(plan, table, results.frontier)),
        "selection": (selection, lambda: draw_selection(selection)),
        "measured_frontier": (selection, lambda: draw_measured_frontier(selection)),
    }
    return {name: draw for name, (needed, draw) in drawings.items() if needed}
