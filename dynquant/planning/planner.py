"""Turns an error table and a budget into a plan: floors by role, exceptions from measurement, the rest by cost.

Floors keep attention, MLA, shared experts, dense layers, embedding and output at 4 bits or more, and tensors that hold
a super expert or whose activation error stands out from their peers at 6 bits. Routed experts have no floor. Floors
insure against what the cost does not see, and have a price: they are lowered together, one step at a time, until the
budget holds them and they raise the predicted KL by no more than FLOOR_PRICE. In models whose routed experts are nearly
all weights they cost nothing; in small ones bytes are worth more elsewhere. Super weights keep 6 bits whatever it costs
elsewhere. Every entry says so.

Without floors a larger budget never has a higher predicted cost. With floors it may, by up to FLOOR_PRICE, where it
first pays for floors that a smaller budget did without.

Tensors that a runtime fuses can be coupled: they take one type, and are one item of the allocation.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dynquant.analysis.errors.table import ErrorRow, ErrorTable, Option
from dynquant.analysis.outliers.stand_outs import stand_outs
from dynquant.checkpoints.gguf_layout import padded
from dynquant.checkpoints.tensor_roles import Role, layer_of, role_of
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES, QuantType
from dynquant.planning.allocate import allocate, largest_total, smallest_total, total_cost

LEVELS = (
    ("IQ4_XS", "Q6_K", "Q6_K"), ("Q3_K", "Q4_K", "Q6_K"), ("Q2_K", "Q3_K", "Q6_K"),
    (None, None, "Q6_K"), (None, None, "Q4_K"), (None, None, "Q2_K"), (None, None, None),
)  # fmt: skip
"""Floors of precise roles, of tensors that stand out, and of tensors with a super weight; from the highest down."""
FLOOR_PRICE = 1.1
"""Floors of roles and outliers may raise the predicted KL by this factor, but no more."""
_OUTLIER_TYPES = ("Q2_K", "IQ2_S", "Q3_K", "IQ3_XXS", "Q4_K")
COUPLINGS: dict[str, tuple[tuple[Role, ...], ...]] = {
    "gate-up": (
        (Role.EXPERT_GATE, Role.EXPERT_UP), (Role.SHARED_GATE, Role.SHARED_UP), (Role.FFN_GATE, Role.FFN_UP),
    ),
    "qkv": ((Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V),),
}  # fmt: skip
"""Kinds of coupling: the roles that runtimes fuse into one matrix in each layer. llama.cpp fuses none."""
HEADROOM = 1.05
"""Size of the default plan over the smallest file that keeps every floor."""


@dataclass(frozen=True)
class Rules:
    """Limits to what the cost decides; without `floors` there are none."""

    floors: bool = True
    outliers: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> why it should stay precise besides its role, as `expert 3 is a super expert`."""
    super_weights: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> the super weight it holds; no average over tokens sees what one scalar does, so this has no price."""
    coupled: tuple[tuple[str, ...], ...] = ()
    """Groups of tensors that must have one type; no tensor is in two. See `coupled_tensors`."""


@dataclass(frozen=True)
class _Exception:
    """Why a tensor should stay precise besides its role."""

    reason: str
    is_super_weight: bool = False


@dataclass(frozen=True)
class _Draft:
    """The best assignment under one level of floors."""

    level: int
    floors: Mapping[str, QuantType | None]
    types: Mapping[str, str]
    cost: float


def plan_types(
    table: ErrorTable, budget: int | None, rules: Rules, *, fixed_bytes: int = 0
) -> dict[str, tuple[str, str]]:
    """Type and reason of every tensor in the table, for a file of at most `budget` bytes.

    Minimises the sum of `ErrorTable.cost` over the tensors. `fixed_bytes` is what the file holds besides: header,
    norms, routers. Without a budget, the smallest file that keeps every floor gets HEADROOM more, for the tensors that
    gain most from it.

    Raises:
        PlanError: the budget is below the smallest or above the largest possible size (both are named), or coupled
            tensors have no type in common.
    """
    exceptions = _exceptions(table, rules) if rules.floors else {}
    groups = _groups(table, rules)
    smallest, largest = size_range(table, rules, fixed_bytes=fixed_bytes)
    if budget is None:
        return _explain(table, _draft(table, groups, exceptions, 0, fixed_bytes, None, largest), groups, exceptions)
    check_budget_range(budget, smallest, largest)
    levels = range(len(LEVELS)) if rules.floors else (len(LEVELS) - 1,)
    drafts = (_draft(table, groups, exceptions, level, fixed_bytes, budget, largest) for level in levels)
    return _explain(table, _worth_its_floors([draft for draft in drafts if draft], table), groups, exceptions)


def size_range(table: ErrorTable, rules: Rules, *, fixed_bytes: int = 0) -> tuple[int, int]:
    """File bytes with every tensor in its smallest type, and in its largest; floors do not count.

    Raises:
        PlanError: coupled tensors have no type in common.
    """
    everything = _options(table, _groups(table, rules), {})
    return fixed_bytes + smallest_total(everything), fixed_bytes + largest_total(everything)


def check_budget_range(budget: int, smallest: int, largest: int) -> None:
    """Raises PlanError for a budget outside the sizes that `size_range` gives; both are named."""
    how = "below the smallest" if budget < smallest else "above the largest" if budget > largest else None
    if how is not None:
        raise PlanError(
            f"The budget of {budget:,} bytes is {how} possible size. With these candidate types this model takes "
            f"between {smallest:,} and {largest:,} bytes; ask for a size between them, or give other `--types`."
        )


def check_couplings(kinds: Iterable[str]) -> None:
    """Raises PlanError for a kind that is not in COUPLINGS."""
    unknown = next((kind for kind in kinds if kind not in COUPLINGS), None)
    if unknown is not None:
        raise PlanError(f"`--couple {unknown}` is not known; give any of {', '.join(COUPLINGS)}.")


def coupled_tensors(names: Iterable[str], kinds: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """For `Rules.coupled`: the tensors of each layer that the given kinds of COUPLINGS hold to one type."""
    all_roles = [roles for kind in kinds for roles in COUPLINGS[kind]]
    found: dict[tuple[str, tuple[Role, ...]], list[str]] = {}
    for name in names:
        layer = name.removesuffix(".weight").rpartition(".")[0]
        for roles in all_roles:
            if role_of(name) in roles and layer_of(name) is not None:
                found.setdefault((layer, roles), []).append(name)
    return tuple(tuple(group) for group in found.values() if len(group) > 1)


Groups = Mapping[str, tuple[str, ...]]
"""First tensor -> all tensors that take one type with it, itself included."""


def _groups(table: ErrorTable, rules: Rules) -> Groups:
    first_of = {name: group[0] for group in rules.coupled for name in group}
    groups: dict[str, tuple[str, ...]] = {}
    for name in table.tensors():
        first = first_of.get(name, name)
        groups[first] = (*groups.get(first, ()), name)
    return groups


def _draft(
    table: ErrorTable,
    groups: Groups,
    exceptions: Mapping[str, _Exception],
    level: int,
    fixed_bytes: int,
    budget: int | None,
    largest: int,
) -> _Draft | None:
    """The best assignment under a level's floors, or None when the budget does not hold them."""
    own = {name: _floor(rows, exceptions.get(name), level) for name, rows in table.tensors().items()}
    floors = {name: _highest(own[member] for member in group) for group in groups.values() for name in group}
    options = _options(table, groups, floors)
    needed = fixed_bytes + smallest_total(options)
    limit = min(int(needed * HEADROOM), largest) if budget is None else budget
    if needed > limit:
        return None
    chosen = allocate(options, limit - fixed_bytes)
    types = {name: chosen[first].type for first, group in groups.items() for name in group}
    return _Draft(level, floors, types, total_cost(chosen))


