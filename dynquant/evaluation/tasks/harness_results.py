"""Two models on the same questions of a task of lm-evaluation-harness, as its scorers judged them one by one.

What a scorer gives as 0 or 1 is right or wrong: Wilson's intervals, and McNemar's exact test on the pairs. Other
numbers of single questions are averaged over questions drawn again and again; scores of all questions together
(perplexity, BLEU) are computed anew for every draw. A draw takes the same questions for both models.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dynquant.evaluation.statistics import Estimate, bootstrap_mean, compare_paired, wilson_interval
from dynquant.storage.documents import FrozenRecord

NUM_DRAWS = 200
"""Draws for scores of all questions together, each of which takes the scorer's own time."""

Sample = Mapping[str, Any]
"""A question with a model's answers and their scores, as `lm_eval.evaluate` logs it."""


class TaskMetric(FrozenRecord):
    """One score of both models. `difference` is candidate minus reference, on the same questions."""

    name: str
    filter: str
    """Name of the rule by which a part of an answer is judged; a task may have several."""
    higher_is_better: bool
    reference: Estimate
    candidate: Estimate
    difference: Estimate
    only_reference_right: int | None = None
    only_candidate_right: int | None = None
    mcnemar_p: float | None = None
    """Two-sided and exact; None, as the counts, where questions are not right or wrong."""
    reference_values: tuple[float, ...] = ()
    candidate_values: tuple[float, ...] = ()
    """One a question, where each has a number."""


class WrittenAnswer(FrozenRecord):
    """Answers of both models to one question, as they wrote them."""

    task: str
    question: int
    """Its place in the task's data."""
    right: str
    reference: str
    candidate: str


class TaskResult(FrozenRecord):
    """A task, or all tasks of a group, on both models. `sha256` is of all prompts and right answers."""

    name: str
    tasks: dict[str, int]
    """Number of questions of each."""
    num_shots: int
    sha256: str
    metrics: tuple[TaskMetric, ...]
    answers: tuple[WrittenAnswer, ...]

    @property
    def num_questions(self) -> int:
        return sum(self.tasks.values())


def summarize_task(
    name: str, tasks: Mapping[str, Any], before: Mapping[str, list[Sample]], after: Mapping[str, list[Sample]]
) -> TaskResult:
    """Return what the harness found for the tasks (of its class Task) that one name stands for."""
    pairs = [(task, *pair) for task in tasks for pair in zip(before[task], after[task], strict=True)]
    scored: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
    first: dict[tuple[str, str], Any] = {}  # the first task that has a score says how it is put together
    for task, ours, theirs in pairs:
        for metric in ours["metrics"]:
            first.setdefault((metric, ours["filter"]), tasks[task])
            scored.setdefault((metric, ours["filter"]), []).append((ours[metric], theirs[metric]))
    questions = {(task, ours["doc_id"]): (ours, theirs) for task, ours, theirs in pairs}
    shots = {task.config.num_fewshot or 0 for task in tasks.values()}
    return TaskResult(
        name=name,
        tasks={task: sum(1 for place in questions if place[0] == task) for task in tasks},
        num_shots=max(shots),
        sha256=_digest(ours for ours, _ in questions.values()),
        metrics=tuple(
            _metric(*key, first[key], *(list(side) for side in zip(*values, strict=True)))
            for key, values in scored.items()
        ),
        answers=tuple(
            WrittenAnswer(
                task=task,
                question=number,
                right=str(ours["target"]),
                reference=ours["resps"][0][0],
                candidate=theirs["resps"][0][0],
            )
            for (task, number), (ours, theirs) in questions.items()
            if tasks[task].OUTPUT_TYPE == "generate_until"
        ),
    )


def _digest(samples: Iterable[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update("".join(sample[f"{part}_hash"] for part in ("doc", "prompt", "target")).encode())
    return digest.hexdigest()


def _metric(name: str, filtered: str, task: Any, before: list[Any], after: list[Any]) -> TaskMetric:
    about = {"name": name, "filter": filtered, "higher_is_better": bool(task.higher_is_better().get(name, True))}
    together: Callable[[list[Any]], float] = task.aggregation()[name]
    sides = [np.array(side, dtype=np.float64) for side in (before, after) if _are_numbers(side)]
    if len(sides) < 2 or not np.isclose(together(before), sides[0].mean()):
        return TaskMetric(**about, **_drawn(together, before, after))
    singles = [1] * len(before)
    about["difference"] = bootstrap_mean(sides[1] - sides[0], singles)
    about |= {"reference_values": tuple(sides[0].tolist()), "candidate_values": tuple(sides[1].tolist())}
    if {*before, *after} <= {0, 1}:
        proportions = [wilson_interval(int(side.sum()), len(side)) for side in sides]
        about |= compare_paired(*(side.astype(bool).tolist() for side in sides))
    else:
        proportions = [bootstrap_mean(side, singles) for side in sides]
    return TaskMetric(**about, reference=proportions[0], candidate=proportions[1])


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, bool | int | float | np.number) for value in values)


def _drawn(together: Callable[[list[Any]], float], before: list[Any], after: list[Any]) -> dict[str, Estimate]:
    """Return estimates of a score of all questions together, and of its difference."""
    generator = np.random.default_rng(0)
    draws = [range(len(before)), *generator.integers(0, len(before), (NUM_DRAWS, len(before)))]
    scores = np.array([[together([side[i] for i in draw]) for side in (before, after)] for draw in draws])
    columns = {"reference": scores[:, 0], "candidate": scores[:, 1], "difference": scores[:, 1] - scores[:, 0]}
    ends = {name: np.quantile(column[1:], (0.025, 0.975)).tolist() for name, column in columns.items()}
    return {
        name: Estimate(value=float(column[0]), low=ends[name][0], high=ends[name][1])
        for name, column in columns.items()
    }
