"""Few-shot multiple-choice questions in MMLU's two formats, scored by the log-probability of the answers.

Prompts, continuations and their tokenization are those of lm-evaluation-harness 0.4 (`mmlu` and `mmlu_continuation`):
the letter format lists the choices and scores " A" to " D"; the cloze format shows no choices and scores each choice's
own text, divided by its length in UTF-8 bytes. The keys and values of the few-shot prefix that a subject's questions
share are computed once, and several questions may run together (`runners`). Generated answers and chat templates are
left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dynquant.errors import EvaluationError
from dynquant.evaluation.distributions import log_probs_at
from dynquant.evaluation.options import Scoring, TaskOptions
from dynquant.evaluation.runners import LogitRunner
from dynquant.inputs.branches import Branches, num_shared
from dynquant.inputs.questions import Question, load_questions, split_shots, take_evenly
from dynquant.inputs.text import TextEncoder

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class EncodedQuestion:
    """Token ids of a prompt and of its answers, as given to every model."""

    question: Question
    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    dropped_shots: int


@dataclass(frozen=True)
class AnswerScores:
    """One model's summed log-probabilities of a question's answers, over the full vocabulary."""

    question: Question
    log_probs: np.ndarray  # float64 [choices]

    def prediction(self, scoring: Scoring) -> int:
        """Index of the best answer; cloze answers are compared per byte of their text."""
        return int(np.argmax(self._normalized(scoring)))

    def probability_among_choices(self, scoring: Scoring) -> float:
        """Softmax over the choices only, of the right answer."""
        scores = self._normalized(scoring)
        weights = np.exp(scores - scores.max())  # no overflow
        return float(weights[self.question.answer] / weights.sum())

    @property
    def probability(self) -> float:
        """Probability of the right answer's tokens in the full vocabulary."""
        return float(np.exp(self.log_probs[self.question.answer]))

    def _normalized(self, scoring: Scoring) -> np.ndarray:
        if scoring == "letter":
            return self.log_probs
        return self.log_probs / np.array([len(choice.encode()) for choice in self.question.choices])


def render_prompt(question: Question, shots: Sequence[Question], scoring: Scoring) -> str:
    """Description, answered shots and the open question, ending in "Answer:"."""
    return _render_start(question.subject, shots, scoring) + _render(question, scoring)


def _render_start(subject: str, shots: Sequence[Question], scoring: Scoring) -> str:
    kind = "multiple choice questions" if scoring == "letter" else "questions"
    description = f"The following are {kind} (with answers) about {subject.replace('_', ' ')}.\n\n"
    return description + "".join(f"{_render(s, scoring)} {answer_texts(s, scoring)[s.answer]}\n\n" for s in shots)


def answer_texts(question: Question, scoring: Scoring) -> list[str]:
    """Return the texts that are scored after "Answer: ": letters, or the choices themselves."""
    return list(LETTERS[: len(question.choices)]) if scoring == "letter" else list(question.choices)


def _render(question: Question, scoring: Scoring) -> str:
    text = question.question.strip()
    if scoring == "cloze":
        return f"Question: {text}\nAnswer:"
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False))
    return f"{text}\n{listed}\nAnswer:"


def read_questions(
    options: TaskOptions, encode: TextEncoder, context_length: int
) -> dict[Scoring, list[EncodedQuestion]]:
    """Return the questions that were asked for, with their shots, in every way of scoring."""
    questions, shots = load_asked(options)
    limits = {"num_shots": options.num_shots, "context_length": context_length}
    scorings = dict.fromkeys(options.scoring)
    return {name: encode_questions(questions, shots, name, encode, **limits) for name in scorings}


def load_asked(options: TaskOptions) -> tuple[list[Question], list[Question]]:
    """Return the questions that were asked for, and those that are shots. Raises EvaluationError: they cannot be read,
    or a file has too few for shots of its own."""
    data = options.mmlu_data or "cais/mmlu"
    asked, shots = load_questions(data), []
    if options.num_shots and options.shots is None and Path(data).is_file():
        shots, asked = split_shots(asked, options.num_shots)
    elif options.num_shots:
        shots = load_questions(options.shots or data, split="dev")
    return take_evenly(asked, options.limit or None), shots


def encode_questions(
    questions: Sequence[Question],
    shots: Sequence[Question],
    scoring: Scoring,
    encode: TextEncoder,
    *,
    num_shots: int,
    context_length: int,
) -> list[EncodedQuestion]:
    """Tokenize prompts with the first `num_shots` shots of each subject.

    A prompt that does not fit `context_length` with its longest answer loses its oldest shots; `dropped_shots` counts
    them. Raises EvaluationError when a subject has fewer shots than asked, or when a question alone does not fit.
    """
    by_subject: dict[str, list[Question]] = {}
    for shot in shots:
        by_subject.setdefault(shot.subject, []).append(shot)
    encoded, encode_start = [], cache(encode)  # questions of a subject have the same shots
    for question in questions:
        examples = by_subject.get(question.subject, [])[:num_shots]
        if len(examples) < num_shots:
            raise EvaluationError(
                f"Subject {question.subject!r} has {len(examples)} example questions, but {num_shots} shots were asked "
                "for. Add examples to the shots file, or ask for fewer shots."
            )
        encoded.append(_encode_question(question, examples, scoring, encode, encode_start, context_length))
    return encoded


