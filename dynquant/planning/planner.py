"""Turns an error table and a budget into a plan: floors by role, exceptions from measurement, the rest by cost.

Floors keep attention, MLA, state-space layers, shared experts, dense layers, embedding and output at 4 bits or more,
and at 6 bits the output of state-space layers, tensors that hold a super expert, and those whose activation error
stands out from their peers. Routed experts and per-layer embeddings have no floor. Floors insure against what the cost
does not see, and have a price: they are lowered together, one step at a time, until the budget holds them and they
raise the predicted KL by no more than FLOOR_PRICE. In models whose routed experts are nearly all weights they cost
nothing; in small ones bytes are worth more elsewhere. Super weights keep 6 bits whatever it costs elsewhere. Every
entry says so.

Without floors a larger budget never has a higher predicted cost. With floors it may, by up to FLOOR_PRICE, where it
first pays for floors that a smaller budget did without.

Tensors that a runtime fuses can be coupled: they take one type, and are one item of the allocation. vLLM fuses layers
itself; its plans have no floors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import NamedTuple

from dynquant.analysis.errors.table import ErrorRow, ErrorTable, Option
from dynquant.analysis.outliers.stand_outs import stand_outs
from dynquant.checkpoints.gguf_layout import padded
from dynquant.checkpoints.tensor_roles import Role, layer_of, role_of
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES, QuantType
from dynquant.formats.storage_format import Choice
from dynquant.planning.allocate import allocate, largest_total, smallest_total, total_cost
from dynquant.planning.target import GATE_UP, QKV
from dynquant.recipes.plan import PlanTarget

FLOOR_LEVELS = (
    ("IQ4_XS", "Q6_K", "Q6_K"), ("Q3_K", "Q4_K", "Q6_K"), ("Q2_K", "Q3_K", "Q6_K"),
    (None, None, "Q6_K"), (None, None, "Q4_K"), (None, None, "Q2_K"), (None, None, None),
)  # fmt: skip
"""Floors of precise roles, of tensors that stand out, and of tensors with a super weight; from the highest down."""
_NO_FLOOR = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN, Role.PER_LAYER_EMBEDDING)
_SENSITIVE = (Role.SSM_OUT,)
"""Roles with the floor of outliers: of all matrices of Qwen3.5 these are where few bits cost most (Unsloth)."""
FLOOR_PRICE = 1.1  # floors of roles and outliers may raise the predicted KL by this factor, but no more
_OUTLIER_TYPES = ("Q2_K", "IQ2_S", "Q3_K", "IQ3_XXS", "Q4_K")
_COUPLED: dict[str, tuple[tuple[Role, ...], ...]] = {
    GATE_UP: (
        (Role.EXPERT_GATE, Role.EXPERT_UP), (Role.SHARED_GATE, Role.SHARED_UP), (Role.FFN_GATE, Role.FFN_UP),
    ),
    QKV: ((Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V),),
}  # fmt: skip
"""Kinds of coupling: the roles that runtimes fuse into one matrix in each layer. llama.cpp fuses none."""
HEADROOM = 1.05  # size of the default plan over the smallest file that keeps every floor


@dataclass(frozen=True)
class Rules:
    """Limits to what the cost decides; without `floors` there are none."""

    floors: bool = True
    outliers: Mapping[str, str] = field(default_factory=dict)  # tensor -> why it should stay precise besides its role
    super_weights: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> the super weight it holds; no average over tokens sees what one scalar does, so this has no price."""
    coupled: tuple[tuple[str, ...], ...] = ()  # groups of tensors that must have one type, see `coupled_tensors`
    target: PlanTarget = "gguf"
    fixed_bytes: int = 0  # size of all but the tensors that have a choice: header, norms, routers, held types
    num_weights: int = 0  # of the model, where refusals should give sizes in bits per weight, too
    fixed_words: str = ""  # what makes the smallest file as large as it is, for refusals
    stored_bytes: Callable[[ErrorRow], int] = lambda row: padded(row.bytes)  # size of a tensor in the file


