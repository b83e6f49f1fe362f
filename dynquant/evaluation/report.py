"""Results of an evaluation as one JSON document, and the rows of its before/after table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dynquant import __version__
from dynquant.evaluation.options import Scoring
from dynquant.evaluation.statistics import (
    Estimate,
    block_sums,
    bootstrap_mean,
    compare_paired,
    only_one,
    shown_kl,
    wilson_interval,
)
from dynquant.evaluation.tasks.generation import GenerationResult
from dynquant.evaluation.tasks.harness_results import TaskMetric, TaskResult
from dynquant.evaluation.tasks.multiple_choice import AnswerScores, EncodedQuestion, is_right
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.inputs.pictures import Sample
from dynquant.storage.documents import FrozenRecord

SCHEMA_VERSION = 1

Row = tuple[str, str, str, str]  # metric, reference, candidate and comparison; empty cells do not apply


class ModelIdentity(FrozenRecord):
    """Name of the model that was run, and how it was; `fingerprint` is reference_cache.model_fingerprint."""

    name: str
    runner: Literal["transformers", "llama.cpp"]
    file_bytes: int
    fingerprint: str


@dataclass(frozen=True)
class TokenScores:
    """Scores of one candidate at each scored token."""

    divergence: np.ndarray  # float64 [tokens], unbiased estimate of KL(reference || candidate) in nats
    same_top: np.ndarray  # bool [tokens]
    target_log_prob: np.ndarray  # float64 [tokens]

    def means(self, lengths: list[int]) -> dict[str, Estimate]:
        """Return mean KL and top-1 agreement over sequences of these lengths."""
        scores = {"kl": self.divergence, "top1_agreement": self.same_top}
        return {name: bootstrap_mean(values, lengths) for name, values in scores.items()}


class Divergence(FrozenRecord):
    """KL(reference || candidate) per token, in nats; unbiased estimates of `distributions`."""

    mean: Estimate
    median: float
    p99_9: float
    maximum: float
    top1_agreement: Estimate
    block_sums: tuple[float, ...] = ()
    """Sums over the blocks of 64 tokens that intervals are drawn from, for paired comparisons with another file."""


class TextResult(FrozenRecord):
    """One text. `perplexity_ratio` is candidate over reference on the same tokens."""

    name: str
    sha256: str
    scored_tokens: int
    windows: int
    window: int = 0
    """Tokens of the longest."""
    reference_perplexity: Estimate
    candidate_perplexity: Estimate
    perplexity_ratio: Estimate
    kl: Divergence | None


class SubjectAccuracy(FrozenRecord):
    """Shares of right answers to the questions of a subject, and where one model's answer alone is right."""

    questions: int
    reference: float
    candidate: float
    only_reference_right: int | None = None  # reports up to November 2026 lack both
    only_candidate_right: int | None = None


class ChoiceScores(FrozenRecord):
    """One model on a question set.

    `accuracy`: letters by log-probability, cloze answers by log-probability per byte. `summed_accuracy`: not per byte.
    `right_probability_among_choices`: mean softmax over the choices' scores only (letter: log-probabilities; cloze:
    log-probabilities per byte). `right_probability_full_vocabulary`: mean probability of the right answer's tokens.
    """

    accuracy: Estimate
    summed_accuracy: Estimate
    right_probability_among_choices: Estimate
    right_probability_full_vocabulary: Estimate
    predictions: tuple[int, ...]


class MultipleChoiceResult(FrozenRecord):
    """Both models on the same questions. `mcnemar_p` is two-sided and exact."""

    scoring: Scoring
    questions: int
    questions_with_dropped_shots: int
    dropped_shots: int
    reference: ChoiceScores
    candidate: ChoiceScores
    same_prediction: float
    only_reference_right: int
    only_candidate_right: int
    mcnemar_p: float
    right_answers: tuple[int, ...]
    subjects: dict[str, SubjectAccuracy]


class EvalReport(FrozenRecord):
    """Everything `evaluate` found; `seconds` is the wall time of each stage, about 0 where the cache answered."""

    schema_version: int = SCHEMA_VERSION
    tool_version: str = __version__
    reference: ModelIdentity
    candidate: ModelIdentity
    options: dict[str, int | str | list[str] | None]
    texts: list[TextResult]
    multiple_choice: list[MultipleChoiceResult]
    generated: tuple[GenerationResult, ...] = ()
    harness: tuple[TaskResult, ...] = ()
    notes: list[str]
    seconds: dict[str, float]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @property
    def title(self) -> str:
        return f"{self.candidate.name} against {self.reference.name}"

    def sections(self) -> dict[str, list[Row]]:
        """Return the before/after table, text by text and scoring by scoring."""
        before, after = self.reference.file_bytes, self.candidate.file_bytes
        sections = {"file": [("bytes", f"{before:,}", f"{after:,}", f"{after / max(1, before):.1%} of the reference")]}
        generated, asked = map(_generation_section, self.generated), map(_choice_section, self.multiple_choice)
        for name, rows in (*map(_text_section, self.texts), *generated, *asked, *map(_task_section, self.harness)):
            sections.setdefault(name, []).extend(rows)
        return sections

    def rows(self) -> list[Row]:
        """Return the lines of the table, sections with their names above them."""
        lines = []
        for name, rows in self.sections().items():
            lines += [(name, "", "", ""), *((f"  {metric}", *cells) for metric, *cells in rows)]
        return lines


