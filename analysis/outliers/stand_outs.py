"""Tensors whose error stands out: far above the tensors of the same role in other layers.

One rule serves plots, report and planner: the modified z-score of the logarithm of the error among the role's tensors
in one quant type (median and median absolute deviation).
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import median

from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.checkpoints.tensor_roles import Role

OUTLIER_Z = 3.5  # Iglewicz and Hoaglin's usual bound for the modified z-score
MIN_PEERS = 5  # fewer tensors of one role than this give no spread to compare against
MIN_LOG_SPREAD = 0.1  # floor of the spread in log units: an outlier is at least exp(0.35) = 1.4 times its role
_PRECISE_ANYWAY = (Role.NORM, Role.ROUTER, Role.VISION_PATCH, Role.OTHER)


@dataclass(frozen=True)
class StandOut:
    """A tensor whose error lies far above those of its role in other layers, in the type where it is largest."""

    row: ErrorRow
    value: float
    typical: float  # median error of its role in the same type
    z: float


def measure_of(row: ErrorRow, measure: str) -> float | None:
    """Return `activation_error` or `relative_rms` of a row; None when it has no place on a logarithmic axis."""
    value = getattr(row, measure)
    return value if value is not None and math.isfinite(value) and value > 0 else None


def stand_outs(table: ErrorTable, measure: str, types: Collection[str]) -> list[StandOut]:
    """List the tensors with a robust z-score of log error above `OUTLIER_Z` among their role, worst first."""
    peers: dict[tuple[Role, str], list[tuple[ErrorRow, float]]] = {}
    for row in table.rows:
        value = measure_of(row, measure)
        if value is not None and row.layer is not None and row.type in types and row.role not in _PRECISE_ANYWAY:
            peers.setdefault((row.role, row.type), []).append((row, value))
    worst: dict[str, StandOut] = {}
    for members in peers.values():
        for outlier in _outliers_among(members):
            worst_yet = worst.get(outlier.row.name)
            if worst_yet is None or outlier.value > worst_yet.value:
                worst[outlier.row.name] = outlier
    return sorted(worst.values(), key=lambda outlier: -outlier.z)


def _outliers_among(members: list[tuple[ErrorRow, float]]) -> list[StandOut]:
    if len(members) < MIN_PEERS:
        return []
    logs = [math.log(value) for _, value in members]
    middle = median(logs)
    spread = max(1.4826 * median(abs(log - middle) for log in logs), MIN_LOG_SPREAD)  # 1.4826 MAD is sigma of a normal
    scored = [(*member, (log - middle) / spread) for member, log in zip(members, logs, strict=True)]
    return [StandOut(row, value, math.exp(middle), z) for row, value, z in scored if z > OUTLIER_Z]