def plan_types(table: ErrorTable, budget: int | None, rules: Rules) -> dict[str, Choice]:
    """Return type and reason of every tensor in the table, for a file of at most `budget` bytes.

    Minimises the sum of `ErrorTable.cost` over the tensors. Without a budget, the smallest file that keeps every floor
    gets HEADROOM more, for the tensors that gain most from it.

    Raises:
        PlanError: the budget is below the smallest or above the largest possible size (both are named), or coupled
            tensors have no type in common.
    """
    planner = _Planner(table, rules)
    return planner.explained(planner.draft(0, None) if budget is None else planner.best_draft(budget))


def rough_types(table: ErrorTable, budgets: Iterable[int], rules: Rules) -> Iterator[dict[str, str]]:
    """Yield the types of every tensor at each of many budgets, as `plan_types` but for searches that gain up to 0.1 %.

    Raises:
        PlanError: as `plan_types`.
    """
    planner = _Planner(table, rules)
    for budget in budgets:
        yield dict(planner.best_draft(budget, depth=1).types)


def size_range(table: ErrorTable, rules: Rules) -> tuple[int, int]:
    """Return the file bytes with every tensor in its smallest type, and in its largest; floors do not count. Raises
    PlanError: coupled tensors have no type in common."""
    return _Planner(table, rules).size_range


def unit_options(table: ErrorTable, rules: Rules) -> dict[tuple[str, ...], list[Option]]:
    """Return the tensors that take one type together, mostly one alone, and the types that all of them have, with the
    sums of bytes and costs. Raises PlanError: coupled tensors have no type in common."""
    planner = _Planner(table, rules)
    return {planner.groups[first]: options for first, options in planner.all_options.items()}


def check_budget_range(budget: int, smallest: int, largest: int, rules: Rules) -> None:
    """Raise PlanError for a budget outside the sizes that `size_range` returns; both are named, and what is fixed.

    For vLLM a larger budget than can be spent is no error: its largest scheme is BF16, which is the model itself.
    """
    takes, ask = f"between {smallest:,} and {largest:,} bytes", "ask for a size between them"
    if smallest == largest:
        takes, ask = f"{smallest:,} bytes in every plan", f"ask for {smallest:,} bytes"
    elif rules.num_weights:
        takes += f", {_bits(smallest, rules, up=True)} to {_bits(largest, rules, up=False)} bits per weight"
    if rules.target == "vllm":
        if budget < smallest:
            raise PlanError(
                f"The budget of {budget:,} bytes is below the smallest possible size. With these schemes, and "
                f"embedding, head and routers in BF16, this model takes {takes}; {ask}, give other `--types`, or plan "
                "without --for vllm: GGUF has types for embedding and head too."
            )
        return
    how = "below the smallest" if budget < smallest else "above the largest" if budget > largest else None
    if how is not None:
        raise PlanError(
            f"The budget of {budget:,} bytes is {how} possible size. With these candidate types this model takes "
            f"{takes}; {ask}, or give other `--types`." + rules.fixed_words * (budget < smallest)
        )


def _bits(size: int, rules: Rules, *, up: bool) -> str:
    """Return bits per weight with two decimals, rounded so that a budget of so many lies between the sizes."""
    hundredths = 800 * size
    return f"{(-(-hundredths // rules.num_weights) if up else hundredths // rules.num_weights) / 100:.2f}"


