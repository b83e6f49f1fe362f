"""The stage that writes files: the statistics, second moments and super weights of a plan or preset, then the exporter."""

from pathlib import Path

from dynquant import console
from dynquant.analysis.measure_errors import file_hash
from dynquant.codecs.encoder import Encoder, ProtectedWeight
from dynquant.errors import ExportError, PlanError, StatsError
from dynquant.model import Model
from dynquant.plan import Plan
from dynquant.plan_building import plan_from_types
from dynquant.plan_report import STATS_NAME, SUPER_NAME, load_super_weights
from dynquant.presets import preset_types
from dynquant.quant_types import quant_type
from dynquant.quantize import load_encoder
from dynquant.second_moments import SecondMoments, path_beside
from dynquant.statistics import CalibrationStats
from dynquant.workflow import CalibrationOptions, Target, open_and_announce, parse_size, run_calibration


def export(
    path: str,
    output: Path,
    *,
    format: str = "gguf",
    plan_path: Path | None = None,
    preset: str | None = None,
    stats_path: Path | None = None,
    calibration: CalibrationOptions | None = None,
    encoder: str = "ggml",
    device: str | None = None,
    split_max_size: str | None = None,
    resume: bool = True,
    threads: int | None = None,
    base_gguf: Path | None = None,
) -> list[Path]:
    """Write the files of a plan, or of a preset without a plan file."""
    from dynquant.exporters.gguf import export_gguf

    if format != "gguf":
        raise ExportError(f"There is no export format `{format}` yet; use -f gguf.")
    if (plan_path is None) == (preset is None):
        raise PlanError("Give either --plan FILE or --preset NAME.")
    model = open_and_announce(path, base_gguf)
    chosen = load_encoder(encoder, device)
    if plan_path is not None:
        made = Plan.load(plan_path)
        stats_path = stats_path or plan_path.parent / STATS_NAME
        stats = _stats_of_plan(made, stats_path)
        protected = _protected(plan_path.with_name(SUPER_NAME))
    else:
        options = calibration or CalibrationOptions()
        stats_path, made, stats = _plan_of_preset(model, str(preset), stats_path, options, output)
        protected = {}
    moments = _moments_of(stats, stats_path, chosen)
    with console.stage_progress() as progress:
        files = export_gguf(
            model,
            made,
            stats,
            output,
            encoder=chosen,
            moments=moments,
            protected=protected,
            threads=threads,
            split_max_bytes=parse_size(split_max_size) if split_max_size else None,
            resume=resume,
            progress=progress,
        )
    size = sum(file.stat().st_size for file in files)
    for file in files:
        console.out.print(str(file))
    console.out.print(f"{size:,} bytes, {8 * size / made.num_weights:.3f} bits per weight")
    return files


def _moments_of(stats: CalibrationStats | None, stats_path: Path, encoder: Encoder) -> SecondMoments | None:
    """The second moments that belong to the statistics, for an encoder that uses them; says so when there are none."""
    if stats is None or not encoder.uses_hessians:
        return None
    path = path_beside(stats_path)
    if not path.is_file():
        console.note(f"there is no {path}: encoding without error feedback (calibrate with --hessians to have it)")
        return None
    moments = SecondMoments.load(path)
    moments.check_belongs_to(stats, path)
    return moments


def _protected(path: Path) -> dict[str, tuple[ProtectedWeight, ...]]:
    """The super weights that `plan` found, by tensor."""
    found: dict[str, tuple[ProtectedWeight, ...]] = {}
    for one in load_super_weights(path):
        found[one.name] = (*found.get(one.name, ()), ProtectedWeight(one.row, one.col, one.expert))
    return found


def _stats_of_plan(plan: Plan, path: Path) -> CalibrationStats | None:
    """The statistics that a plan was made from.

    Raises:
        StatsError: they are not at `path`, or are others; both hashes are named.
    """
    if plan.stats_hash is None:
        return None
    if not path.is_file():
        raise StatsError(
            f"The plan was made from calibration statistics, but there is no {path}. Give them with --stats FILE."
        )
    found = file_hash(path)
    if found != plan.stats_hash:
        raise StatsError(
            f"{path} has the hash {found[:12]}, but the plan was made from statistics {plan.stats_hash[:12]}. Give the "
            "stats.safetensors that was written beside the plan."
        )
    return CalibrationStats.load(path)


def _plan_of_preset(
    model: Model, preset: str, stats_path: Path | None, calibration: CalibrationOptions, output: Path
) -> tuple[Path, Plan, CalibrationStats | None]:
    """Statistics' path, plan and statistics; calibrates only when a type uses statistics and none were given."""
    types = preset_types(preset, model)
    recipe = Target(preset=preset).recipe
    path = stats_path or output.with_suffix(".stats.safetensors")
    if stats_path is None and not any(quant_type(name).uses_imatrix for name, _ in types.values()):
        return path, plan_from_types(model, types, recipe=recipe), None
    if stats_path is None and not path.is_file():
        console.note(f"no --stats given: calibrating on {calibration.text or 'the built-in text'} into {path}")
        run_calibration(model, calibration, path)
    stats = CalibrationStats.load(path)
    stats.check_belongs_to(model.fingerprint, model.name)
    return path, plan_from_types(model, types, recipe=recipe, stats=stats, stats_hash=file_hash(path)), stats
