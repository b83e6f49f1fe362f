"""Plans for vLLM: a scheme for every unit of linear layers that vLLM fuses, within a budget for all files.

The planner is that of GGUF types. What differs is the table (`scheme_table`), the rules (units are coupled, there are
no floors) and the sizes (safetensors with their headers). Statistics and second moments are shared: both kinds of plans
may be made in one folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dynquant.analysis.errors.measure_schemes import unmeasured_scheme_table
from dynquant.analysis.errors.stage import scheme_table
from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.analysis.sensitivity.stage import run_probe
from dynquant.calibration.stage import statistics_in
from dynquant.checkpoints.model import Model
from dynquant.errors import CheckpointError
from dynquant.families.linear_layers import LinearCheckpoint, linear_checkpoint
from dynquant.families.open import open_language_model
from dynquant.formats.storage_format import Choice
from dynquant.formats.vllm_schemes import SCHEMES, Scheme, vllm_scheme
from dynquant.planning.options import PlanOptions
from dynquant.planning.planner import Rules, check_budget_range, plan_types, size_range
from dynquant.recipes.build_plan import plan_for_vllm, uniform_schemes
from dynquant.recipes.folder import SCHEME_ERRORS_NAME
from dynquant.recipes.plan import Plan
from dynquant.recipes.sizes import fixed_safetensors_bytes, safetensors_bytes_at_most
from dynquant.session import Session
from dynquant.storage.atomic import file_hash


@dataclass(frozen=True)
class SchemeChooser:
    """Schemes of the linear layers of a checkpoint, out of those named in `schemes`."""

    checkpoint: LinearCheckpoint
    schemes: Sequence[str]
    mixed_experts: bool = False

    @cached_property
    def candidates(self) -> dict[str, list[Scheme]]:
        """The schemes that each linear layer may have, by its name."""
        return self.checkpoint.candidates(self.schemes, mixed_experts=self.mixed_experts)

    @cached_property
    def rules(self) -> Rules:
        units = self.checkpoint.units(mixed_experts=self.mixed_experts).values()
        return Rules(
            floors=False, coupled=tuple(tuple(linear.name for linear in unit) for unit in units), target="vllm"
        )

    @cached_property
    def sizes(self) -> dict[str, object]:
        """Return what the planner must know of the files."""
        stored = {
            (linear.name, scheme.name): safetensors_bytes_at_most(linear.stored_as(scheme))
            for linear in self.checkpoint.linears
            for scheme in self.candidates[linear.name]
        }

        def stored_bytes(row: ErrorRow) -> int:
            return stored[row.name, row.type]

        return {"fixed_bytes": fixed_safetensors_bytes(self.checkpoint), "stored_bytes": stored_bytes}

    def check_budget(self, model: Model, budget: int) -> None:
        """Refuse a budget that `choose` would refuse, before anything is measured.

        Raises:
            PlanError: as `choose`.
        """
        table = unmeasured_scheme_table(model, self.checkpoint, self.candidates)
        check_budget_range(budget, *size_range(table, self.rules, **self.sizes), "vllm")

    def choose(self, table: ErrorTable, budget: int | None) -> dict[str, Choice]:
        """Return scheme and reason of every linear layer for files of at most `budget` bytes.

        Without a budget, the smallest checkpoint gets `planner.HEADROOM` more.

        Raises:
            PlanError: the budget is below the smallest possible size; the range is named.
        """
        allowed = {(name, scheme.name) for name, schemes in self.candidates.items() for scheme in schemes}
        rows = table.with_rows(row for row in table.rows if (row.name, row.type) in allowed)
        return plan_types(rows, budget, self.rules, **self.sizes)


def plan_schemes(options: PlanOptions, session: Session) -> Plan:
    """Choose a scheme for every linear layer; return the plan, and leave the table of their errors in the folder."""
    target = options.target
    schemes = tuple(vllm_scheme(name).name for name in target.types or SCHEMES)
    model = open_language_model(str(options.model), session)
    checkpoint = linear_checkpoint(model)
    chooser = SchemeChooser(checkpoint, schemes, target.mixed_experts)
    uniform = uniform_schemes(target.preset, checkpoint) if target.preset else None
    budget = target.budget(model.num_weights)
    if budget is not None:
        chooser.check_budget(model, budget)
    stats = statistics_in(options.output, model, options.calibration, session, stats_path=options.stats)
    if uniform is not None:
        return plan_for_vllm(model, checkpoint, uniform, recipe=target.recipe, stats_hash=stats.hash)
    path = options.output / SCHEME_ERRORS_NAME
    table = _with_sensitivity(model, scheme_table(model, checkpoint, stats, path, session), options, path, session)
    chosen = chooser.choose(table, budget)
    plan = plan_for_vllm(
        model,
        checkpoint,
        chosen,
        recipe=target.recipe,
        mixed_experts=target.mixed_experts,
        stats_hash=stats.hash,
        weighted_errors={(row.name, row.type): row.weighted_error for row in table.rows},
    )
    predicted = table.price_of({name: choice.type for name, choice in chosen.items()}) if table.sensitivity else None
    return plan.model_copy(
        update={
            "types": schemes,
            "objective": table.cost_name,
            "errors_hash": file_hash(path),
            "predicted_kl": predicted and predicted.kl,
            "predicted_kl_se": predicted and predicted.se,
        }
    )


def _with_sensitivity(
    model: Model, table: ErrorTable, options: PlanOptions, path: Path, session: Session
) -> ErrorTable:
    if table.sensitivity:
        return table
    try:
        probe = run_probe(model, options.calibration, options.output, session, finds_super_weights=False)
    except CheckpointError as error:
        session.note(f"no sensitivities, every layer's relative error counts alike: {error}")
        return table
    table = table.with_sensitivity(probe.sensitivity, probe.sensitivity_se)
    table.save(path)
    return table
