"""The stages behind `plan --for vllm` and `export -f compressed-tensors`.

They share statistics and second moments with the GGUF planner: both may work in one directory, with a plan.json each
for its own kind of file.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dynquant.analysis.errors.stage import measure_table
from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.report.stage import PLAN_NAME, STATS_NAME, stats_of_plan
from dynquant.calibration.second_moments import load_beside, path_beside
from dynquant.calibration.stage import CalibrationOptions, run_calibration, run_probe
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model
from dynquant.cli.terminal import console
from dynquant.encoding.stream import Guidance, guidance_of
from dynquant.errors import CheckpointError, ExportError, PlanError
from dynquant.exporters.compressed_card import transformers_problem
from dynquant.exporters.compressed_tensors import export_compressed_tensors
from dynquant.families.linear_layers import ServedCheckpoint, served_checkpoint
from dynquant.formats.vllm_schemes import SCHEMES, serving_scheme
from dynquant.planning.serving_planner import ENCODER, check_schemes_budget, choose_schemes, measure_schemes
from dynquant.planning.stage import open_language_model, statistics_of
from dynquant.planning.target import parse_size
from dynquant.recipes.serving_building import preset_schemes, serving_plan
from dynquant.recipes.serving_plan import ServingPlan
from dynquant.resources import chosen_device
from dynquant.storage.atomic import file_hash

SERVING_ERRORS_NAME = "serving_errors.json"


@dataclass(frozen=True)
class ServingTarget:
    """What a plan for vLLM should reach: a preset `uniform-SCHEME`, bits per weight, a size, or the default."""

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
    *,
    stats_path: Path | None = None,
) -> ServingPlan:
    """Write stats.safetensors, serving_errors.json and plan.json into `directory`."""
    schemes = tuple(serving_scheme(name).name for name in target.schemes or SCHEMES)
    model = open_language_model(path)
    checkpoint = served_checkpoint(model)
    preset = preset_schemes(target.preset, checkpoint) if target.preset else None
    budget = target.budget(model.num_weights)
    if budget is not None:
        check_schemes_budget(checkpoint, schemes, budget, mixed_experts=target.mixed_experts)
    stats, stats_hash = statistics_of(model, options, directory, stats_path)
    if preset is not None:
        made = serving_plan(model, checkpoint, preset, recipe=target.recipe, stats_hash=stats_hash)
    else:
        table = _table(model, checkpoint, stats, stats_hash, options, directory)
        wanted, cost = choose_schemes(table, checkpoint, schemes, budget, mixed_experts=target.mixed_experts)
        made = serving_plan(
            model, checkpoint, wanted,
            recipe=target.recipe, mixed_experts=target.mixed_experts, stats_hash=stats_hash, schemes=schemes,
            objective=table.cost_name, predicted_kl=cost if table.sensitivity else None,
            weighted_errors={(row.name, row.type): row.weighted_error for row in table.rows},
        )  # fmt: skip
    made.save(directory / PLAN_NAME)
    return made


def _table(
    model: Model,
    checkpoint: ServedCheckpoint,
    stats: CalibrationStats,
    stats_hash: str,
    options: CalibrationOptions,
    directory: Path,
) -> ErrorTable:
    """The table in the directory when it is of these statistics, or a new one; with sensitivities."""
    path = directory / SERVING_ERRORS_NAME
    table = ErrorTable.load(path, known_types=SCHEMES) if path.is_file() else None
    if table is not None and (table.stats_hash, table.fingerprint) == (stats_hash, model.fingerprint):
        console.note(f"reusing {path}")
    else:
        device = chosen_device(options.device)
        identity = {"types": " ".join(SCHEMES), "encoder": f"{ENCODER}, torch {torch.__version__}", "device": device}
        table = measure_table(
            path, model, stats_hash, identity,
            lambda journal, progress: measure_schemes(
                model, checkpoint, stats,
                stats_hash=stats_hash, journal=journal, device=torch.device(device), progress=progress,
            ),
        )  # fmt: skip
    if not table.sensitivity:
        table = _with_sensitivity(model, table, options, directory)
        table.save(path)
    return table


def _with_sensitivity(model: Model, table: ErrorTable, options: CalibrationOptions, directory: Path) -> ErrorTable:
    try:
        probe = run_probe(model, options, directory, finds_super_weights=False)
    except CheckpointError as error:
        console.note(f"no sensitivities, every layer's relative error counts alike: {error}")
        return table
    return table.with_sensitivity(probe.sensitivity, probe.sensitivity_se)


def export_for_vllm(
    path: str,
    output: Path,
    *,
    plan_path: Path | None = None,
    preset: str | None = None,
    stats_path: Path | None = None,
    calibration: CalibrationOptions | None = None,
    device: str | None = None,
    split_max_size: str | None = None,
    resume: bool = True,
) -> list[Path]:
    """Write the compressed-tensors checkpoint of a serving plan, or of a preset without a plan file.

    Raises:
        PlanError, StatsError, EncodeError, ExportError: see `export_compressed_tensors`.
    """
    if (plan_path is None) == (preset is None):
        raise PlanError("Give either --plan FILE (of `dynquant plan --for vllm`) or --preset uniform-SCHEME.")
    if output.exists() or output.is_symlink():
        raise ExportError(f"{output} exists already; export to another name, or remove it first.")
    loaded = ServingPlan.load(plan_path) if plan_path is not None else None
    model = open_language_model(path)
    checkpoint = served_checkpoint(model)
    chosen = torch.device(chosen_device(device))
    if loaded is not None and plan_path is not None:
        stats_path = stats_path or plan_path.parent / STATS_NAME
        plan, stats = loaded, stats_of_plan(loaded.stats_hash, stats_path)
    else:
        wanted = preset_schemes(str(preset), checkpoint)
        options = calibration or CalibrationOptions()
        stats_path = stats_path or output.with_name(f"{output.name}.stats.safetensors")
        stats = _calibrated(model, wanted, stats_path, options)
        stats_hash = file_hash(stats_path) if stats is not None else None
        plan = serving_plan(model, checkpoint, wanted, recipe=f"preset {preset}", stats_hash=stats_hash)
    guidance, rounding, moments = _guidance(stats, stats_path)
    with console.stage_progress("Finished tensors are kept.") as progress:
        files = export_compressed_tensors(
            model, plan, checkpoint, output,
            guidance=guidance, rounding=rounding, identity={"hessians": moments}, device=chosen,
            shard_max_bytes=parse_size(split_max_size) if split_max_size else None, resume=resume, progress=progress,
        )  # fmt: skip
    for file in files:
        console.out.print(str(file))
    problem = transformers_problem(plan)
    if problem is not None:
        console.note(f"vLLM loads this checkpoint, transformers does not: {problem}")
    size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    console.out.print(f"{size:,} bytes, {8 * size / plan.num_weights:.3f} bits per weight")
    return files


def _calibrated(
    model: Model, wanted: dict[str, tuple[str, str]], path: Path, options: CalibrationOptions
) -> CalibrationStats | None:
    if not any(SCHEMES[name].is_quantized for name, _ in wanted.values()):
        return None
    if not path.is_file():
        console.note(f"no --stats given: calibrating on {options.text or 'the built-in text'} into {path}")
        run_calibration(model, options, path)
    stats = CalibrationStats.load(path)
    stats.check_belongs_to(model.fingerprint, model.name)
    return stats


def _guidance(stats: CalibrationStats | None, path: Path) -> tuple[Guidance, str, str]:
    """What the encoder is told, the same in words, and the identity of the second moments."""
    if stats is None:
        return Guidance(), "rounded by their own squared error", "none"
    moments = load_beside(path, stats)
    tokens = f"of {stats.provenance.num_tokens:,} calibration tokens"
    if moments is None:
        console.note(f"there is no {path_beside(path)}: encoding without error feedback (calibrate with --hessians)")
        return guidance_of(stats, None), f"scales fitted under the mean squares {tokens}", "none"
    words = f"scales and error feedback under the second moments {tokens}"
    return guidance_of(stats, moments), words, moments.identity


def print_serving_plan(plan: ServingPlan, directory: Path) -> None:
    """Schemes, what fell back, and the size."""
    rows = [
        (name, layers, f"{8 * size / weights:.3f}", console.human_bytes(size), f"{size / plan.predicted_bytes:.1%}")
        for name, (layers, weights, size) in plan.histogram().items()
    ]
    rows.append(("everything else", "", "", console.human_bytes(plan.other_bytes),
                 f"{plan.other_bytes / plan.predicted_bytes:.1%}"))  # fmt: skip
    console.print_table(f"{plan.model}: {plan.recipe}", ("scheme", "linear layers", "bpw", "size", "share"), rows)
    for entry in plan.entries:
        if entry.wanted_scheme:
            console.out.print(f"  {entry.name}: {entry.scheme} instead of {entry.wanted_scheme}, {entry.reason}")
    problem = transformers_problem(plan)
    if problem is not None:
        console.note(f"vLLM will load this checkpoint, transformers will not: {problem}")
    if plan.predicted_kl is not None:
        console.out.print(f"  KL to the original, nats per token: predicted {plan.predicted_kl:.4f}")
    console.out.print(
        f"{console.human_bytes(plan.predicted_bytes)} ({plan.predicted_bytes:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits per weight. Plan: {directory / PLAN_NAME}"
    )
