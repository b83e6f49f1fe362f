"""Compare a vision-language model with its original on pictures: KL divergence, and exact answers to questions.

The original runs first and is reduced to compact distributions and answers. The candidate is a plan.json, whose types
are then rendered into the running original tensor by tensor, a directory that transformers loads, packed or not, or a
GGUF file with its mmproj file, which llama.cpp runs. KL is scored at every text token that is followed by one; image
tokens predict nothing. Answers are decoded greedily and are right when they are the file's answer, apart from case and
surrounding space.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from dynquant.analysis.report.pictures import is_right
from dynquant.checkpoints.gguf_layout import mmproj_path
from dynquant.checkpoints.model import Model
from dynquant.encoding.store import ENCODED_NAME, open_store
from dynquant.encoding.stream import load_encoder
from dynquant.errors import EvaluationError
from dynquant.evaluation.distributions import Distributions
from dynquant.evaluation.picture_runners import (
    GgufPictures,
    PictureItem,
    PictureRunner,
    TransformersPictures,
    gguf_bytes,
)
from dynquant.evaluation.rendered_model import RenderedModel
from dynquant.evaluation.runners import load_model
from dynquant.evaluation.statistics import Estimate, bootstrap_mean, mcnemar_exact, only_one, wilson_interval
from dynquant.families.open import open_model
from dynquant.inputs.pictures import Sample, SampleEncoder, image_token_of, read_samples
from dynquant.inputs.processor import load_processor
from dynquant.packed.layers import choose_layout
from dynquant.recipes.folder import STATS_NAME, stats_of_plan
from dynquant.recipes.plan import Plan
from dynquant.resources import chosen_device
from dynquant.running.load import load_hf
from dynquant.session import Progress, ignore_progress

TASKS = frozenset({"kl", "vqa"})
SPARE_TOKENS = 4
"""Tokens by which a decoded answer may exceed the right one; a longer one is wrong whatever follows."""


class Answer(BaseModel):
    """One question with the answers of both models; `image` is the path of its first picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str
    question: str
    right: str
    reference: str
    candidate: str