def coupled_tensors(names: Iterable[str], kinds: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """For `Rules.coupled`: the tensors of each layer that the given kinds of COUPLINGS hold to one type."""
    all_roles = [roles for kind in kinds for roles in _COUPLED[kind]]
    groups: dict[tuple[str, tuple[Role, ...]], list[str]] = {}
    for name in names:
        layer = name.removesuffix(".weight").rpartition(".")[0]
        for roles in all_roles:
            if role_of(name) in roles and layer_of(name) is not None:
                groups.setdefault((layer, roles), []).append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def outlier_tensors(table: ErrorTable) -> dict[str, float]:
    """Tensors whose activation error stands out from the tensors of the same role, with their robust z-score.

    Judged in one type near 2.6 bits, where errors are large but not yet saturated.
    """
    reference = next((name for name in _OUTLIER_TYPES if name in table.types), None)
    if reference is None:
        return {}
    return {outlier.row.name: outlier.z for outlier in stand_outs(table, "activation_error", (reference,))}


@dataclass(frozen=True)
class _Draft:
    """The best assignment under one level of floors."""

    level: int
    floors: Mapping[str, QuantType | None]
    types: Mapping[str, str]
    cost: float


class _Floored(NamedTuple):
    """The floor of every tensor at one level, and for each group the options that reach it: where none does, the
    largest."""

    floors: Mapping[str, QuantType | None]
    options: Mapping[str, list[Option]]


@dataclass(frozen=True)
class _Planner:
    """One table under one set of rules."""

    table: ErrorTable
    rules: Rules
    _by_level: "dict[int, _Floored]" = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def groups(self) -> Mapping[str, tuple[str, ...]]:
        """First tensor -> all tensors that take one type with it, itself included."""
        first_of = {name: group[0] for group in self.rules.coupled for name in group}
        groups: dict[str, tuple[str, ...]] = {}
        for name in self.table.tensors():
            first = first_of.get(name, name)
            groups[first] = (*groups.get(first, ()), name)
        return groups

    @cached_property
    def exceptions(self) -> Mapping[str, str]:
        """Tensor -> why it should stay precise besides its role."""
        if not self.rules.floors:
            return {}
        scores = outlier_tensors(self.table).items()
        stand_out = {name: f"activation error stands out (robust z {z:.1f})" for name, z in scores}
        return {**stand_out, **self.rules.outliers, **self.rules.super_weights}

    @cached_property
    def size_range(self) -> tuple[int, int]:
        everything, fixed = self.all_options, self.rules.fixed_bytes
        return fixed + smallest_total(everything), fixed + largest_total(everything)

    @cached_property
    def all_options(self) -> Mapping[str, list[Option]]:
        """First tensor of each group -> the types that all tensors of the group have, with the sums of their bytes and
        costs."""
        options: dict[str, list[Option]] = {}
        for first, group in self.groups.items():
            members = [self.table.tensors()[name] for name in group]
            common = [name for name in members[0] if all(name in rows for rows in members)]
            if not common:
                types = [f"`{name}` can be {', '.join(rows)}" for name, rows in zip(group, members, strict=True)]
                raise PlanError(
                    "Coupled tensors must have one type, but no candidate type fits the rows of all of them: "
                    f"{'; '.join(types)}. Give other `--types`, or leave out `--couple`."
                )
            options[first] = []
            for name in common:
                typed = [rows[name] for rows in members]
                size, cost = sum(map(self.rules.stored_bytes, typed)), sum(map(self.table.cost, typed))
                options[first].append(Option(size, cost, name))
        return options

    def best_draft(self, budget: int, depth: int | None = None) -> _Draft:
        """Return the draft under the highest floors that are worth their price. Raises PlanError: the budget is below
        the smallest or above the largest possible size."""
        check_budget_range(budget, *self.size_range, self.rules)
        levels = range(len(FLOOR_LEVELS)) if self.rules.floors else (len(FLOOR_LEVELS) - 1,)
        draft_of = cache(partial(self.draft, budget=budget, depth=depth))
        drafts = filter(None, map(draft_of, levels))  # drawn one by one: the lowest are seldom needed
        if not self.table.sensitivity:  # then costs cannot judge floors: the highest that fit
            return next(drafts)
        no_floors = (level for level in levels if FLOOR_LEVELS[level][0] is None)
        without = next(filter(None, map(draft_of, no_floors)))
        return next(draft for draft in drafts if draft.cost <= FLOOR_PRICE * without.cost or draft is without)

    def draft(self, level: int, budget: int | None, depth: int | None = None) -> _Draft | None:
        """Return the best assignment under a level's floors, or None when the budget does not hold them."""
        floors, options = self._floored(level)
        needed = self.rules.fixed_bytes + smallest_total(options)
        limit = min(int(needed * HEADROOM), self.size_range[1]) if budget is None else budget
        if needed > limit:
            return None
        allocated = allocate(options, limit - self.rules.fixed_bytes, depth=depth)
        types = {name: allocated[first].type for first, group in self.groups.items() for name in group}
        return _Draft(level, floors, types, total_cost(allocated))

    def _floored(self, level: int) -> _Floored:
        if level not in self._by_level:
            floors: dict[str, QuantType | None] = {}
            for group in self.groups.values():
                floors |= dict.fromkeys(group, _highest(self._floor(name, level) for name in group))
            options: dict[str, list[Option]] = {}
            for first, priced in self.all_options.items():
                floor = floors[first]
                least = floor.bits_per_weight if floor else 0
                allowed = [o for o in priced if not floor or QUANT_TYPES[o.type].bits_per_weight >= least]
                options[first] = allowed or [max(priced)]
            self._by_level[level] = _Floored(floors, options)
        return self._by_level[level]

    def _floor(self, name: str, level: int) -> QuantType | None:
        """Return the higher of the floors of its role and of an exception at a level; None where it has neither."""
        if self.rules.target == "vllm":
            return None  # schemes of vLLM are no quant types, and none has fewer than 4 bits
        of_role, of_outlier, of_super_weight = FLOOR_LEVELS[level]
        role = next(iter(self.table.tensors()[name].values())).role
        floors = [None if role in _NO_FLOOR else of_outlier if role in _SENSITIVE else of_role]
        if name in self.exceptions:
            floors.append(of_super_weight if name in self.rules.super_weights else of_outlier)
        return _highest(QUANT_TYPES[floor] for floor in floors if floor)

    def explained(self, draft: _Draft | None) -> dict[str, Choice]:
        """Return type and reason of every tensor, in the order of the table."""
        assert draft is not None
        group_of = {name: group for group in self.groups.values() for name in group}
        return {
            name: Choice(draft.types[name], self._reason(name, group_of[name], draft)) for name in self.table.tensors()
        }

    def _reason(self, name: str, group: tuple[str, ...], draft: _Draft) -> str:
        """Return why a tensor has its type in a draft, as plan.json and the report say it."""
        if self.rules.target == "vllm":
            cost = sum(self.table.cost(row) for member in group if (row := self.table.row(member, draft.types[member])))
            with_others = f", with {len(group) - 1} others that share its scheme" if len(group) > 1 else ""
            return f"best use of the budget{with_others}; {self.table.cost_name} {cost:.2e}"
        row, floor, exception = self.table.row(name, draft.types[name]), draft.floors[name], self.exceptions.get(name)
        assert row is not None
        error = f"weighted error {row.weighted_error:.2%}"
        if len(group) > 1:
            error += f"; coupled, one type with {', '.join(other for other in group if other != name)}"
        why = exception or row.role.value
        if floor:
            highest = self._floored(0).floors[name]
            lowered = f", lowered from {highest.name} at this budget" if highest and highest != floor else ""
            return f"kept: {why}, floor {floor.name}{lowered}; {error}"
        if exception:
            return f"{why}, but bytes are worth more elsewhere at this budget; {error}"
        if row.role.is_routed_expert:
            return f"crushed: routed expert, best use of the budget; {error}"
        has_floor = self.rules.floors and row.role not in _NO_FLOOR
        return f"{why}: no floor{' at this budget' * has_floor}, bytes are worth more elsewhere; {error}"


def _highest(floors: Iterable[QuantType | None]) -> QuantType | None:
    return max((floor for floor in floors if floor), key=lambda floor: floor.bits_per_weight, default=None)
