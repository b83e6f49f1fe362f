"""One budget, any pricing: the types or schemes that the planner takes for a table.

Plans are tried by their types alone, so the reasons that `planner` gives are kept here until a plan is taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dynquant.analysis.errors.measure import tensor_formats, unmeasured_table
from dynquant.analysis.errors.measure_schemes import scheme_formats
from dynquant.analysis.errors.table import ErrorTable, Option
from dynquant.analysis.outliers.super_experts import find_super_experts
from dynquant.calibration.stage import StatsFile
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_layout import padded
from dynquant.checkpoints.model import Model
from dynquant.errors import PlanError
from dynquant.families.linear_layers import LinearCheckpoint
from dynquant.formats.quant_types import fit_to_row, fits_blocks, quant_type
from dynquant.formats.storage_format import Choice
from dynquant.formats.vllm_schemes import BF16, SCHEMES
from dynquant.planning.frontier import fixed_recipes
from dynquant.planning.planner import (
    Rules,
    check_budget_range,
    coupled_tensors,
    plan_types,
    size_range,
    unit_options,
)
from dynquant.planning.target import Target
from dynquant.recipes.build_plan import UNIFORM, fixed_bytes, fixed_sizes
from dynquant.recipes.folder import SuperWeight
from dynquant.recipes.held_types import held_types
from dynquant.recipes.plan_notes import fixed_words
from dynquant.recipes.sizes import fixed_safetensors_bytes, safetensors_bytes_at_most
from dynquant.session import Session

_NAMED_STATISTICS = 1024  # bytes of a file's header, at most, that name the statistics it was made with


class _Explained:
    """Plans that were chosen, with the reason of every type."""

    def __init__(self) -> None:
        self._reasons: dict[tuple[tuple[str, str], ...], dict[str, Choice]] = {}

    def explained(self, types: Mapping[str, str]) -> dict[str, Choice]:
        """Return types that were chosen before, with their reasons."""
        return self._reasons[tuple(sorted(types.items()))]

    def _types(self, choices: dict[str, Choice]) -> dict[str, str]:
        """Keep the reasons of a plan, and return its types."""
        types = {name: choice.type for name, choice in choices.items()}
        self._reasons[tuple(sorted(types.items()))] = choices
        return types


class Chooser(_Explained):
    """Types at the target's budget for any pricing of a table, with the reason of each kept."""

    def __init__(
        self, model: Model, target: Target, stats: StatsFile, table: ErrorTable, rules: Rules, session: Session
    ) -> None:
        super().__init__()
        self.context = {"recipe": target.recipe, "stats": stats.stats, "stats_hash": stats.hash}
        self.model, self.target, self.session = model, target, session
        held = held_types(model, target.mtp_type)
        fixed = fixed_bytes(model, table.tensors(), held, **self.context)
        words = _fixed_words(model, table, held, stats.stats)
        for kind in target.couple:
            if not coupled_tensors(table.tensors(), (kind,)):
                session.note(f"--couple {kind}: this model has no such tensors")
        coupled = coupled_tensors(table.tensors(), target.couple)
        rules = replace(rules, coupled=coupled, fixed_bytes=fixed, fixed_words=words, num_weights=model.num_weights)
        self._rules = {flag: replace(rules, floors=flag) for flag in (True, False)}
        self.memory = target.memory(model)

    def __call__(self, table: ErrorTable, *, floors: bool = True, file_bytes: int | None = None) -> dict[str, str]:
        """Return the type of every tensor that has a choice, at the target's budget or the size nearest `file_bytes`.
        Raises PlanError: as `plan_types`."""
        allowed = self.allowed(table)
        rules = self._rules[floors and self.target.floors]
        return self._types(plan_types(allowed, self._budget(allowed, rules, file_bytes), rules))

    def allowed(self, table: ErrorTable) -> ErrorTable:
        """Return the rows that the target leaves to choose from."""
        return self.target.allowed(table)

    def units(self, table: ErrorTable) -> dict[tuple[str, ...], list[Option]]:
        """Return tensors that share their type, and their options; see `unit_options`."""
        return unit_options(table, self._rules[False])

    def _budget(self, table: ErrorTable, rules: Rules, wanted: int | None) -> int | None:
        """File bytes: the target's, None for the planner's default, or the possible size nearest to `wanted`."""
        if wanted is not None:
            smallest, largest = size_range(table, rules)
            return max(smallest, min(largest, wanted))
        if self.memory is not None:
            return self.memory.file_budget(*size_range(table, rules), rules.fixed_words)
        return self.target.budget(self.model.num_weights)

    def recipes(self, table: ErrorTable) -> dict[str, dict[str, str]]:
        """Return the stored types of every fixed recipe, of the tensors that have a choice."""
        columns = {name: self.model.source.info(name).shape[-1] for name in table.tensors()}
        return {
            label: {name: fit_to_row(quant_type(recipe[name]), width)[0].name for name, width in columns.items()}
            for label, recipe in fixed_recipes(self.model).items()
        }

    def file_bytes(self, types: Mapping[str, str]) -> int:
        """Bytes of the whole file."""
        shapes = {name: self.model.source.info(name).shape for name in types}
        sizes = (padded(quant_type(types[name]).tensor_bytes(shape)) for name, shape in shapes.items())
        return self._rules[False].fixed_bytes + sum(sizes)


