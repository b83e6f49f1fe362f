"""`plan --data FILE --select`: vision tower and projector kept, at 8 bits or lower, whichever has the lowest KL.

Each combination becomes a plan of the same budget, so what a module keeps is paid for by the language model. All are
rendered into the running model and scored on samples that calibration took no sums of.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from dynquant.analysis.errors.table import ErrorTable
from dynquant.calibration.picture_collector import HELD_BACK
from dynquant.calibration.picture_stage import DataOptions, encoded_samples
from dynquant.calibration.run import num_held_back
from dynquant.checkpoints.model import Model
from dynquant.encoding.store import EncodedStore
from dynquant.errors import PlanError
from dynquant.evaluation.rendered_model import RenderedModel
from dynquant.evaluation.scored_pictures import ScoredPictures
from dynquant.evaluation.statistics import bootstrap_mean
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.inputs.pictures import Encoded
from dynquant.planning.chooser import Chooser
from dynquant.planning.selection import Candidate, Selection
from dynquant.planning.vision_modules import ModuleChoice, every_choice, held_to, with_measured_reasons
from dynquant.resources import chosen_device
from dynquant.running.load import load_hf
from dynquant.session import Session

SELECTION_TOKENS = 16384
"""Image and text tokens that plans are scored on, at most: every plan runs on all of them."""


def search_modules(
    model: Model,
    table: ErrorTable,
    store: EncodedStore,
    chooser: Chooser,
    options: DataOptions,
    session: Session,
    *,
    wanted: str,
    other: Path | None = None,
) -> tuple[Selection, tuple[ModuleChoice, ...]]:
    """The scored plans, and the decisions of the one with the lowest KL.

    Args:
        options: the samples of calibration, whose held-back tenth is scored unless `other` names another file.
        wanted: a level for both modules, or `auto`.

    Raises:
        PlanError: the budget holds no combination.
        DataError: the samples cannot be used.
    """
    plans = _plans(chooser, table, wanted)
    samples, name = _selection_samples(model, options, other, session)
    rendered = RenderedModel(load_hf(model, dtype=torch.float32, device=chosen_device(session.device)), store)
    pictures = ScoredPictures(rendered, samples)
    scored = []
    with session.stage("Errors and encoded tensors are kept; what the search measured is lost.") as progress:
        for choices, types in plans:
            rendered.install({one: given for one, given in types.items() if not QUANT_TYPES[given].is_float})
            scored.append(_scored(choices, types, table, chooser, pictures))
            progress("selecting by KL", len(scored), len(plans), unit="plans")
    chosen = min(range(len(scored)), key=lambda index: scored[index].kl.value)  # type: ignore[union-attr]
    selection = Selection(text=name, num_tokens=pictures.num_tokens, candidates=tuple(scored), chosen=chosen)
    measured = {choices: one.kl.value for (choices, _), one in zip(plans, scored, strict=True)}  # type: ignore[union-attr]
    return selection, with_measured_reasons(plans[chosen][0], measured, f"{len(samples)} samples of {name}")


def _plans(chooser: Chooser, table: ErrorTable, wanted: str) -> list[tuple[tuple[ModuleChoice, ...], dict[str, str]]]:
    found, refused = [], ""
    for choices in every_choice(table, wanted):
        try:
            found.append((choices, chooser(held_to(table, choices))))
        except PlanError as error:
            refused = str(error)
    if not found:
        raise PlanError(refused)
    return found


def _selection_samples(
    model: Model, options: DataOptions, other: Path | None, session: Session
) -> tuple[Sequence[Encoded], str]:
    if other is not None:
        chosen = DataOptions(str(other), SELECTION_TOKENS, options.strict)
        samples, file = encoded_samples(model, chosen, session)
        return samples, file.name
    samples, file = encoded_samples(model, options, session)
    held = samples[len(samples) - num_held_back(len(samples), HELD_BACK) :] or samples
    kept: list[Encoded] = []
    while held and sum(sample.num_tokens for sample in kept) < SELECTION_TOKENS:
        kept.append(held.pop(0))
    return kept, f"{file.name}, held back"


def _scored(
    choices: tuple[ModuleChoice, ...],
    types: dict[str, str],
    table: ErrorTable,
    chooser: Chooser,
    pictures: ScoredPictures,
) -> Candidate:
    divergences, agreements = pictures.score()
    total = table.price_of(types)
    return Candidate(
        label=" / ".join(f"{choice.part} {choice.level}" for choice in choices),
        bytes=chooser.file_bytes(types),
        predicted_kl=total.kl,
        predicted_kl_se=total.se,
        kl=bootstrap_mean(divergences.numpy(), pictures.sample_lengths),
        top1=bootstrap_mean(agreements.numpy(), pictures.sample_lengths),
        types=types,
    )
