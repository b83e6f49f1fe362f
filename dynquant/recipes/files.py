"""Names of the files of a plan's folder."""

from pathlib import Path

from dynquant.calibration.files import STATS_NAME, files_beside

ERRORS_NAME = "errors.json"
SCHEME_ERRORS_NAME = "serving_errors.json"
PLAN_NAME = "plan.json"
SUPER_NAME = "super_weights.json"
SELECTION_NAME = "selection.json"
TOKEN_ERRORS_NAME = "token_errors.json"
REPORT_NAME = "report.html"


def table_beside(errors: Path) -> Path:
    """Return the file of the rows of an error table as csv, beside the table."""
    return errors.with_suffix(".csv")


def files_of_plan(folder: Path) -> list[Path]:
    """Return all files that planning may write into a folder."""
    stats, tables = folder / STATS_NAME, [folder / name for name in (ERRORS_NAME, SCHEME_ERRORS_NAME)]
    others = (PLAN_NAME, SUPER_NAME, SELECTION_NAME, TOKEN_ERRORS_NAME, REPORT_NAME)
    return [stats, *files_beside(stats), *tables, *map(table_beside, tables), *(folder / name for name in others)]