def check_budget(model: Model, target: Target, types: Sequence[str], stats: CalibrationStats | None) -> None:
    """Refuse a budget that no choice among `types` meets, before a tensor is measured.

    Without statistics, only what none of them could mend is refused; sizes lack the bytes that name them in the file,
    for which the range that is told has room.

    Raises:
        PlanError: as `plan_types` and `MemoryBudget.file_budget`.
    """
    memory, table = target.memory(model), unmeasured_table(model, tensor_formats(model, stats, types), types)
    any_hash = None if stats is None else "0" * 64  # as long as a real one
    held = held_types(model, target.mtp_type)
    rules = Rules(
        coupled=coupled_tensors(table.tensors(), target.couple),
        fixed_bytes=fixed_bytes(model, table.tensors(), held, recipe=target.recipe, stats=stats, stats_hash=any_hash),
        fixed_words=_fixed_words(model, table, held, stats),
        num_weights=model.num_weights,
    )
    smallest, largest = size_range(target.allowed(table), rules)
    if memory is not None:
        memory.file_budget(smallest, largest, rules.fixed_words)
        return
    budget, unknown = target.budget(model.num_weights), 0 if stats is not None else _NAMED_STATISTICS
    if budget is not None and budget < smallest:
        smallest += unknown
    if budget is not None and not largest < budget <= largest + unknown:
        check_budget_range(budget, smallest, max(smallest, largest), rules)


def _fixed_words(model: Model, table: ErrorTable, held: Mapping[str, Choice], stats: CalibrationStats | None) -> str:
    """Return which bytes no candidate type makes smaller: those of tensors without a choice, of matrices whose rows
    fit no type's blocks, and of matrices whose smallest types need statistics that they do not have."""
    smallest = {name: min(rows.values(), key=lambda row: row.bytes).type for name, rows in table.tensors().items()}
    unread = {
        name: type_name
        for name, type_name in smallest.items()
        if not (model.reads_input(name) if stats is None else stats.input_of(name))
    }
    uncut = {
        name: model.source.info(name).shape[-1]
        for name, type_name in smallest.items()
        if quant_type(type_name).is_float and not fits_blocks(model.source.info(name).shape[-1])
    }
    return fixed_words(fixed_sizes(model, table.tensors(), held), unread, uncut)


def rules_of(supers: Sequence[SuperWeight], stats: CalibrationStats) -> Rules:
    """Return rules by which tensors that hold super weights or super experts should stay precise."""
    experts = {
        expert.name: f"expert {expert.expert} is a super expert (output {expert.ratio:.0f} times the median)"
        for expert in find_super_experts(stats)
    }
    weights = {weight.name: f"holds the super weight [{weight.row},{weight.col}]" for weight in supers}
    return Rules(outliers=experts, super_weights=weights)


