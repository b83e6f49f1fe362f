"""Plots and report.html of a plan folder, drawn from the files in it."""

from dataclasses import replace
from pathlib import Path

from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.outliers.token_errors import TokenErrors
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_layout import padded
from dynquant.families.open import open_model, open_pruned
from dynquant.planning.chooser import rules_of
from dynquant.planning.frontier import fixed_recipes, frontier
from dynquant.planning.selecting.selection import Selection
from dynquant.recipes.folder import load_super_weights
from dynquant.recipes.plan import Plan
from dynquant.session import Session
from dynquant.storage import file_names


def write_plan_report(
    path: str, directory: Path, session: Session, *, base_gguf: Path | None = None, measured: str = ""
) -> None:
    """Draw the plots and report.html of a plan folder; `measured` is as in `write_report`."""
    from dynquant.analysis.plots.all_plots import write_plots
    from dynquant.analysis.plots.groups import PlanResults
    from dynquant.analysis.report.page import write_report

    plan = Plan.load(directory / file_names.PLAN_NAME)
    stats = CalibrationStats.load(directory / file_names.STATS_NAME)
    table = ErrorTable.load(directory / file_names.ERRORS_NAME)
    super_weights = load_super_weights(directory / file_names.SUPER_NAME).super_weights
    report = directory / file_names.REPORT_NAME
    with session.stage("The plan is kept; plots and report are drawn again.") as progress:
        model = open_pruned(open_model(path, base_gguf=base_gguf), plan.pruned, directory, session)
        recipes = fixed_recipes(model)
        chosen_bytes = sum(padded(entry.bytes) for entry in plan.entries if entry.name in table.tensors())
        rules = replace(rules_of(super_weights, stats), fixed_bytes=plan.predicted_bytes - chosen_bytes)
        points = frontier(table, rules, recipes)
        selection = Selection.load(directory / file_names.SELECTION_NAME)
        token_errors = TokenErrors.load(directory / file_names.TOKEN_ERRORS_NAME, plan.fingerprint)
        results = PlanResults(plan, table, stats, super_weights, points, selection, token_errors)
        plots = write_plots(directory / "plots", results, progress)
    write_report(report, results, plots, measured=measured)
    session.note(f"wrote {report}")
