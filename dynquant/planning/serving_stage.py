"""The stage behind `plan --for vllm`.

It shares statistics and second moments with the GGUF planner: both may work in one folder, with a plan.json each
for its own kind of file.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dynquant.analysis.errors.stage import measure_table
from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.sensitivity.stage import run_probe
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.stage import StatsFile, statistics_in
from dynquant.checkpoints.model import Model
from dynquant.errors import CheckpointError, PlanError
from dynquant.families.linear_layers import LinearCheckpoint, linear_checkpoint
from dynquant.families.open import open_language_model
from dynquant.formats.vllm_schemes import SCHEMES, vllm_scheme
from dynquant.planning.serving_planner import ENCODER, check_schemes_budget, choose_schemes, measure_schemes
from dynquant.recipes.build_plan import plan_for_vllm as build_plan
from dynquant.recipes.build_plan import uniform_schemes
from dynquant.recipes.folder import PLAN_NAME
from dynquant.recipes.plan import Plan
from dynquant.resources import chosen_device, parse_size
from dynquant.session import SILENT, Session

SERVING_ERRORS_NAME = "serving_errors.json"


@dataclass(frozen=True)
class ServingTarget:
    """Goal of a plan for vLLM: a preset `uniform-SCHEME`, bits per weight, a size, or the default."""

    preset: str | None = None
    bpw: float | None = None
    size: str | None = None
    schemes: tuple[str, ...] | None = None
    """Candidates; None for all."""
    mixed_experts: bool = False

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("preset", "bpw", "size") if getattr(self, name) is not None]
        if len(given) > 1:
            raise PlanError(f"Give one of --preset, --bpw and --size, not {' and '.join(given)}.")
        if self.bpw is not None and not 0 < self.bpw <= 32:
            raise PlanError(f"--bpw {self.bpw} is not a number of bits per weight; give one between 4 and 16.")

    @property
    def recipe(self) -> str:
        mixed = ", mixed experts" if self.mixed_experts else ""
        if self.preset:
            return f"preset {self.preset.lower()}"
        if self.bpw is not None:
            return f"bpw {self.bpw:g}{mixed}"
        return (f"size {parse_size(self.size)}" if self.size else "smallest and 5 %") + mixed

    def budget(self, num_weights: int) -> int | None:
        """Bytes of all files, or None for the default."""
        if self.bpw is not None:
            return int(self.bpw * num_weights / 8)
        return parse_size(self.size) if self.size else None


def plan_for_vllm(
    path: str,
    target: ServingTarget,
    options: CalibrationOptions,
    directory: Path,
    session: Session = SILENT,
    *,
    stats_path: Path | None = None,
) -> Plan:
    """Write stats.safetensors, serving_errors.json and plan.json into `directory`."""
    schemes = tuple(vllm_scheme(name).name for name in target.schemes or SCHEMES)
    model = open_language_model(path, session)
    checkpoint = linear_checkpoint(model)
    preset = uniform_schemes(target.preset, checkpoint) if target.preset else None
    budget = target.budget(model.num_weights)
    if budget is not None:
        check_schemes_budget(checkpoint, schemes, budget, mixed_experts=target.mixed_experts)
    stats = statistics_in(directory, model, options, session, stats_path=stats_path)
    if preset is not None:
        made = build_plan(model, checkpoint, preset, recipe=target.recipe, stats_hash=stats.hash)
    else:
        table = _table(model, checkpoint, stats, options, directory, session)
        wanted, cost = choose_schemes(table, checkpoint, schemes, budget, mixed_experts=target.mixed_experts)
        made = build_plan(
            model,
            checkpoint,
            wanted,
            recipe=target.recipe,
            mixed_experts=target.mixed_experts,
            stats_hash=stats.hash,
            weighted_errors={(row.name, row.type): row.weighted_error for row in table.rows},
        )
        promise = {"types": schemes, "objective": table.cost_name, "predicted_kl": cost if table.sensitivity else None}
        made = made.model_copy(update=promise)
    made.save(directory / PLAN_NAME)
    return made


def _table(
    model: Model,
    checkpoint: LinearCheckpoint,
    stats: StatsFile,
    options: CalibrationOptions,
    directory: Path,
    session: Session,
) -> ErrorTable:
    """The table in the directory when it is of these statistics, or a new one; with sensitivities."""
    path = directory / SERVING_ERRORS_NAME
    table = ErrorTable.load(path, known_types=SCHEMES) if path.is_file() else None
    if table is not None and (table.stats_hash, table.fingerprint) == (stats.hash, model.fingerprint):
        session.note(f"reusing {path}")
    else:
        device = chosen_device(session.device)
        identity = {"types": " ".join(SCHEMES), "encoder": f"{ENCODER}, torch {torch.__version__}", "device": device}
        table = measure_table(
            path, model, stats.hash, identity,
            lambda journal, progress: measure_schemes(
                model, checkpoint, stats.stats,
                stats_hash=stats.hash, journal=journal, device=torch.device(device), progress=progress,
            ),
            session,
        )  # fmt: skip
    if not table.sensitivity:
        table = _with_sensitivity(model, table, options, directory, session)
        table.save(path)
    return table


def _with_sensitivity(
    model: Model, table: ErrorTable, options: CalibrationOptions, directory: Path, session: Session
) -> ErrorTable:
    try:
        probe = run_probe(model, options, directory, session, finds_super_weights=False)
    except CheckpointError as error:
        session.note(f"no sensitivities, every layer's relative error counts alike: {error}")
        return table
    return table.with_sensitivity(probe.sensitivity, probe.sensitivity_se)
