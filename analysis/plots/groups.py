"""Data of the plots and the report, and the reductions that they share.

The role groups of the panels, which types to show, and mean bits of some tensors.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.outliers.token_errors import TokenErrors
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.tensor_roles import Role
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.planning.frontier import FrontierPoint
from dynquant.planning.selecting.selection import Selection
from dynquant.recipes.folder import SuperWeight
from dynquant.recipes.plan import Plan, PlanEntry

MAX_TYPES = 7  # more lines than this in one panel cannot be told apart


@dataclass(frozen=True)
class PlanResults:
    """A plan and all that is known about it. What is None or empty was not measured, and its plots are not drawn."""

    plan: Plan
    table: ErrorTable | None = None
    stats: CalibrationStats | None = None
    super_weights: Sequence[SuperWeight] = ()
    frontier: Sequence[FrontierPoint] = ()
    selection: Selection | None = None
    token_errors: TokenErrors | None = None

    def check_same_checkpoint(self) -> None:
        """Refuse an error table or statistics of another checkpoint than the plan's.

        Raises:
            PlanError: the table's fingerprint differs; both are named.
            StatsError: the statistics' fingerprint differs.
        """
        plan, table = self.plan, self.table
        if table is not None and table.fingerprint != plan.fingerprint:
            raise PlanError(
                f"The error table was measured on checkpoint {table.fingerprint[:12]} ({table.model}), but the plan is "
                f"for {plan.fingerprint[:12]} ({plan.model}). Run `dynquant analyze` on {plan.model}."
            )
        if self.stats is not None:
            self.stats.check_belongs_to(plan.fingerprint, plan.model, plan.settings)


PROJECTOR = "projector"
GROUPS = (
    "attention", "state-space", "cross-attention", "dense FFN", "shared expert", "routed gate/up", "routed down",
    "per-layer inputs", "predicts ahead (MTP)", "vision attention", "vision FFN", PROJECTOR,
)  # fmt: skip
OUTSIDE = "outside the layers"
_OF_ROLE = {
    Role.CHANNEL_MIX: "dense FFN", Role.EXPERT_LATENT: "dense FFN", Role.PER_LAYER_PROJ: "per-layer inputs",
    Role.MTP: "predicts ahead (MTP)",
    Role.CROSS_ATTN: "cross-attention", Role.VISION_ATTN: "vision attention", Role.VISION_FFN: "vision FFN",
    Role.PROJECTOR: PROJECTOR,
}  # fmt: skip


def group_of(role: Role) -> str | None:
    """The panel of a role, None for routers, norms and others, which stay precise anyway."""
    if role in _OF_ROLE:
        return _OF_ROLE[role]
    if role.is_attention:
        return "attention"
    if role.is_recurrent:
        return "state-space"
    if role.is_dense_ffn:
        return "dense FFN"
    if role.is_shared_expert:
        return "shared expert"
    if role.is_routed_expert:
        return "routed down" if role.is_down_projection else "routed gate/up"
    return OUTSIDE if role.is_embedding or role is Role.OUTPUT else None


def role_group(role: Role) -> str:
    """The line of a role in size tables: the panel's name, or embeddings, output, and the small rest."""
    if group_of(role) == OUTSIDE:
        return role.value.replace("_", " ")
    return group_of(role) or "router/norm/other"


def bits_of(entries: Iterable[PlanEntry]) -> float:
    """Mean bits per weight of some tensors, 0 for none."""
    entries = list(entries)
    weights = sum(prod(entry.shape) for entry in entries)
    return 8 * sum(entry.bytes for entry in entries) / weights if weights else 0.0


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
