"""Multiple-choice questions: records of a file, or of a `datasets` id such as `cais/mmlu`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dynquant.errors import EvaluationError
from dynquant.inputs.records import check_is_file, read_records
from dynquant.storage.documents import first_fault

Item = TypeVar("Item")

MAX_CHOICES = 26
"""As many as there are letters."""
_WAY_OUT = "Each record needs subject, question, choices and answer (the index of the right choice)."


class Question(BaseModel):
    """One line of a question file; `answer` is the index of the right choice."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    subject: str
    question: str
    choices: tuple[str, ...] = Field(min_length=2, max_length=MAX_CHOICES)
    answer: int = Field(ge=0, strict=True)
    """A choice may be `true` or "1" itself, so only a whole number is an index."""

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> "Question":
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is not an index into {len(self.choices)} choices")
        if not all(choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        return self


def load_questions(source: str | Path, *, split: str = "test") -> list[Question]:
    """Return the questions of a file, or of a `datasets` id such as `cais/mmlu` (configuration `all`).

    Raises EvaluationError when the file is missing, empty or has a malformed record, naming it.
    """
    path = Path(source)
    if not path.is_dir():
        check_is_file(path, EvaluationError)
    if not path.is_file():
        if not path.exists() and (path.suffix or path.is_absolute()):
            raise EvaluationError(f"The question file {source} does not exist; check the path.")
        return _load_from_datasets(str(source), split)
    questions = [_question(record, place) for _, place, record in read_records(path, EvaluationError, _WAY_OUT)]
    if not questions:
        raise EvaluationError(f"{path.name} holds no questions.")
    return questions


def _question(record: Any, place: str) -> Question:
    try:
        return Question.model_validate(record)
    except ValidationError as error:
        raise EvaluationError(f"{place} is not a question ({first_fault(error)}). {_WAY_OUT}") from error


def _load_from_datasets(name: str, split: str) -> list[Question]:
    from datasets import load_dataset

    try:
        rows: Iterable[dict] = load_dataset(name, "all", split=split)
    except Exception as error:
        raise EvaluationError(
            f"{name} is no local file, and the data set could not be loaded ({error}). "
            "Give a .jsonl file with subject, question, choices and answer, or go online."
        ) from error
    return [_question(dict(row), f"{name}, row {number}") for number, row in enumerate(rows, start=1)]


def split_shots(questions: Sequence[Question], count: int) -> tuple[list[Question], list[Question]]:
    """Return the first `count` questions of each subject, for examples, and the others."""
    seen: Counter[str] = Counter()
    shots, others = [], []
    for question in questions:
        (shots if seen[question.subject] < count else others).append(question)
        seen[question.subject] += 1
    if not others:
        raise EvaluationError(
            f"No subject has more than the {count} questions that are its examples. Give examples by --shots, or ask "
            "for fewer by --num-shots."
        )
    return shots, others


def take_evenly(questions: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` questions, or prompts, at equal steps through the list, so that every subject keeps its share."""
    if limit is None or limit >= len(questions):
        return list(questions)
    if limit < 1:
        raise EvaluationError(f"The limit of questions must be at least 1, got {limit}.")
    return [questions[i * len(questions) // limit] for i in range(limit)]