class Questions(BaseModel):
    """Exact-match accuracies on the same questions; `mcnemar_p` is two-sided and exact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reference: Estimate
    candidate: Estimate
    only_reference_right: int
    only_candidate_right: int
    mcnemar_p: float
    answers: tuple[Answer, ...]


class PictureReport(BaseModel):
    """Effect of one candidate on pictures; sizes in bytes, KL in nats per text token with 95 % intervals."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reference: str
    candidate: str
    reference_bytes: int
    candidate_bytes: int
    data: str
    data_sha256: str
    samples: int
    skipped: tuple[str, ...]
    kl: Estimate | None = None
    top1_agreement: Estimate | None = None
    questions: Questions | None = None

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Metric, reference, candidate, comparison."""
        share = f"{self.candidate_bytes / self.reference_bytes:.1%}"
        found = [("bytes", f"{self.reference_bytes:,}", f"{self.candidate_bytes:,}", share)]
        if self.kl is not None and self.top1_agreement is not None:
            found.append(("mean KL (nats per token)", "0", _shown(self.kl, ".4f"), ""))
            found.append(("same top token", "100 %", _shown(self.top1_agreement, ".2%"), ""))
        if self.questions is not None:
            asked = self.questions
            flips = f"{asked.only_reference_right} lost, {asked.only_candidate_right} won, p = {asked.mcnemar_p:.2g}"
            found.append(("exact answers", _shown(asked.reference, ".1%"), _shown(asked.candidate, ".1%"), flips))
        return found


def evaluate_on_samples(
    candidate: Path,
    reference: str,
    data: Path,
    *,
    tasks: Collection[str] = ("kl", "vqa"),
    limit: int | None = None,
    strict: bool = False,
    device: str | None = None,
    encoder: str = "dynquant",
    mmproj: Path | None = None,
    progress: Progress = ignore_progress,
) -> PictureReport:
    """Run both models on the samples of `data`; `encoder` renders a plan as `export` would with it.

    `mmproj` belongs to a GGUF candidate; None takes mmproj-NAME.gguf beside it.

    Raises:
        EvaluationError: an unknown task, a reference without a vision tower, or a file without questions for `vqa`.
        DataError: the file cannot be used, or with `strict` an image cannot be decoded.
    """
    unknown = sorted(set(tasks) - TASKS)
    if unknown or not tasks:
        raise EvaluationError(f"With --data, tasks are kl and vqa; {', '.join(unknown) or 'none'} was asked for.")
    model = open_model(reference)
    if not model.has_vision or model.hf_directory is None:
        raise EvaluationError(f"{model.name} has no vision tower that transformers can run; leave --data out.")
    file = read_samples(data)
    processor = load_processor(model.hf_directory)
    encoder_of_samples = SampleEncoder(processor, image_token_of(model.hf_directory), strict=strict)
    items = _items(encoder_of_samples, file.samples[:limit], "vqa" in tasks)
    original = TransformersPictures(load_hf(model, dtype=torch.float32, device=chosen_device(device)))
    first = _Scorer(original, items, "reference", progress)
    targets = first.map(lambda run, item: Distributions.of(run.logits(item))) if "kl" in tasks else []
    before = _answers(first, processor.tokenizer) if "vqa" in tasks else []
    with _candidate(candidate, mmproj, model, original, encoder, processor) as (other, candidate_bytes):
        second = _Scorer(other, items, "candidate", progress)
        found: dict[str, Any] = {}
        if "kl" in tasks:
            scores = second.map(lambda run, item: _compare(run, item, targets.pop(0)))
            lengths = [len(one) for one, _ in scores]
            divergences, agreements = (np.concatenate([one[part] for one in scores]) for part in (0, 1))
            found["kl"] = bootstrap_mean(divergences, lengths)
            found["top1_agreement"] = bootstrap_mean(agreements, lengths)
        if "vqa" in tasks:
            found["questions"] = _questions(items, before, _answers(second, processor.tokenizer))
    return PictureReport(
        reference=model.name,
        candidate=str(candidate),
        reference_bytes=_stored_bytes(model.hf_directory),
        candidate_bytes=candidate_bytes,
        data=file.name,
        data_sha256=file.sha256,
        samples=len(items),
        skipped=tuple(encoder_of_samples.skipped),
        **found,
    )


class _Scorer:
    """One model over all samples."""

    def __init__(self, run: PictureRunner, items: Sequence[PictureItem], name: str, progress: Progress) -> None:
        self._run = run
        self._items, self._name, self._progress = items, name, progress

    def map(self, score: Callable[[PictureRunner, PictureItem], Any], stage: str = "pictures") -> list[Any]:
        found = []
        with torch.inference_mode():
            for index, item in enumerate(self._items):
                if stage == "pictures" or item.prompt is not None:
                    found.append(score(self._run, item))
                self._progress(f"{self._name}: {stage}", index + 1, len(self._items), unit=stage)
        return found


def _items(encoder: SampleEncoder, samples: Sequence[Sample], asks: bool) -> list[PictureItem]:
    if asks and not any(sample.question for sample in samples):
        raise EvaluationError("The task vqa needs lines with `images`, `question` and `answer`; the file has none.")
    found = []
    for sample in samples:
        whole = encoder.encode(sample, breaks_are_text=False)
        if whole is not None:
            prompt = None
            if asks and sample.question:
                prompt = encoder.encode(sample, prompt_only=True, breaks_are_text=False)
            found.append(PictureItem(sample, whole, prompt))
    if not found:
        raise EvaluationError("No sample can be used: all of their images fail to decode.")
    return found


def _compare(run: PictureRunner, item: PictureItem, target: Distributions) -> tuple[np.ndarray, np.ndarray]:
    logits = run.logits(item)
    if not torch.isfinite(logits).all():
        raise EvaluationError(f"{item.sample.place}: the candidate's logits are NaN or infinite.")
    return target.kl(logits).cpu().numpy(), target.agreements(logits).numpy()


def _answers(scorer: _Scorer, tokenizer: Any) -> list[str]:
    def answer(run: PictureRunner, item: PictureItem) -> str:
        made = run.answer(item, item.answer_tokens + SPARE_TOKENS)
        return tokenizer.decode(made, skip_special_tokens=True).strip()

    return scorer.map(answer, "questions")


def _questions(items: Sequence[PictureItem], before: Sequence[str], after: Sequence[str]) -> Questions:
    samples = [item.sample for item in items if item.prompt is not None]
    answers = tuple(
        Answer(
            image=str(sample.images[0]) if sample.images else "", question=str(sample.question),
            right=str(sample.answer), reference=first, candidate=second,
        )
        for sample, first, second in zip(samples, before, after, strict=True)
    )  # fmt: skip
    first = [is_right(one.reference, one.right) for one in answers]
    second = [is_right(one.candidate, one.right) for one in answers]
    lost, won = only_one(first, second)
    return Questions(
        reference=wilson_interval(sum(first), len(answers)),
        candidate=wilson_interval(sum(second), len(answers)),
        only_reference_right=lost,
        only_candidate_right=won,
        mcnemar_p=mcnemar_exact(lost, won),
        answers=answers,
    )


@contextmanager
def _candidate(
    path: Path,
    mmproj: Path | None,
    model: Model,
    original: TransformersPictures,
    encoder_name: str,
    processor: Any,
) -> Iterator[tuple[PictureRunner, int]]:
    """The running candidate and its bytes; a plan turns the original itself into it."""
    if path.suffix == ".gguf":
        vision = mmproj or mmproj_path(path)
        if not vision.is_file():
            raise EvaluationError(f"There is no {vision}, and {path.name} alone sees no pictures; give --mmproj FILE.")
        run = GgufPictures(path, vision, original, processor)
        try:
            yield run, gguf_bytes((path, vision))
        finally:
            run.close()
        return
    if mmproj is not None:
        raise EvaluationError(f"--mmproj goes with a GGUF file, and {path} is none; leave it out.")
    plan_file = path / "plan.json" if (path / "plan.json").is_file() else path
    if plan_file.suffix != ".json":
        other = load_model(path).to(original.hf_model.device).eval()
        choose_layout(other)
        yield TransformersPictures(other), _stored_bytes(path)
        return
    plan = Plan.load(plan_file)
    plan.check_covers(model.source.names(), model.fingerprint, model.name)
    stats_path = plan_file.with_name(STATS_NAME)
    file = stats_of_plan(plan.stats_hash, stats_path)
    stats = file and file.stats
    store = open_store(
        model, stats, stats_path, load_encoder(encoder_name),
        stats_hash=plan.stats_hash or "", parent=plan_file.with_name(ENCODED_NAME),
    )  # fmt: skip
    rendered = RenderedModel(original.hf_model, store)
    rendered.install({entry.name: entry.type for entry in plan.entries if not entry.quant_type.is_float})
    yield TransformersPictures(rendered.hf_model), plan.predicted_bytes


def _stored_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))


def _shown(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
