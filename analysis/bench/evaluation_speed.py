"""Speed of scoring a model in transformers, as `eval --runner transformers` does it, with random tokens.

    python -m dynquant.analysis.bench.random_models 1.5b -o m15 --device cuda
    python -m dynquant.analysis.bench.evaluation_speed --model m15 --windows 64 --questions 600

`--model` is a directory or a GGUF file. A row for each task: the model as the reference, whose distributions are kept,
as the candidate, which is compared with them, and questions with four answers of one token or of several, after a
prefix that all questions of a subject share.
"""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from dynquant.evaluation.distributions import Distributions, compared, reduced
from dynquant.evaluation.runners import HuggingFaceRunner, open_runner
from dynquant.evaluation.tasks.multiple_choice import EncodedQuestion, score_questions
from dynquant.inputs.model_inputs import Batch
from dynquant.inputs.questions import Question
from dynquant.kernels.bench.harness import MarkdownTable, device_name, measured, options

_SUBJECTS = 2
_PREFIX_TOKENS = 600
_WARM = 4  # windows that are scored before those that are timed


def main() -> None:
    """Parse, measure, print a Markdown table."""
    asked = options(
        __doc__, device="cuda" if torch.cuda.is_available() else "cpu", model=Path, windows=64, window=512,
        questions=600, prefix=(_PREFIX_TOKENS, "tokens that questions of a subject share"),
    )  # fmt: skip
    runner = open_runner(asked.model, device=asked.device, runner="transformers")
    assert isinstance(runner, HuggingFaceRunner)
    ids = torch.randint(runner.vocab_size, (asked.windows, asked.window), generator=torch.Generator().manual_seed(0))
    windows = [Batch.of_tokens(row[None]) for row in ids]
    print(f"{asked.model.name}, {device_name(asked.device)}, PyTorch {torch.__version__}\n")
    table = MarkdownTable("task", "a second", "unit", "peak GPU memory, GiB")
    list(reference(runner, windows[:_WARM]))
    said: list[Distributions] = []
    tasks = {
        "KL, reference": (lambda: said.extend(reference(runner, windows)), len(windows) * (asked.window - 1), "tokens"),
        "KL, candidate": (lambda: candidate(runner, windows, said), len(windows) * (asked.window - 1), "tokens"),
    }
    for label, suffix, answer in (("letters", (60, 200), (1, 1)), ("answers", (30, 80), (2, 14))):
        encoded = random_questions(asked.questions, runner.vocab_size, asked.prefix, suffix, answer)
        ask = partial(score_questions, runner, encoded, runner.vocab_size, lambda *_: None)
        tasks[f"questions, {label}"] = ask, len(encoded), "questions"
    for label, (run, amount, unit) in tasks.items():
        seconds, peak = measured(run, asked.device)
        table.add(label, f"{amount / seconds:,.0f}", unit, f"{peak / 2**30:.1f}")


def reference(runner: HuggingFaceRunner, windows: list[Batch]) -> Iterator[Distributions]:
    """Yield the distributions of windows, and take the log-probabilities of what follows."""
    for seed, (batch, logits) in enumerate(zip(windows, runner.scored_logits(windows), strict=True)):
        yield reduced(logits, batch.targets, seed)[0]


def candidate(runner: HuggingFaceRunner, windows: list[Batch], said: list[Distributions]) -> None:
    """Compare windows with what the reference said of them."""
    for batch, logits, original in zip(windows, runner.scored_logits(windows), said, strict=True):
        compared(original, logits, batch.targets)


def random_questions(
    count: int, vocab_size: int, prefix: int, suffix: tuple[int, int], answer: tuple[int, int]
) -> list[EncodedQuestion]:
    """Return questions of two subjects, each with four answers; ranges are numbers of tokens."""
    generator = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(vocab_size) for _ in range(length))

    encoded = []
    for subject in range(_SUBJECTS):
        shared = tokens(prefix)
        for _ in range(count // _SUBJECTS):
            question = Question(subject=str(subject), question="q", choices=("a", "b", "c", "d"), answer=0)
            answers = tuple(tokens(generator.randint(*answer)) for _ in range(4))
            encoded.append(EncodedQuestion(question, shared + tokens(generator.randint(*suffix)), answers, 0))
    return encoded


if __name__ == "__main__":
    main()