class Answer(FrozenRecord):
    """One question with the answers of both models; `image` is the path of its first picture."""

    image: str
    question: str
    right: str
    reference: str
    candidate: str


class AnsweredQuestions(FrozenRecord):
    """Exact-match accuracies on the same questions; `mcnemar_p` is two-sided and exact."""

    reference: Estimate
    candidate: Estimate
    only_reference_right: int
    only_candidate_right: int
    mcnemar_p: float
    answers: tuple[Answer, ...]


class PictureReport(FrozenRecord):
    """Effect of one candidate on samples with pictures; sizes in bytes, unbiased KL in nats per text token."""

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
    questions: AnsweredQuestions | None = None

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"

    @property
    def title(self) -> str:
        return f"{Path(self.candidate)} against {self.reference}: {self.samples} samples of {self.data}"

    @property
    def notes(self) -> list[str]:
        return [f"skipped: {reason}" for reason in self.skipped]

    def rows(self) -> list[Row]:
        """Return the lines of the before/after table."""
        share = f"{self.candidate_bytes / self.reference_bytes:.1%}"
        rows = [("bytes", f"{self.reference_bytes:,}", f"{self.candidate_bytes:,}", share)]
        if self.kl is not None and self.top1_agreement is not None:
            rows.append(("mean KL (nats per token)", "0", self.kl.shown(shown_kl), ""))
            rows.append(("same top token", "100 %", self.top1_agreement.shown(".2%"), ""))
        if self.questions is not None:
            asked = self.questions
            flips = f"{asked.only_reference_right} lost, {asked.only_candidate_right} won, p = {asked.mcnemar_p:.2g}"
            rows.append(("exact answers", asked.reference.shown(".1%"), asked.candidate.shown(".1%"), flips))
        return rows


def summarize_text(
    text: ModelInputs, reference_log_prob: np.ndarray, scores: TokenScores, *, with_kl: bool
) -> TextResult:
    """Return means with intervals over the scored tokens of one text."""
    lengths = [len(batch.scored) for batch in text]

    def perplexity(log_prob: np.ndarray) -> Estimate:
        mean = bootstrap_mean(-log_prob, lengths)
        return Estimate(value=np.exp(mean.value), low=np.exp(mean.low), high=np.exp(mean.high))

    kl, means = scores.divergence, scores.means(lengths)
    tail = {"median": float(np.median(kl)), "p99_9": float(np.quantile(kl, 0.999)), "maximum": float(kl.max())}
    blocks = tuple(block_sums(kl, lengths)[0].tolist())
    divergence = Divergence(mean=means["kl"], top1_agreement=means["top1_agreement"], block_sums=blocks, **tail)
    before, after = reference_log_prob, scores.target_log_prob
    perplexities = {"reference_perplexity": perplexity(before), "candidate_perplexity": perplexity(after)}
    perplexities["perplexity_ratio"] = perplexity(after - before)
    counts = {"scored_tokens": len(before), "windows": len(lengths), "window": text.longest}
    kl_result = divergence if with_kl else None
    return TextResult(name=text.name, sha256=text.sha256, kl=kl_result, **counts, **perplexities)


def summarize_choices(
    scoring: Scoring, encoded: list[EncodedQuestion], reference: list[AnswerScores], candidate: list[AnswerScores]
) -> MultipleChoiceResult:
    """Accuracies of both models and their paired comparison."""
    answers = np.array([e.question.answer for e in encoded])
    predictions = [np.array([s.prediction(scoring) for s in scores]) for scores in (reference, candidate)]
    right = [p == answers for p in predictions]
    return MultipleChoiceResult(
        scoring=scoring,
        questions=len(encoded),
        questions_with_dropped_shots=sum(e.dropped_shots > 0 for e in encoded),
        dropped_shots=sum(e.dropped_shots for e in encoded),
        reference=_choice_scores(scoring, reference, predictions[0], right[0]),
        candidate=_choice_scores(scoring, candidate, predictions[1], right[1]),
        same_prediction=float((predictions[0] == predictions[1]).mean()),
        **compare_paired(*(side.tolist() for side in right)),
        right_answers=tuple(answers.tolist()),
        subjects=_by_subject(encoded, *right),
    )


def summarize_answers(samples: Sequence[Sample], before: Sequence[str], after: Sequence[str]) -> AnsweredQuestions:
    """Compare both models' answers to questions about pictures with the file's."""
    answers = tuple(
        Answer(
            image=str(sample.images[0]) if sample.images else "", question=str(sample.question),
            right=str(sample.answer), reference=first, candidate=second,
        )
        for sample, first, second in zip(samples, before, after, strict=True)
    )  # fmt: skip
    first = [is_right(answer.reference, answer.right) for answer in answers]
    second = [is_right(answer.candidate, answer.right) for answer in answers]
    return AnsweredQuestions(
        reference=wilson_interval(sum(first), len(answers)),
        candidate=wilson_interval(sum(second), len(answers)),
        **compare_paired(first, second),
        answers=answers,
    )


