"""Writes a vision-language model as llama.cpp wants it: the language model as NAME.gguf, mmproj-NAME.gguf beside it.

The mmproj file holds vision tower and projector and is small, so it comes first: a run that is killed goes on in the
language model.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf

from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.gguf_layout import mmproj_path
from dynquant.checkpoints.model import Model, ModelPart
from dynquant.errors import ExportError
from dynquant.recipes.build_plan import plan_of_part, with_projector_type
from dynquant.recipes.plan import Plan
from dynquant.session import Session

MMPROJ_TYPES = ("f32", "bf16", "f16", "q8_0")
_CAVEATS = {
    "mlp": "llama.cpp's graph of LLaVA puts the class embedding behind the patches; the model was trained with it in "
    "front. Patches get their neighbours' positions, and answers differ from those of transformers (reports/vision.md)."
}
"""By projector: what llama.cpp computes otherwise than transformers from the same weights."""
PartWriter = Callable[[ModelPart, Plan, CalibrationStats | None, SecondMoments | None, Path], list[Path]]


def check_parts(model: Model, session: Session) -> None:
    """Refuse a model whose language part llama.cpp cannot run; say what else is not written.

    Raises:
        ExportError: with the reason.
    """
    if model.gguf_file is not None:
        raise ExportError(f"{model.name} is an mmproj file; give the checkpoint that it was made from.")
    reasons = " ".join(model.unwritten)
    if not any(not part.is_projector for part in model.parts):
        raise ExportError(
            f"{model.name} cannot be written as GGUF. {reasons} Nothing is written; `-f safetensors` keeps all parts."
        )
    for part in model.parts:
        kind = next((field.value for field in part.model.metadata if field.key == gguf.Keys.Clip.PROJECTOR_TYPE), None)
        if kind in _CAVEATS:
            session.note(_CAVEATS[str(kind)])
    if model.unwritten:
        session.note(f"only the language model is written, and it will not see pictures. {reasons}")


def with_mmproj_type(model: Model, plan: Plan, wanted: str, stats: CalibrationStats | None) -> Plan:
    """The plan with one type for the vision part, which changes its size.

    Raises:
        ExportError: a type that is none of MMPROJ_TYPES, or a model without a vision part that can be written.
    """
    if wanted.lower() not in MMPROJ_TYPES:
        raise ExportError(f"--mmproj-type {wanted} is not known; use one of {', '.join(MMPROJ_TYPES)}.")
    if not any(part.is_projector for part in model.parts):
        raise ExportError(f"{model.name} has no vision part that is written as mmproj; leave --mmproj-type out.")
    return with_projector_type(model, plan, wanted.upper(), stats)


def write_parts(
    model: Model,
    plan: Plan,
    stats: CalibrationStats | None,
    moments: SecondMoments | None,
    output: Path,
    write: PartWriter,
) -> list[Path]:
    """Write every part by `write`, and return all files, the language model's first.

    Raises:
        ExportError: the parts do not have the size that the plan predicts.
    """
    plans = [plan_of_part(part, plan, stats) for part in model.parts]
    total = sum(one.predicted_bytes for one in plans)
    if not model.unwritten and total != plan.predicted_bytes:
        raise ExportError(
            f"The plan predicts {plan.predicted_bytes:,} bytes, but language model and mmproj take {total:,}. The plan "
            "was edited or made by another version of dynquant. Plan again."
        )
    files: list[Path] = []
    for part, own in zip(model.parts, plans, strict=True):
        path = mmproj_path(output) if part.is_projector else output
        files = write(part, own, stats_of_part(part, stats), _moments_of(part, moments), path) + files
    return files


def _renamed(part: ModelPart, aliases: dict[str, str]) -> dict[str, str]:
    """Return the names of the part's inputs, under the names of the whole model's."""
    own = {name: part.plan_name(name) for name in part.model.source.names()}
    return aliases | {name: aliases.get(whole, whole) for name, whole in own.items() if name != whole}


def stats_of_part(part: ModelPart, stats: CalibrationStats | None) -> CalibrationStats | None:
    """Statistics under the names that tensors have in a part's file."""
    return None if stats is None else replace(stats, aliases=_renamed(part, stats.aliases))


def _moments_of(part: ModelPart, moments: SecondMoments | None) -> SecondMoments | None:
    return None if moments is None else replace(moments, aliases=_renamed(part, moments.aliases))
