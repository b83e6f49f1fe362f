"""What the plots and the report are drawn from, and the reductions that they share.

Super weights, frontier points and coverage come from other stages; only the attributes read here are required of them.
Also: the role groups of the panels, which types to show, and which tensors stick out.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Protocol

from dynquant.analysis.error_table import ErrorRow, ErrorTable
from dynquant.architecture import Role
from dynquant.errors import PlanError
from dynquant.plan import Plan, PlanEntry
from dynquant.quant_types import QUANT_TYPES
from dynquant.statistics import CalibrationStats

OUTLIER_Z = 3.5
"""Iglewicz and Hoaglin's usual bound for the modified z-score."""
MIN_PEERS = 5
"""Fewer tensors of one role than this give no spread to compare against."""
MIN_LOG_SPREAD = 0.1
"""Floor of the spread in log units: an outlier is at least exp(0.35) = 1.4 times its role."""
MAX_TYPES = 7
"""More lines than this in one panel cannot be told apart."""


class SuperWeight(Protocol):
    """One detected super weight; `expert` is None outside stacked tensors. Maxima may be signed."""

    @property
    def name(self) -> str: ...
    @property
    def row(self) -> int: ...
    @property
    def col(self) -> int: ...
    @property
    def expert(self) -> int | None: ...
    @property
    def value(self) -> float: ...
    @property
    def max_in(self) -> float: ...
    @property
    def max_out(self) -> float: ...


class FrontierPoint(Protocol):
    """One plan on the size/error curve; `kind` is `plan` (the planner at some budget), `uniform` or `preset`."""

    @property
    def label(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def error(self) -> float: ...
    @property
    def kind(self) -> str: ...


class StarvedExpert(Protocol):
    """One expert that saw too few calibration tokens to be measured on its own."""

    @property
    def name(self) -> str: ...
    @property
    def expert(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class Coverage(Protocol):
    """What the calibration says of its experts."""

    @property
    def starved(self) -> Sequence[StarvedExpert]: ...


GROUPS = ("attention", "dense FFN", "shared expert", "routed gate/up", "routed down")
OUTSIDE = "outside the layers"


def group_of(role: Role) -> str | None:
    """The panel of a role, None for routers, norms and others, which stay precise anyway."""
    if role.is_attention:
        return "attention"
    if role.is_dense_ffn:
        return "dense FFN"
    if role.is_shared_expert:
        return "shared expert"
    if role.is_routed_expert:
        return "routed down" if role.is_down_projection else "routed gate/up"
    return OUTSIDE if role in (Role.EMBEDDING, Role.OUTPUT) else None


def role_group(role: Role) -> str:
    """The line of a role in size tables: the panel's name, or embedding, output, and the small rest."""
    if role in (Role.EMBEDDING, Role.OUTPUT):
        return role.value
    return group_of(role) or "router/norm/other"


def bits_of(entries: Iterable[PlanEntry]) -> float:
    """Mean bits per weight of some tensors, 0 for none."""
    entries = list(entries)
    weights = sum(prod(entry.shape) for entry in entries)
    return 8 * sum(entry.bytes for entry in entries) / weights if weights else 0.0


def check_same_checkpoint(plan: Plan, table: ErrorTable | None, stats: CalibrationStats | None) -> None:
    """Refuse an error table or statistics of another checkpoint than the plan's.

    Raises:
        PlanError: the table's fingerprint differs; both are named.
        StatsError: the statistics' fingerprint differs.
    """
    if table is not None and table.fingerprint != plan.fingerprint:
        raise PlanError(
            f"The error table was measured on checkpoint {table.fingerprint[:12]} ({table.model}), but the plan is for "
            f"{plan.fingerprint[:12]} ({plan.model}). Run `dynquant analyze` on {plan.model}."
        )
    if stats is not None:
        stats.check_belongs_to(plan.fingerprint, plan.model)


def shown_types(table: ErrorTable, plan: Plan) -> list[str]:
    """At most `MAX_TYPES` measured types, fewest bits first: those of the plan, then an even choice of the others."""
    measured = sorted(set(table.types), key=lambda name: (QUANT_TYPES[name].bits_per_weight, name))
    if len(measured) <= MAX_TYPES:
        return measured
    weights: dict[str, int] = {}
    for entry in plan.entries:
        if entry.type in measured and group_of(entry.role):
            weights[entry.type] = weights.get(entry.type, 0) + prod(entry.shape)
    chosen = set(sorted(weights, key=lambda name: -weights[name])[:MAX_TYPES])
    others = [name for name in measured if name not in chosen]
    free = MAX_TYPES - len(chosen)
    chosen |= {others[(2 * i + 1) * len(others) // (2 * free)] for i in range(free)}
    return [name for name in measured if name in chosen]


@dataclass(frozen=True)
class StandOut:
    """A tensor whose error lies far above those of its role in other layers, in the type where it is largest."""

    row: ErrorRow
    value: float
    typical: float
    """Median error of its role in the same type."""
    z: float


def measure_of(row: ErrorRow, measure: str) -> float | None:
    """`activation_error` or `relative_rms` of a row; None when absent, zero or not finite (no place on a log axis)."""
    value = getattr(row, measure)
    return value if value is not None and math.isfinite(value) and value > 0 else None


def stand_outs(table: ErrorTable, measure: str, types: Sequence[str]) -> list[StandOut]:
    """Tensors with a robust z-score of log error above `OUTLIER_Z` among their role, worst first."""
    peers: dict[tuple[Role, str], list[tuple[ErrorRow, float]]] = {}
    for row in table.rows:
        value = measure_of(row, measure)
        if value is not None and row.layer is not None and row.type in types and group_of(row.role):
            peers.setdefault((row.role, row.type), []).append((row, value))
    worst: dict[str, StandOut] = {}
    for members in peers.values():
        for found in _outliers_among(members):
            known = worst.get(found.row.name)
            if known is None or found.value > known.value:
                worst[found.row.name] = found
    return sorted(worst.values(), key=lambda found: -found.z)


def _outliers_among(members: list[tuple[ErrorRow, float]]) -> list[StandOut]:
    if len(members) < MIN_PEERS:
        return []
    logs = [math.log(value) for _, value in members]
    middle = median(logs)
    spread = max(1.4826 * median(abs(log - middle) for log in logs), MIN_LOG_SPREAD)
    return [
        StandOut(row, value, math.exp(middle), (log - middle) / spread)
        for (row, value), log in zip(members, logs, strict=True)
        if log - middle > OUTLIER_Z * spread
    ]
