"""Names of the files that steps leave for each other: statistics and what lies beside them, and a plan's folder."""

import re
from pathlib import Path

STATS_NAME = "stats.safetensors"
"""Statistics beside a plan, and wherever no other name is given."""
IMAGE, TEXT = KINDS = ("image", "text")
"""Kinds of tokens that are told apart where pictures are seen."""
ORIGINAL_STATS_NAME = "original-stats.safetensors"
"""Statistics by which experts are pruned."""
ERRORS_NAME = "errors.json"
SCHEME_ERRORS_NAME = "serving_errors.json"
PLAN_NAME = "plan.json"
RELEASE_NAME = "release.json"
SUPER_NAME = "super_weights.json"
SELECTION_NAME = "selection.json"
TOKEN_ERRORS_NAME = "token_errors.json"
REPORT_NAME = "report.html"
SAME_COMPUTATION_NAME = "same_computation.json"


def path_beside(stats: Path) -> Path:
    """Return the file of the second moments beside statistics: `stats.safetensors` -> `hessians.safetensors`."""
    name = stats.name.replace("stats", "hessians")
    return stats.with_name(name if name != stats.name else f"{stats.stem}.hessians{stats.suffix}")


def kind_path(stats: Path, kind: str) -> Path:
    """Return where statistics of one kind of token lie: `stats.safetensors` -> `stats-image.safetensors`."""
    return stats.with_name(f"{stats.stem}-{kind}{stats.suffix}")


def written_path(stats: Path) -> Path:
    """Return where text lies that a model wrote to be calibrated on: `stats-written.safetensors`."""
    return kind_path(stats, "written")


def files_beside(stats: Path) -> list[Path]:
    """Return all files that a calibration may write beside its statistics."""
    return [path_beside(stats), written_path(stats), *(kind_path(stats, kind) for kind in KINDS)]


def table_beside(errors: Path) -> Path:
    """Return the file of the rows of an error table as csv, beside the table."""
    return errors.with_suffix(".csv")


def request_in_name(request: str) -> str:
    """Return what was asked of a plan, `bpw 2.5`, as a part of file names: `bpw-2.5`."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", request)


def files_of_plan(folder: Path) -> list[Path]:
    """Return all files that planning may write into a folder."""
    stats, tables = folder / STATS_NAME, [folder / name for name in (ERRORS_NAME, SCHEME_ERRORS_NAME)]
    others = (
        PLAN_NAME, SUPER_NAME, SELECTION_NAME, TOKEN_ERRORS_NAME, REPORT_NAME, SAME_COMPUTATION_NAME,
        ORIGINAL_STATS_NAME,
    )  # fmt: skip
    return [stats, *files_beside(stats), *tables, *map(table_beside, tables), *(folder / name for name in others)]