def _choice_scores(
    scoring: Scoring, scores: Sequence[AnswerScores], predictions: np.ndarray, right: np.ndarray
) -> ChoiceScores:
    singles = [1] * len(scores)
    summed_right = sum(int(s.log_probs.argmax()) == s.question.answer for s in scores)
    return ChoiceScores(
        accuracy=wilson_interval(int(right.sum()), len(right)),
        summed_accuracy=wilson_interval(summed_right, len(right)),
        right_probability_among_choices=bootstrap_mean(
            np.array([s.probability_among_choices(scoring) for s in scores]), singles
        ),
        right_probability_full_vocabulary=bootstrap_mean(np.array([s.probability for s in scores]), singles),
        predictions=tuple(predictions.tolist()),
    )


def _by_subject(
    encoded: Sequence[EncodedQuestion], reference_right: np.ndarray, candidate_right: np.ndarray
) -> dict[str, SubjectAccuracy]:
    subjects = [item.question.subject for item in encoded]
    accuracies = {}
    for subject in sorted(set(subjects)):
        chosen = np.array([name == subject for name in subjects])
        before, after = reference_right[chosen], candidate_right[chosen]
        lost, won = only_one(before.tolist(), after.tolist())
        accuracies[subject] = SubjectAccuracy(
            questions=len(before), reference=float(before.mean()), candidate=float(after.mean()),
            only_reference_right=lost, only_candidate_right=won,
        )  # fmt: skip
    return accuracies


def _text_section(text: TextResult) -> tuple[str, list[Row]]:
    perplexities = (f"{estimate.value:.3f}" for estimate in (text.reference_perplexity, text.candidate_perplexity))
    rows = [("perplexity", *perplexities, f"ratio {text.perplexity_ratio.shown('.4g')}")]
    if text.kl:
        rows += [
            ("mean KL (nats)", "", "", text.kl.mean.shown(".4g")),
            ("median KL", "", "", f"{text.kl.median:.4g}"),
            ("99.9th percentile KL", "", "", f"{text.kl.p99_9:.4g}"),
            ("top-1 agreement", "", "", text.kl.top1_agreement.shown(".1%")),
        ]
    return f"{text.name} ({text.scored_tokens:,} tokens)", rows


def _generation_section(result: GenerationResult) -> tuple[str, list[Row]]:
    before, after = result.reference, result.candidate
    loops = (
        f"only reference {result.only_reference_loops}, only candidate {result.only_candidate_loops}, "
        f"McNemar p = {result.mcnemar_p:.3g}"
    )
    low, middle, high = result.quartiles
    quartiles = f"median {middle:.0f}, quartiles {low:.0f} and {high:.0f}"
    return f"{result.name}, {result.prompts:,} prompts, {result.new_tokens:,} tokens written greedily after each", [
        ("tokens until they part", "", "", f"{result.shared_tokens.shown('.1f')}; {quartiles}"),
        ("never part", "", "", result.never_part.shown(".1%")),
        ("end in a loop", before.loops.shown(".1%"), after.loops.shown(".1%"), loops),
        ("come to an end", before.ends.shown(".1%"), after.ends.shown(".1%"), ""),
        ("tokens written", before.length.shown(".1f"), after.length.shown(".1f"), ""),
    ]


def _choice_section(result: MultipleChoiceResult) -> tuple[str, list[Row]]:
    section = f"{result.questions:,} questions, {result.scoring} scoring"
    if result.questions_with_dropped_shots:
        section += f", shots dropped from {result.questions_with_dropped_shots:,}"
    measures = [("accuracy", "accuracy", _paired(result))]
    if result.scoring == "cloze":
        measures.append(("accuracy, not per byte", "summed_accuracy", ""))
    measures.append(("P(right) among choices", "right_probability_among_choices", ""))
    sides = result.reference, result.candidate
    return section, [(name, *(getattr(side, key).shown(".1%") for side in sides), note) for name, key, note in measures]


def _paired(result: MultipleChoiceResult | TaskMetric) -> str:
    return (
        f"only reference right {result.only_reference_right}, only candidate right {result.only_candidate_right}, "
        f"McNemar p = {result.mcnemar_p:.3g}"
    )


def _task_section(result: TaskResult) -> tuple[str, list[Row]]:
    of_tasks = f" in {len(result.tasks)} tasks" if len(result.tasks) > 1 else ""
    rows = []
    for metric in result.metrics:
        form = ".4g" if metric.mcnemar_p is None else ".1%"
        name = metric.name if metric.filter == "none" else f"{metric.name}, {metric.filter}"
        difference = f"difference {metric.difference.shown(form)}"
        paired = "" if metric.mcnemar_p is None else f"; {_paired(metric)}"
        rows.append((name, metric.reference.shown(form), metric.candidate.shown(form), difference + paired))
    return f"{result.name}, {result.num_questions:,} questions{of_tasks}, {result.num_shots} shots", rows


def markdown(columns: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    rows = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n{rows}"