def _encode_question(
    question: Question,
    shots: list[Question],
    scoring: Scoring,
    encode: TextEncoder,
    encode_start: Callable[[str], list[int]],
    context_length: int,
) -> EncodedQuestion:
    for dropped in range(len(shots) + 1):
        start, asked = _render_start(question.subject, shots[dropped:], scoring), _render(question, scoring)
        (prompt,) = _encode_behind(start, encode_start(start), [asked], encode)
        endings = [f" {answer}" for answer in answer_texts(question, scoring)]
        answers = [tuple(ids[len(prompt) :]) for ids in _encode_behind(start + asked, prompt, endings, encode)]
        if not all(answers):
            raise EvaluationError(f"An answer to {question.question[:60]!r} has no tokens of its own after the prompt.")
        if len(prompt) + max(map(len, answers)) - 1 <= context_length:
            return EncodedQuestion(question, tuple(prompt), tuple(answers), dropped)
    raise EvaluationError(
        f"The question {question.question[:60]!r} ({question.subject}) takes {len(prompt)} tokens without any shot, "
        f"more than the context of {context_length}. Leave it out of the question file."
    )


def _encode_behind(text: str, ids: list[int], endings: Sequence[str], encode: TextEncoder) -> list[list[int]]:
    """Return the ids of a text with each ending, where those of the text are known.

    The two are encoded together, as the harness does: a tokenizer may merge characters across the seam. Where the last
    lines of the text have the same ids by themselves, they stand for all of it, which is nine tenths of the work with
    five shots.
    """
    newline = text.rfind("\n", 0, max(0, text.rfind("\n", 0, len(text.rstrip("\n")))))
    # Some tokenizers join a newline to what is before it, and others begin a text with a space.
    for start in (newline + 1, newline) if newline > 0 else ():
        end = encode(text[start:], add_special=False)
        if ids[-len(end) :] == end:
            return [ids[: -len(end)] + encode(text[start:] + ending, add_special=False) for ending in endings]
    return [encode(text + ending) for ending in endings]


def score_questions(
    runner: LogitRunner, encoded: Sequence[EncodedQuestion], num_columns: int, progress: Callable[[int, int], None]
) -> list[AnswerScores]:
    """Log-probabilities of every answer, in the order of `encoded`; logits beyond `num_columns` are ignored."""
    groups: dict[tuple[str, int], list[int]] = {}
    for i, item in enumerate(encoded):
        groups.setdefault((item.question.subject, item.dropped_shots), []).append(i)
    whole = [Branches(item.prompt, item.answers) for item in encoded]
    scores = score_answers(runner, whole, list(groups.values()), num_columns, progress)
    return [AnswerScores(item.question, score.log_probs) for item, score in zip(encoded, scores, strict=True)]


class TreeScores(NamedTuple):
    """Scores of the answers of one tree."""

    log_probs: np.ndarray  # float64 [answers], summed over their tokens
    are_greedy: np.ndarray  # bool [answers]: every token is the most likely one


def score_answers(
    runner: LogitRunner,
    whole: Sequence[Branches],
    groups: Sequence[Sequence[int]],
    num_columns: int,
    progress: Callable[[int, int], None],
) -> list[TreeScores]:
    """Return scores of answers to whole prompts, in their order; those of a group share the start that they have in
    common, whose keys and values are computed once."""
    runner.reserve(max(tree.num_tokens for tree in whole))
    scores: dict[int, TreeScores] = {}
    progress(0, len(whole))
    for indices in groups:
        shared = num_shared([whole[i].suffix for i in indices])
        runner.hold_prefix(whole[indices[0]].suffix[:shared])
        trees = {i: Branches(whole[i].suffix[shared:], whole[i].answers) for i in indices}
        order = sorted(indices, key=lambda i: trees[i].num_tokens)  # those that are run together need little padding
        unscored = iter(order)
        for group, logits in runner.branch_logits([trees[i] for i in order]):
            for score, i in zip(_tree_scores(group, logits[:, :num_columns]), unscored, strict=False):
                scores[i] = score
            progress(len(scores), len(whole))
    return [scores[i] for i in range(len(whole))]


def _tree_scores(trees: Sequence[Branches], logits: torch.Tensor) -> list[TreeScores]:
    """Return the scores of every tree's answers, from its rows of logits [rows, columns]."""
    ids = torch.zeros(len(logits), max(len(tree.answers) for tree in trees), dtype=torch.int64)
    start = 0
    for tree in trees:
        # The first row predicts all first tokens, every other one a token of one answer.
        ids[start, : len(tree.answers)] = torch.tensor([answer[0] for answer in tree.answers])
        later = [token for answer in tree.answers for token in answer[1:]]
        ids[start + 1 : start + tree.num_rows, 0] = torch.tensor(later, dtype=torch.int64)
        start += tree.num_rows
    num_rows = [tree.num_rows for tree in trees]
    log_probs = log_probs_at(logits, ids).cpu().split(num_rows)
    is_top = (logits.argmax(1, keepdim=True).cpu() == ids).split(num_rows)
    return [
        TreeScores(_over_tokens(tree, ours, torch.sum), _over_tokens(tree, top, torch.all))
        for tree, ours, top in zip(trees, log_probs, is_top, strict=True)
    ]


def _over_tokens(tree: Branches, values: torch.Tensor, reduced: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """Return the sum, or whatever `reduced` makes, of the values [rows, answers] of every answer's tokens."""
    later = values[1:, 0].split([len(answer) - 1 for answer in tree.answers])
    return np.array([reduced(torch.cat([values[:1, i], rest])).item() for i, rest in enumerate(later)])


def is_right(answer: str, right: str) -> bool:
    """Return True where an answer in words is the right one, apart from case and surrounding space."""
    return answer.strip().casefold() == right.strip().casefold()
