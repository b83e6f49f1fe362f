"""The folder that `plan` leaves behind: names of its files, and its plots and report.html drawn from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.outliers.super_experts import find_super_experts
from dynquant.analysis.outliers.super_weights import SuperWeight
from dynquant.analysis.outliers.token_errors import TokenErrors
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_layout import padded
from dynquant.checkpoints.model import Model
from dynquant.cli.terminal import console
from dynquant.errors import PlanError, StatsError
from dynquant.families.open import open_model
from dynquant.planning.frontier import frontier
from dynquant.planning.planner import Rules
from dynquant.planning.selection import Selection
from dynquant.recipes.plan import Plan
from dynquant.recipes.presets import preset_types
from dynquant.storage.resumable_output import file_hash
from dynquant.storage.strict_json import parse_json

STATS_NAME, ERRORS_NAME, PLAN_NAME, SUPER_NAME = "stats.safetensors", "errors.json", "plan.json", "super_weights.json"
SELECTION_NAME = "selection.json"
TOKEN_ERRORS_NAME = "token_errors.json"

FRONTIER_PRESETS = (
    "uniform-iq1_s", "uniform-iq2_xxs", "uniform-q2_k", "uniform-iq3_xxs", "uniform-iq4_xs", "uniform-q6_k",
    "r1-iq1_s", "r1-iq2_xxs", "llama-iq1_s", "llama-iq2_xxs", "llama-iq3_xxs",
)  # fmt: skip
"""Shown beside the planner's curve where the error table prices all their types."""


def stats_of_plan(stats_hash: str | None, path: Path) -> CalibrationStats | None:
    """The statistics with this hash, those that a plan was made from; None for a plan without.

    Raises:
        StatsError: they are not at `path`, or are others; both hashes are named.
    """
    if stats_hash is None:
        return None
    if not path.is_file():
        raise StatsError(
            f"The plan was made from calibration statistics, but there is no {path}. Give them with --stats FILE."
        )
    found = file_hash(path)
    if found != stats_hash:
        raise StatsError(
            f"{path} has the hash {found[:12]}, but the plan was made from statistics {stats_hash[:12]}. Give the "
            "stats.safetensors that was written beside the plan."
        )
    return CalibrationStats.load(path)


def write_plan_report(
    path: str, directory: Path, *, evaluation: Mapping[str, object] | None = None, pictures: str = ""
) -> Path:
    """Draw the plots and report.html of a plan directory again, with what `eval` found if given."""
    made = Plan.load(directory / PLAN_NAME)
    stats = CalibrationStats.load(directory / STATS_NAME)
    table = ErrorTable.load(directory / ERRORS_NAME)
    supers = load_super_weights(directory / SUPER_NAME)
    return write_report(open_model(path), made, table, stats, supers, directory, evaluation, pictures)


def write_report(
    model: Model,
    plan: Plan,
    table: ErrorTable,
    stats: CalibrationStats,
    supers: Sequence[SuperWeight],
    directory: Path,
    evaluation: Mapping[str, object] | None = None,
    pictures: str = "",
) -> Path:
    from dynquant.analysis.plots.all_plots import write_plots
    from dynquant.analysis.plots.groups import PlanResults
    from dynquant.analysis.report.page import write_report as write_html

    report = directory / "report.html"
    with console.stage_progress("The plan is kept; plots and report are drawn again.") as progress:
        points = frontier(table, rules_of(supers, stats), _fixed_bytes_of(plan, table), fixed_recipes(model))
        results = PlanResults(
            plan=plan,
            table=table,
            stats=stats,
            super_weights=supers,
            frontier=points,
            selection=Selection.load(directory / SELECTION_NAME),
            token_errors=TokenErrors.load(directory / TOKEN_ERRORS_NAME, plan.fingerprint),
        )
        plots = write_plots(directory / "plots", results, progress)
    write_html(report, results, plots, evaluation=evaluation, pictures=pictures)
    console.note(f"wrote {report}")
    return report


def _fixed_bytes_of(plan: Plan, table: ErrorTable) -> int:
    """File bytes besides the tensors that have a choice."""
    return plan.predicted_bytes - sum(padded(entry.bytes) for entry in plan.entries if entry.name in table.tensors())


def fixed_recipes(model: Model) -> dict[str, dict[str, str]]:
    """Wanted types of the recipes to show beside the planner's curve; those that do not apply are left out."""
    found = {}
    for name in FRONTIER_PRESETS:
        try:
            found[name] = {tensor: wanted for tensor, (wanted, _) in preset_types(name, model).items()}
        except PlanError:
            continue
    return found


def rules_of(
    supers: Sequence[SuperWeight],
    stats: CalibrationStats,
    *,
    floors: bool = True,
    coupled: tuple[tuple[str, ...], ...] = (),
) -> Rules:
    """Tensors that hold super weights or super experts should stay precise."""
    return Rules(
        floors=floors,
        outliers={
            found.name: f"expert {found.expert} is a super expert (output {found.ratio:.0f} times the median)"
            for found in find_super_experts(stats)
        },
        super_weights={found.name: f"holds the super weight [{found.row},{found.col}]" for found in supers},
        coupled=coupled,
    )


def load_super_weights(path: Path) -> list[SuperWeight]:
    """Read super_weights.json; an absent file means that none were looked for."""
    if not path.is_file():
        return []
    try:
        return [SuperWeight(**one) for one in parse_json(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        raise PlanError(f"{path} does not hold super weights ({error}). Delete it and plan again.") from error