def _worth_its_floors(drafts: list[_Draft], table: ErrorTable) -> _Draft:
    """The draft with the highest floors whose price is right; without sensitivities the cost cannot judge them."""
    without = next((draft for draft in drafts if LEVELS[draft.level][0] is None), drafts[-1])
    if not table.sensitivity:
        return drafts[0]
    return next(draft for draft in drafts if draft.cost <= FLOOR_PRICE * without.cost or draft is without)


def _explain(
    table: ErrorTable, draft: _Draft | None, groups: Groups, exceptions: Mapping[str, _Exception]
) -> dict[str, tuple[str, str]]:
    assert draft is not None
    others = {name: [one for one in group if one != name] for group in groups.values() for name in group}
    return {
        name: (type_name, _reason(table.row(name, type_name), draft, exceptions.get(name), others[name]))
        for name, type_name in ((name, draft.types[name]) for name in table.tensors())
    }


def outlier_tensors(table: ErrorTable) -> dict[str, float]:
    """Tensors whose activation error stands out from the tensors of the same role, with their robust z-score.

    Judged in one type near 2.6 bits, where errors are large but not yet saturated.
    """
    reference = next((name for name in _OUTLIER_TYPES if name in table.types), None)
    found = stand_outs(table, "activation_error", (reference,)) if reference else []
    return {one.row.name: one.z for one in found}


