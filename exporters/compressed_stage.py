"""The stage behind `export -f compressed-tensors`."""

from dataclasses import dataclass, replace
from pathlib import Path

from dynquant.calibration.second_moments import path_beside
from dynquant.calibration.stage import StatsFile, run_calibration
from dynquant.checkpoints.model import Model
from dynquant.encoding.stream import guidance_of
from dynquant.errors import ExportError, PlanError
from dynquant.exporters.compressed_config import transformers_problem
from dynquant.exporters.compressed_tensors import Rounding, export_compressed_tensors
from dynquant.exporters.options import ExportOptions
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_language_model
from dynquant.formats.storage_format import Choice
from dynquant.formats.vllm_schemes import SCHEMES
from dynquant.recipes.build_plan import plan_for_vllm, uniform_schemes
from dynquant.recipes.folder import STATS_NAME, stats_of_plan
from dynquant.recipes.plan import Plan
from dynquant.resources import parse_size
from dynquant.session import Session


@dataclass(frozen=True)
class Exported:
    """Files that an export wrote, the model's first."""

    files: list[Path]
    num_weights: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the files that hold weights."""
        return sum(file.stat().st_size for file in self.files if file.suffix in (".gguf", ".safetensors"))


def export_for_vllm(options: ExportOptions, session: Session) -> Exported:
    """Write the compressed-tensors checkpoint of a plan for vLLM, or of a preset without a plan file.

    Raises:
        PlanError, StatsError, EncodeError, ExportError: see `export_compressed_tensors`.
    """
    output = options.output
    if (options.plan is None) == (options.preset is None):
        raise PlanError("Give either --plan FILE (of `dynquant plan --for vllm`) or --preset uniform-SCHEME.")
    if output.exists() or output.is_symlink():
        raise ExportError(f"{output} exists already; export to another name, or remove it first.")
    loaded = Plan.load(options.plan, "vllm") if options.plan is not None else None
    model = open_language_model(options.model, session)
    checkpoint = linear_checkpoint(model)
    if loaded is not None and options.plan is not None:
        plan, stats = loaded, stats_of_plan(loaded.stats_hash, options.stats or options.plan.parent / STATS_NAME)
    else:
        types = uniform_schemes(str(options.preset), checkpoint)
        stats = _calibrated(model, types, options, session)
        recipe = f"preset {options.preset}"
        plan = plan_for_vllm(model, checkpoint, types, recipe=recipe, stats_hash=stats and stats.hash)
    files = export_compressed_tensors(
        model,
        plan,
        checkpoint,
        output,
        rounding=_rounding(stats, session),
        shard_max_bytes=parse_size(options.split_max_size) if options.split_max_size else None,
        resume=options.resume,
        session=session,
    )
    problem = transformers_problem(plan)
    if problem is not None:
        session.note(f"vLLM loads this checkpoint, transformers does not: {problem}")
    return Exported(files, plan.num_weights)


def _calibrated(model: Model, types: dict[str, Choice], options: ExportOptions, session: Session) -> StatsFile | None:
    if not any(SCHEMES[name].is_quantized for name, _ in types.values()):
        return None
    path = options.stats or options.output.with_name(f"{options.output.name}.stats.safetensors")
    if not path.is_file():
        calibrate_beside(path, model, options, session)
    return StatsFile(path).of(model)


def calibrate_beside(path: Path, model: Model, options: ExportOptions, session: Session) -> None:
    """Write the statistics that a preset needs."""
    calibration = replace(options.calibration, max_memory=options.max_memory)
    session.note(f"no --stats given: calibrating on {calibration.text or 'the built-in text'} into {path}")
    run_calibration(model, calibration, path, session)


def _rounding(stats: StatsFile | None, session: Session) -> Rounding:
    """Return what the encoder is told of the inputs."""
    if stats is None:
        return Rounding()
    moments = stats.moments
    tokens = f"of {stats.stats.provenance.num_tokens:,} calibration tokens"
    if moments is None:
        session.note(
            f"there is no {path_beside(stats.path)}: encoding without error feedback (calibrate with --hessians)"
        )
        return Rounding(guidance_of(stats.stats, None), f"scales fitted under the mean squares {tokens}")
    words = f"scales and error feedback under the second moments {tokens}"
    return Rounding(guidance_of(stats.stats, moments), words, moments.identity)