class SchemeChooser(_Explained):
    """Schemes of the linear layers of a checkpoint, out of those named in `schemes`, for files of at most `budget`
    bytes.

    Layers that vLLM fuses are coupled, there are no floors, and sizes are those of safetensors with their headers.

    Raises:
        PlanError: none of the schemes fits a layer, and BF16 is not among them.
    """

    def __init__(
        self,
        checkpoint: LinearCheckpoint,
        schemes: Sequence[str],
        mixed_experts: bool = False,
        *,
        budget: int | None = None,
    ) -> None:
        super().__init__()
        self.candidates = candidates = checkpoint.candidates(schemes, mixed_experts=mixed_experts)
        self._budget = budget
        units = checkpoint.units(mixed_experts=mixed_experts).values()
        for linear in checkpoint.linears:
            if "BF16" not in schemes and candidates[linear.name] == [BF16]:
                rows, columns = linear.shard
                raise PlanError(
                    f"None of {', '.join(schemes)} can hold `{linear.name}`, {rows:,} rows and {columns:,} columns on "
                    "each GPU: groups and zero points are to divide them, and not every scheme is for experts. Add "
                    "bf16 or another scheme to --types."
                )
        self._formats = scheme_formats(checkpoint, candidates)
        self._bytes = {
            (linear.name, scheme.name): safetensors_bytes_at_most(linear.stored_as(scheme))
            for linear in checkpoint.linears
            for scheme in candidates[linear.name]
        }
        self._rules = Rules(
            floors=False, coupled=tuple(tuple(linear.name for linear in unit) for unit in units), target="vllm",
            fixed_bytes=fixed_safetensors_bytes(checkpoint), stored_bytes=lambda row: self._bytes[row.name, row.type],
        )  # fmt: skip

    def __call__(self, table: ErrorTable, *, floors: bool = True, file_bytes: int | None = None) -> dict[str, str]:
        """Return the scheme of every linear layer, as `Chooser` returns types."""
        del floors  # schemes have none
        allowed, budget = self.allowed(table), self._budget
        if file_bytes is not None:
            smallest, largest = size_range(allowed, self._rules)
            budget = max(smallest, min(largest, file_bytes))
        return self._types(plan_types(allowed, budget, self._rules))

    def choose(self, table: ErrorTable) -> dict[str, Choice]:
        """Return scheme and reason of every linear layer. Raises PlanError: the budget is below the smallest possible
        size; the range is named."""
        return self.explained(self(table))

    def check_budget(self, model: Model) -> None:
        """Raise PlanError for a budget that `choose` would refuse, before anything is measured."""
        if self._budget is not None:
            sizes = size_range(unmeasured_table(model, self._formats, ()), self._rules)
            check_budget_range(self._budget, *sizes, replace(self._rules, num_weights=model.num_weights))

    def allowed(self, table: ErrorTable) -> ErrorTable:
        """Return the rows of candidates."""
        return table.with_rows(row for row in table.rows if (row.name, row.type) in self._bytes)

    def units(self, table: ErrorTable) -> dict[tuple[str, ...], list[Option]]:
        """Return layers that share their scheme, and their options; see `unit_options`."""
        return unit_options(table, self._rules)

    def recipes(self, table: ErrorTable) -> dict[str, dict[str, str]]:
        """Return plans of one scheme, of those that all layers can have."""
        uniform = {name: dict.fromkeys(table.tensors(), name) for name in SCHEMES}
        return {UNIFORM + name.lower(): types for name, types in uniform.items() if types.items() <= self._bytes.keys()}

    def file_bytes(self, types: Mapping[str, str]) -> int:
        """Return the bytes of all files, at most."""
        return self._rules.fixed_bytes + sum(self._bytes[pair] for pair in types.items())
