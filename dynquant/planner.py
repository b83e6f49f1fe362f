"""Turns an error table and a budget into a plan: floors by role, exceptions from measurement, the rest by cost.

Floors keep attention, MLA, shared experts, dense layers, embedding and output at 4 bits or more; a tensor that holds a
super weight or whose activation error stands out from its peers gets 6 bits. Routed experts have no floor. A budget
that cannot hold the floors lowers them together, one step at a time, and every entry says so.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dynquant.allocate import Option, allocate, largest_total, smallest_total
from dynquant.analysis.error_table import ErrorRow, ErrorTable
from dynquant.analysis.outliers import stand_outs
from dynquant.errors import PlanError
from dynquant.exporters.gguf_header import padded
from dynquant.quant_types import QUANT_TYPES, QuantType

FLOORS = ("IQ4_XS", "Q3_K", "Q2_K", None)
"""Floors of precise roles, tried in this order until the budget holds them."""
EXCEPTION_FLOORS = ("Q6_K", "Q4_K", "IQ4_XS", None)
"""Floors of tensors with a super weight or an outlier error, lowered in step with FLOORS."""
_OUTLIER_TYPES = ("Q2_K", "IQ2_S", "Q3_K", "IQ3_XXS", "Q4_K")
HEADROOM = 1.05
"""Size of the default plan over the smallest file that keeps every floor."""


@dataclass(frozen=True)
class Rules:
    """What the cost may not decide; without `floors` a role keeps nothing precise, exceptions neither."""

    floors: bool = True
    kept: Mapping[str, str] = field(default_factory=dict)
    """Tensor -> why it must stay precise besides its role, as `holds a super weight`."""


def plan_types(
    table: ErrorTable,
    budget: int | None,
    rules: Rules,
    costs: Mapping[tuple[str, str], float],
    *,
    fixed_bytes: int = 0,
) -> dict[str, tuple[str, str]]:
    """Type and reason of every tensor in the table, for a file of at most `budget` bytes.

    `fixed_bytes` is what the file holds besides: header, norms, routers. Without a budget, the smallest file that keeps
    every floor gets HEADROOM more, for the routed experts that gain most from it.

    Raises:
        PlanError: the budget is below the smallest or above the largest possible size; both are named.
    """
    exceptions = _exceptions(table, rules)
    everything = _options(table, costs, {})
    smallest, largest = fixed_bytes + smallest_total(everything), fixed_bytes + largest_total(everything)
    if budget is not None and budget < smallest:
        raise PlanError(_out_of_range("below the smallest", budget, smallest, largest))
    if budget is not None and budget > largest:
        raise PlanError(_out_of_range("above the largest", budget, smallest, largest))
    levels = range(len(FLOORS)) if rules.floors else (len(FLOORS) - 1,)
    for level in levels:
        floors = {name: _floor(rows, exceptions.get(name), level) for name, rows in table.tensors().items()}
        options = _options(table, costs, floors)
        needed = fixed_bytes + smallest_total(options)
        if budget is None:
            budget = min(int(needed * HEADROOM), largest)
        if needed <= budget:
            chosen = allocate(options, budget - fixed_bytes)
            return {
                name: (option.type, _reason(table.row(name, option.type), floors[name], exceptions.get(name), level))
                for name, option in chosen.items()
            }
    raise AssertionError("the last level has no floors")


def weighted_costs(table: ErrorTable) -> dict[tuple[str, str], float]:
    """Cost of a row: its importance-weighted relative squared error.

    Relative to the tensor's own output, so that the early layers, whose activations are small, count as much as the
    late ones; the residual stream is normalised before every use.
    """
    return {(row.name, row.type): row.weighted_error for row in table.rows}


def outlier_tensors(table: ErrorTable) -> dict[str, float]:
    """Tensors whose activation error stands out from the tensors of the same role, with their robust z-score.

    Judged in one type near 2.6 bits, where errors are large but not yet saturated.
    """
    reference = next((name for name in _OUTLIER_TYPES if name in table.types), None)
    found = stand_outs(table, "activation_error", (reference,)) if reference else []
    return {one.row.name: one.z for one in found}


def _exceptions(table: ErrorTable, rules: Rules) -> dict[str, str]:
    found = {name: f"activation error stands out (robust z {z:.1f})" for name, z in outlier_tensors(table).items()}
    return found | dict(rules.kept)


def _floor(rows: Mapping[str, ErrorRow], exception: str | None, level: int) -> QuantType | None:
    role = next(iter(rows.values())).role
    name = EXCEPTION_FLOORS[level] if exception else None if role.is_routed_expert else FLOORS[level]
    return QUANT_TYPES[name] if name else None


def _options(
    table: ErrorTable, costs: Mapping[tuple[str, str], float], floors: Mapping[str, QuantType | None]
) -> dict[str, list[Option]]:
    options: dict[str, list[Option]] = {}
    for name, rows in table.tensors().items():
        allowed = [row for row in rows.values() if _reaches(row.type, floors.get(name))] or [
            _most_precise(rows.values())
        ]
        options[name] = [Option(padded(row.bytes), costs[name, row.type], row.type) for row in allowed]
    return options


def _reaches(type_name: str, floor: QuantType | None) -> bool:
    return floor is None or QUANT_TYPES[type_name].bits_per_weight >= floor.bits_per_weight


def _most_precise(rows: Iterable[ErrorRow]) -> ErrorRow:
    return max(rows, key=lambda row: row.bytes)


def _reason(row: ErrorRow | None, floor: QuantType | None, exception: str | None, level: int) -> str:
    assert row is not None
    error = f"weighted error {row.weighted_error:.2%}"
    is_expert = row.role.is_routed_expert
    lowered = f"; floors lowered to {FLOORS[level] or 'none'} by the budget" if level and not is_expert else ""
    if exception:
        return f"kept: {exception}, floor {floor.name if floor else 'none'}; {error}{lowered}"
    if is_expert:
        return f"crushed: routed expert, best use of the budget; {error}"
    return f"kept: {row.role.value}, floor {floor.name if floor else 'none'}; {error}{lowered}"


def _out_of_range(how: str, budget: int, smallest: int, largest: int) -> str:
    return (
        f"The budget of {budget:,} bytes is {how} possible size. With these candidate types this model "
        f"takes between {smallest:,} and {largest:,} bytes; ask for a size between them, or give other `--types`."
    )
