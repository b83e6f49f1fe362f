"""Run what is compared with an original on pictures: a GGUF file with its mmproj file, a checkpoint, or a plan.

A plan is rendered into the running original. On text it is not: there the original is gone when the candidate runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dynquant.calibration.stage import StatsFile
from dynquant.checkpoints.gguf_layout import mmproj_path
from dynquant.checkpoints.gguf_source import GGUFSource, is_gguf
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_source import weight_files
from dynquant.encoding.store import ENCODED_NAME, open_store
from dynquant.encoding.stream import load_encoder
from dynquant.errors import EvaluationError, PlanError
from dynquant.evaluation import runners
from dynquant.evaluation.options import EvalOptions
from dynquant.evaluation.pictures.llama_cpp import MtmdRunner
from dynquant.evaluation.rendered_model import RenderedModel
from dynquant.families.open import locate_model
from dynquant.inputs.processor import image_token_limits
from dynquant.recipes.folder import stats_of_plan
from dynquant.recipes.plan import Plan
from dynquant.storage.file_kinds import PLAN, content_of
from dynquant.storage.file_names import PLAN_NAME, STATS_NAME


def plan_at(candidate: Path) -> Path | None:
    """Return the plan that is at a path or in a folder there, or None for a model."""
    if (candidate / PLAN_NAME).is_file():
        return None if (candidate / "config.json").is_file() else candidate / PLAN_NAME
    return candidate if content_of(candidate) == PLAN else None


def refuse_plan(options: EvalOptions) -> None:
    """Raise EvaluationError for a plan that is to be compared on text."""
    if (plan := plan_at(Path(options.candidate))) is not None:
        raise EvaluationError(needs_pictures(options, plan))


def needs_pictures(options: EvalOptions, plan: Path) -> str:
    """Return why a plan is not compared on text, and the way out."""
    output, what = ("out/ -f compressed-tensors", "folder") if _is_for_vllm(plan) else ("model.gguf", "file")
    return (
        f"{options.candidate} is a plan, and plans are evaluated as they are only of vision-language models on "
        f"pictures (--data FILE). Export it (`dynquant export {options.reference} --plan {plan} -o {output}`) and "
        f"evaluate that {what}."
    )


def _is_for_vllm(plan: Path) -> bool:
    try:
        Plan.load(plan, target="vllm")
    except PlanError:
        return False
    return True


class Planned(NamedTuple):
    """A plan that is the candidate, with its statistics."""

    file: Path
    plan: Plan
    stats: StatsFile | None


def checked_candidate(options: EvalOptions, model: Model, plan_file: Path | None) -> Planned | None:
    """Return the plan that is the candidate, if it is one; refuse, before anything runs, what is not all there."""
    path = Path(options.candidate)
    if is_gguf(path):
        mmproj = options.mmproj or mmproj_path(path)
        if not mmproj.is_file():
            raise EvaluationError(f"There is no {mmproj}, and {path.name} alone sees no pictures; give --mmproj FILE.")
        return None
    if options.mmproj is not None:
        raise EvaluationError(f"--mmproj goes with a GGUF file, and {path} is none; leave it out.")
    if plan_file is None and path.suffix != ".json":
        locate_model(path)
        return None
    plan_file = plan_file or path  # which `load` says something about
    plan = Plan.load(plan_file)
    plan.check_covers(model.source.names(), model)
    return Planned(plan_file, plan, stats_of_plan(plan.stats_hash, plan_file.with_name(STATS_NAME)))


@contextmanager
def picture_candidate(
    options: EvalOptions,
    model: Model,
    original: runners.HuggingFaceRunner,
    processor: Any,
    planned: Planned | None,
) -> Iterator[tuple[runners.PictureRunner, int]]:
    """Context manager: yields the running candidate and its bytes; a plan turns the original itself into it."""
    path = Path(options.candidate)
    if is_gguf(path):
        mmproj = options.mmproj or mmproj_path(path)
        runner = MtmdRunner(path, mmproj, image_tokens=image_token_limits(processor), stop=original.stop_tokens)
        try:
            if runner.vocab_size != original.vocab_size:
                raise EvaluationError(
                    f"{path.name} has {runner.vocab_size:,} tokens and the reference {original.vocab_size:,}; they are "
                    "not the same model. Give the checkpoint that the file was made from."
                )
            yield runner, sum(file.stat().st_size for each in (path, mmproj) for file in GGUFSource(each).files)
        finally:
            runner.close()
        return
    if planned is None:
        yield runners.open_runner(path, device=str(original.device)), stored_bytes(path)
        return
    plan_file, plan, stats = planned
    store = open_store(model, stats, load_encoder(options.encoder), plan_file.with_name(ENCODED_NAME))
    rendered = RenderedModel(original.hf_model, store)
    rendered.install({entry.name: entry.type for entry in plan.entries if not entry.quant_type.is_float})
    yield original, plan.predicted_bytes


def stored_bytes(directory: Path) -> int:
    """Return the bytes of the weights of a checkpoint."""
    return sum(file.stat().st_size for file in weight_files(directory))
