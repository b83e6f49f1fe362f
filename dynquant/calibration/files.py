"""Names of the files of a calibration: the statistics, and what lies beside them."""

from pathlib import Path

STATS_NAME = "stats.safetensors"
"""Statistics beside a plan, and wherever no other name is given."""
IMAGE, TEXT = KINDS = ("image", "text")
"""Kinds of tokens that are told apart where pictures are seen."""


def path_beside(stats: Path) -> Path:
    """Return the file of the second moments beside statistics: `stats.safetensors` -> `hessians.safetensors`."""
    name = stats.name.replace("stats", "hessians")
    return stats.with_name(name if name != stats.name else f"{stats.stem}.hessians{stats.suffix}")


def kind_path(stats: Path, kind: str) -> Path:
    """Return where statistics of one kind of token lie: `stats.safetensors` -> `stats-image.safetensors`."""
    return stats.with_name(f"{stats.stem}-{kind}{stats.suffix}")


def files_beside(stats: Path) -> list[Path]:
    """Return all files that a calibration may write beside its statistics."""
    return [path_beside(stats), *(kind_path(stats, kind) for kind in KINDS)]