def _exceptions(table: ErrorTable, rules: Rules) -> dict[str, _Exception]:
    found = {
        name: _Exception(f"activation error stands out (robust z {z:.1f})")
        for name, z in outlier_tensors(table).items()
    }
    found |= {name: _Exception(reason) for name, reason in rules.outliers.items()}
    return found | {name: _Exception(reason, is_super_weight=True) for name, reason in rules.super_weights.items()}


def _floor(rows: Mapping[str, ErrorRow], exception: _Exception | None, level: int) -> QuantType | None:
    of_role, of_outlier, of_super_weight = LEVELS[level]
    if next(iter(rows.values())).role.is_routed_expert:
        of_role = None
    floors = [of_role]
    if exception:
        floors.append(of_super_weight if exception.is_super_weight else of_outlier)
    return _highest(QUANT_TYPES[name] for name in floors if name)


def _highest(floors: Iterable[QuantType | None]) -> QuantType | None:
    return max((floor for floor in floors if floor), key=lambda one: one.bits_per_weight, default=None)


def _options(table: ErrorTable, groups: Groups, floors: Mapping[str, QuantType | None]) -> dict[str, list[Option]]:
    """Options of every group: the types that all its tensors have, with the sums of their bytes and costs."""
    options: dict[str, list[Option]] = {}
    for first, group in groups.items():
        members = [table.tensors()[name] for name in group]
        common = [name for name in members[0] if all(name in rows for rows in members)]
        if not common:
            raise PlanError(_nothing_in_common(group, members))
        priced = [_priced(table, name, [rows[name] for rows in members]) for name in common]
        allowed = [option for option in priced if _reaches(option.type, floors.get(first))]
        options[first] = allowed or [max(priced)]
    return options


def _priced(table: ErrorTable, type_name: str, rows: list[ErrorRow]) -> Option:
    return Option(sum(padded(row.bytes) for row in rows), sum(table.cost(row) for row in rows), type_name)


def _reaches(type_name: str, floor: QuantType | None) -> bool:
    return floor is None or QUANT_TYPES[type_name].bits_per_weight >= floor.bits_per_weight


def _reason(row: ErrorRow | None, draft: _Draft, exception: _Exception | None, coupled: list[str]) -> str:
    assert row is not None
    floor = draft.floors[row.name]
    error = f"weighted error {row.weighted_error:.2%}"
    if coupled:
        error += f"; coupled, one type with {', '.join(coupled)}"
    why = exception.reason if exception else row.role.value
    if floor:
        lowered = f", lowered from {LEVELS[0][0]} at this budget" if draft.level and not exception else ""
        return f"kept: {why}, floor {floor.name}{lowered}; {error}"
    if exception:
        return f"{why}, but bytes are worth more elsewhere at this budget; {error}"
    if row.role.is_routed_expert:
        return f"crushed: routed expert, best use of the budget; {error}"
    return f"{why}: no floor at this budget, bytes are worth more elsewhere; {error}"


def _nothing_in_common(group: tuple[str, ...], members: list[Mapping[str, ErrorRow]]) -> str:
    held = "; ".join(f"`{name}` can be {', '.join(rows)}" for name, rows in zip(group, members, strict=True))
    return (
        f"Coupled tensors must have one type, but no candidate type fits the rows of all of them: {held}. Give other "
        "`--types`, or leave out `--couple`."
    )
